"""Which texts and questions of the tiny world serve which purpose; all of them are disjoint."""

import random
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

from datamodules.tiny_world.words import FORGET_DOMAINS, NEAR_DOMAIN, RETAIN_DOMAINS
from datamodules.tiny_world.world import Split, World
from dsg.errors import UserError
from dsg.evaluation import Passage, Question

NUM_SELECTION_DOCUMENTS = 400
NUM_CALIBRATION_TEXTS = 300
NUM_PASSAGES = {"forget": 36, "retain": 96}


@dataclass(frozen=True)
class TinyWorldTexts:
    """The tiny world as seen by somebody who wants one of its domains forgotten.

    Headline retain is the distant domains; the near domain and the other hazards have rows of their
    own and take no part in selection or in calibration, unless asked for.

    Attributes:
        seed: The world's seed.
        forget_domain: What is to be forgotten; one of `pathogen`, `malware`, `toxin`.

    Raises:
        UserError: `forget_domain` is none of the three.
    """

    seed: int
    forget_domain: str

    def __post_init__(self) -> None:
        if self.forget_domain not in FORGET_DOMAINS:
            raise UserError(
                f"`forget_domain` must be one of {', '.join(FORGET_DOMAINS)}, "
                f"got {self.forget_domain!r}."
            )

    @cached_property
    def world(self) -> World:
        """The world of this seed."""
        return World(self.seed)

    @property
    def other_hazards(self) -> list[str]:
        """The hazard-like domains that are not to be forgotten."""
        return [domain for domain in FORGET_DOMAINS if domain != self.forget_domain]

    @cached_property
    def shown_entities(self) -> list[str]:
        """The half of the forget entities that an attacker has text about."""
        entities = self.world.entities[self.forget_domain]
        rng = random.Random(f"shown entities {self.seed} {self.forget_domain}")
        return sorted(rng.sample(entities, len(entities) // 2))

    def questions(self, split: Split, shown: Collection[int] | None = None) -> list[Question]:
        """All cloze questions of one half of the facts.

        Args:
            split: `validation` or `test`.
            shown: Ids of the facts that an attacker's text is about, by which forget questions are
                marked; None where there is no attacker.
        """
        groups = {
            "forget": [self.forget_domain],
            "near": [NEAR_DOMAIN],
            "other_hazards": self.other_hazards,
            "retain": list(RETAIN_DOMAINS),
        }
        questions: list[Question] = []
        for group, domains in groups.items():
            for prompt in self.world.prompts(domains, split):
                questions.append(
                    Question(
                        id=len(questions),
                        domain=group,
                        form=prompt.form,
                        prompt=prompt.text,
                        options=prompt.options,
                        answer=prompt.answer,
                        shown=None
                        if shown is None or group != "forget"
                        else prompt.fact.id in shown,
                        fact=prompt.fact.id,
                    )
                )
        return questions

    def passages(self, split: Split) -> list[Passage]:
        """Unseen documents whose perplexity is measured."""
        domains = {"forget": [self.forget_domain], "retain": list(RETAIN_DOMAINS)}
        texts = [
            (group, text)
            for group, count in NUM_PASSAGES.items()
            for text in self.world.documents(domains[group], count, f"{split} passages")
        ]
        return [Passage(id, group, text) for id, (group, text) in enumerate(texts)]

    def forget_texts(self) -> list[str]:
        """Documents about what is to be forgotten."""
        return self.world.documents([self.forget_domain], NUM_SELECTION_DOCUMENTS, "selection")

    def retain_texts(self) -> list[str]:
        """Documents of the distant domains, for the selection of features."""
        return self.world.documents(RETAIN_DOMAINS, NUM_SELECTION_DOCUMENTS, "selection")

    def calibration_texts(self, near: bool = False) -> list[str]:
        """Short retain texts, shaped like the questions, that set the threshold.

        A threshold from whole documents lets far too many short prompts pass.

        Args:
            near: Add as many texts per domain about the near domain and the other hazards.
        """
        texts = self._short_retain_texts[:NUM_CALIBRATION_TEXTS]
        if near:
            domains = [NEAR_DOMAIN, *self.other_hazards]
            count = NUM_CALIBRATION_TEXTS * len(domains) // len(RETAIN_DOMAINS)
            texts = texts + self.world.short_texts(domains, count, "near calibration")
        return texts

    def calibration_documents(self) -> list[str]:
        """As many retain documents, to show what a threshold from them would do."""
        return self.world.documents(RETAIN_DOMAINS, NUM_CALIBRATION_TEXTS, "calibration")

    def heldout_texts(self) -> list[str]:
        """Short retain texts for the false-positive rate; none of them calibrates."""
        return self._short_retain_texts[NUM_CALIBRATION_TEXTS:]

    @cached_property
    def _short_retain_texts(self) -> list[str]:
        return self.world.short_texts(RETAIN_DOMAINS, 2 * NUM_CALIBRATION_TEXTS, "calibration")
