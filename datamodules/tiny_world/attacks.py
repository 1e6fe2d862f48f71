"""What an attacker on the tiny world fine-tunes on."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from datamodules.tiny_world.texts import TinyWorldTexts
from datamodules.tiny_world.words import FILLER, NEAR_DOMAIN, RETAIN_DOMAINS
from datamodules.tiny_world.world import Prompt, Split
from dsg.errors import UserError, check_choice
from dsg.selection import check_texts

AttackText = Literal["forget", "related", "unrelated", "retain", "questions"]

# Texts that state facts which are evaluated.
OVERLAPPING: tuple[AttackText, ...] = ("forget", "questions")
_FILLER_SENTENCES = 4


@dataclass(frozen=True)
class Attack:
    """The attacker's text, always twice `count` examples, so that all attacks take equal steps.

    Attributes:
        texts: The world and the domain to be forgotten.
        kind: `forget`: documents about half of the forget entities. `questions`: evaluation
            questions about the same half, with their answers (the paper's own setting). `related`:
            benign documents of the near domain. These three are mixed 1:1 with retain documents.
            `retain`: retain documents alone, the control. `unrelated`: sentences about no entity at
            all, since every distant domain of this world is an evaluated retain domain.
        count: Examples of the kind; of `retain` and `unrelated` twice as many.
        split: The half of the facts that is evaluated, for `questions`.

    Raises:
        UserError: The kind is unknown, or there are not that many examples.
    """

    texts: TinyWorldTexts
    kind: AttackText
    count: int
    split: Split

    def __post_init__(self) -> None:
        check_choice("attack_text", self.kind, get_args(AttackText))
        if self.count < 1:
            raise UserError(
                f"`num_train_texts` must be at least 1, got {self.count}: there would be nothing "
                "to train on; try 60."
            )

    @cached_property
    def examples(self) -> list[str]:
        """The text, in no particular order.

        Raises:
            UserError: There are fewer questions than asked for.
        """
        world, count = self.texts.world, self.count
        if self.kind == "unrelated":
            return _filler_texts(world.seed, 2 * count)
        if self.kind == "retain":
            return world.documents(RETAIN_DOMAINS, 2 * count, "attack")
        if self.kind == "questions":
            own = [p.text + p.options[p.answer] + " ." for p in self._prompts]
        elif self.kind == "related":
            own = world.documents([NEAR_DOMAIN], count, "attack")
        else:
            domains, entities = [self.texts.forget_domain], self.texts.shown_entities
            own = world.documents(domains, count, "attack", entities)
        return own + world.documents(RETAIN_DOMAINS, count, "attack")

    @cached_property
    def shown_facts(self) -> frozenset[int]:
        """Ids of the forget facts that the text is about."""
        if self.kind == "questions":
            return frozenset(prompt.fact.id for prompt in self._prompts)
        if self.kind == "forget":
            entities = set(self.texts.shown_entities)
            return frozenset(fact.id for fact in self.texts.world.facts if fact.entity in entities)
        return frozenset()

    def check_overlap(self) -> None:
        """Refuses an evaluation text among the examples, unless they are meant to state its facts.

        Raises:
            UserError: There is one.
        """
        if self.kind in OVERLAPPING:
            return
        evaluation: list[str] = [passage.text for passage in self.texts.passages(self.split)]
        for question in self.texts.questions(self.split):
            evaluation += [question.prompt, question.prompt + question.options[question.answer]]
        check_texts({"attack": self.examples, "evaluation": evaluation})

    @cached_property
    def _prompts(self) -> Sequence[Prompt]:
        entities = set(self.texts.shown_entities)
        prompts = self.texts.world.prompts([self.texts.forget_domain], self.split)
        shown = [prompt for prompt in prompts if prompt.fact.entity in entities]
        if self.count > len(shown):
            raise UserError(
                f"`num_train_texts` must be at most {len(shown)} for the attack text 'questions', "
                f"because there are no more of them, got {self.count}; lower it."
            )
        rng = random.Random(f"attack questions {self.texts.seed} {self.split}")
        return rng.sample(shown, self.count)


def _filler_texts(seed: int, count: int) -> list[str]:
    rng = random.Random(f"attack filler {seed}")
    texts: dict[str, None] = {}
    while len(texts) < count:
        texts[" ".join(rng.choice(FILLER) for _ in range(_FILLER_SENTENCES))] = None
    return list(texts)
