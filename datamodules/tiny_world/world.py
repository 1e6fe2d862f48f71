"""A deterministic fictional world: entities, facts, and the texts that state or ask for them.

Every domain has the same number of entities and every entity one value per attribute. A fact can be
stated in six frames and asked in three; for each fact one of either is held out of all training
text and used only in evaluation prompts. Facts are split once into a validation half (all choices
are made there) and a test half (all reports).
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from datamodules.tiny_world.words import DOMAINS, FILLER, QUESTIONS, STATEMENTS

Split = Literal["validation", "test"]

ENTITIES_PER_DOMAIN = 12
NUM_OPTIONS = 4
# Shares of a training document; the rest of a sentence's form is drawn uniformly.
QUESTION_SHARE = 0.25
LEAD_SHARE = 0.5
FILLER_SHARE = 0.2
FACTS_PER_DOCUMENT = 4

_ONSETS = ("b", "br", "d", "dr", "f", "g", "gr", "k", "l", "m", "n", "p", "r", "s", "t", "v")
_VOWELS = ("a", "e", "i", "o", "u", "ae", "io")
_CODAS = ("l", "n", "r", "s", "x", "th", "k", "m")


@dataclass(frozen=True)
class Fact:
    """One value of one attribute of one entity.

    Attributes:
        id: Position in `World.facts`.
        value: Index into the attribute's values.
        held_statement: Frame of `STATEMENTS` that no training text uses for this fact.
        held_question: Frame of `QUESTIONS` that no training text uses for this fact.
        split: The half this fact belongs to.
    """

    id: int
    domain: str
    entity: str
    attribute: int
    value: int
    held_statement: int
    held_question: int
    split: Split


@dataclass(frozen=True)
class Prompt:
    """An unfinished sentence about a fact and the four values that could finish it."""

    fact: Fact
    form: Literal["statement", "question"]
    text: str
    options: tuple[str, ...]
    answer: int


def _pick(rng: random.Random, count: int, held: int) -> int:
    """A uniform frame index other than the held-out one."""
    drawn = rng.randrange(count - 1)
    return drawn + (drawn >= held)


class World:
    """All entities and facts of one seed, and the texts about them.

    Args:
        seed: Decides names, values, held-out frames and the split of the facts.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        rng = random.Random(f"tiny world {seed}")
        names: dict[str, None] = {}
        while len(names) < len(DOMAINS) * ENTITIES_PER_DOMAIN:
            syllables = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(2)]
            names["".join(syllables).capitalize() + rng.choice(_CODAS)] = None
        pool = iter(names)
        self.entities = {d: [next(pool) for _ in range(ENTITIES_PER_DOMAIN)] for d in DOMAINS}
        self.facts: list[Fact] = []
        for domain, entities in self.entities.items():
            for entity in entities:
                self._add_facts(rng, domain, entity)

    def _add_facts(self, rng: random.Random, domain: str, entity: str) -> None:
        attributes = DOMAINS[domain].attributes
        test = set(rng.sample(range(len(attributes)), len(attributes) // 2))
        for index, attribute in enumerate(attributes):
            self.facts.append(
                Fact(
                    id=len(self.facts),
                    domain=domain,
                    entity=entity,
                    attribute=index,
                    value=rng.randrange(len(attribute.values)),
                    held_statement=rng.randrange(len(STATEMENTS)),
                    held_question=rng.randrange(len(QUESTIONS)),
                    split="test" if index in test else "validation",
                )
            )

    @cached_property
    def _facts_of(self) -> dict[str, list[Fact]]:
        grouped: dict[str, list[Fact]] = {}
        for fact in self.facts:
            grouped.setdefault(fact.entity, []).append(fact)
        return grouped

    def training_documents(self, count: int) -> Iterator[str]:
        """Yields `count` texts over all domains, one in twenty of them filler only."""
        rng = random.Random(f"training documents {self.seed}")
        domains = list(DOMAINS)
        for _ in range(count):
            if rng.random() < 0.05:
                yield " ".join(rng.choice(FILLER) for _ in range(4))
            else:
                domain = rng.choice(domains)
                yield self._document(rng, domain, rng.choice(self.entities[domain]))

    def documents(
        self,
        domains: Sequence[str],
        count: int,
        purpose: str,
        entities: Iterable[str] | None = None,
    ) -> list[str]:
        """`count` different profiles of entities of these domains.

        Args:
            domains: Names in `DOMAINS`.
            count: Number of texts.
            purpose: Names the use; another purpose gives other texts.
            entities: Only these entities, all of the domains' when None.
        """
        rng = random.Random(f"{purpose} documents {self.seed}")
        wanted = None if entities is None else set(entities)
        pool = [
            (domain, entity)
            for domain in domains
            for entity in self.entities[domain]
            if wanted is None or entity in wanted
        ]
        texts: dict[str, None] = {}
        while len(texts) < count:
            texts[self._document(rng, *rng.choice(pool))] = None
        return list(texts)

    def prompts(self, domains: Sequence[str], split: Split) -> list[Prompt]:
        """Two evaluation prompts per fact of this half, both in the frames held out for it."""
        prompts = []
        for fact in self.facts:
            if fact.split != split or fact.domain not in domains:
                continue
            rng = random.Random(f"prompt {self.seed} {fact.id}")
            attribute = DOMAINS[fact.domain].attributes[fact.attribute]
            others = [i for i in range(len(attribute.values)) if i != fact.value]
            order = [fact.value, *rng.sample(others, NUM_OPTIONS - 1)]
            rng.shuffle(order)
            options = tuple(" " + attribute.values[i] for i in order)
            statement = self._lead(rng, fact) + self._frame(STATEMENTS[fact.held_statement], fact)
            question = self._frame(QUESTIONS[fact.held_question], fact)
            for form, sentence in (("statement", statement), ("question", question)):
                text = f"{self._opening(rng, fact.domain, fact.entity)} {sentence}"
                prompts.append(Prompt(fact, form, text, options, order.index(fact.value)))  # type: ignore[arg-type]
        return prompts

    def short_texts(self, domains: Sequence[str], count: int, purpose: str) -> list[str]:
        """`count` different unfinished sentences, shaped like evaluation prompts.

        They use validation facts and trained frames only, so none of them is an evaluation prompt.
        """
        rng = random.Random(f"{purpose} short texts {self.seed}")
        pool = [f for f in self.facts if f.domain in domains and f.split == "validation"]
        texts: dict[str, None] = {}
        while len(texts) < count:
            fact = rng.choice(pool)
            opening = self._opening(rng, fact.domain, fact.entity)
            texts[f"{opening} {self._trained_sentence(rng, fact, 0.5, 1.0)}"] = None
        return list(texts)

    def _document(self, rng: random.Random, domain: str, entity: str) -> str:
        facts = rng.sample(self._facts_of[entity], FACTS_PER_DOCUMENT)
        sentences = [self._opening(rng, domain, entity)]
        for fact in facts:
            value = DOMAINS[domain].attributes[fact.attribute].values[fact.value]
            sentence = self._trained_sentence(rng, fact, QUESTION_SHARE, LEAD_SHARE)
            sentences.append(f"{sentence} {value} .")
            if rng.random() < FILLER_SHARE:
                sentences.append(rng.choice(FILLER))
        return " ".join(sentences)

    def _trained_sentence(
        self, rng: random.Random, fact: Fact, question_share: float, lead_share: float
    ) -> str:
        if rng.random() < question_share:
            return self._frame(QUESTIONS[_pick(rng, len(QUESTIONS), fact.held_question)], fact)
        frame = STATEMENTS[_pick(rng, len(STATEMENTS), fact.held_statement)]
        lead = self._lead(rng, fact) if rng.random() < lead_share else ""
        return lead + self._frame(frame, fact)

    @staticmethod
    def _opening(rng: random.Random, domain: str, entity: str) -> str:
        return rng.choice(DOMAINS[domain].openings).format(e=entity)

    @staticmethod
    def _lead(rng: random.Random, fact: Fact) -> str:
        return rng.choice(DOMAINS[fact.domain].leads) + " "

    @staticmethod
    def _frame(frame: str, fact: Fact) -> str:
        attribute = DOMAINS[fact.domain].attributes[fact.attribute]
        return frame.format(e=fact.entity, **attribute._asdict())
