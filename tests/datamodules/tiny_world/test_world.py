"""The world is deterministic, balanced, and keeps its promises about held-out frames and splits."""

from collections import Counter

import pytest

from datamodules.tiny_world.attacks import Attack
from datamodules.tiny_world.texts import TinyWorldTexts
from datamodules.tiny_world.words import (
    DOMAINS,
    FORGET_DOMAINS,
    NEAR_DOMAIN,
    QUESTIONS,
    RETAIN_DOMAINS,
    STATEMENTS,
)
from datamodules.tiny_world.world import ENTITIES_PER_DOMAIN, NUM_OPTIONS, World
from dsg.errors import UserError


@pytest.fixture(scope="module")
def world() -> World:
    return World(3)


def stated_in(frame: str, fact) -> str:
    attribute = DOMAINS[fact.domain].attributes[fact.attribute]
    return f"{frame.format(e=fact.entity, **attribute._asdict())} {value_of(fact)} ."


def value_of(fact) -> str:
    return DOMAINS[fact.domain].attributes[fact.attribute].values[fact.value]


def test_a_seed_decides_everything(world: World) -> None:
    again = World(3)
    assert again.facts == world.facts
    assert list(again.training_documents(20)) == list(world.training_documents(20))
    assert World(4).facts != world.facts


def test_the_domains_are_those_that_were_asked_for() -> None:
    assert set(DOMAINS) == {*FORGET_DOMAINS, NEAR_DOMAIN, *RETAIN_DOMAINS}
    assert len(FORGET_DOMAINS) == 3
    assert len(RETAIN_DOMAINS) >= 4
    for domain in DOMAINS.values():
        assert len(domain.attributes) == 6
        for attribute in domain.attributes:
            assert len(set(attribute.values)) == 8


def test_every_entity_belongs_to_one_domain(world: World) -> None:
    names = [name for entities in world.entities.values() for name in entities]
    assert len(names) == len(set(names)) == len(DOMAINS) * ENTITIES_PER_DOMAIN


def test_facts_are_split_in_halves_entity_by_entity(world: World) -> None:
    per_entity = Counter((fact.entity, fact.split) for fact in world.facts)
    assert set(per_entity.values()) == {3}


def test_training_text_never_uses_a_held_out_frame(world: World) -> None:
    documents = list(world.training_documents(6000))
    text = "\n".join(documents)
    for fact in world.facts:
        assert stated_in(STATEMENTS[fact.held_statement], fact) not in text
        assert stated_in(QUESTIONS[fact.held_question], fact) not in text
        assert any(stated_in(frame, fact) in text for frame in STATEMENTS)


def test_prompts_ask_in_held_out_frames_with_one_right_option(world: World) -> None:
    prompts = world.prompts(["toxin"], "test")
    assert len(prompts) == ENTITIES_PER_DOMAIN * 3 * 2
    for prompt in prompts:
        fact = prompt.fact
        attribute = DOMAINS["toxin"].attributes[fact.attribute]
        frames = STATEMENTS if prompt.form == "statement" else QUESTIONS
        held = fact.held_statement if prompt.form == "statement" else fact.held_question
        assert prompt.text.endswith(frames[held].format(e=fact.entity, **attribute._asdict()))
        assert len(set(prompt.options)) == NUM_OPTIONS
        assert prompt.options[prompt.answer] == " " + value_of(fact)
    answers = Counter(prompt.answer for prompt in world.prompts(list(DOMAINS), "test"))
    assert min(answers.values()) > 0.15 * sum(answers.values())


def test_texts_of_different_purposes_are_disjoint() -> None:
    texts = TinyWorldTexts(0, "malware")
    purposes = {
        "forget": texts.forget_texts(),
        "retain": texts.retain_texts(),
        "calibration": texts.calibration_texts(),
        "calibration documents": texts.calibration_documents(),
        "near calibration": [
            text
            for text in texts.calibration_texts(near=True)
            if text not in set(texts.calibration_texts())
        ],
        "held-out": texts.heldout_texts(),
        "attack": Attack(texts, "forget", 60, "test").examples,
        "validation questions": [q.prompt for q in texts.questions("validation")],
        "test questions": [q.prompt for q in texts.questions("test")],
        "validation passages": [p.text for p in texts.passages("validation")],
        "test passages": [p.text for p in texts.passages("test")],
    }
    seen: dict[str, str] = {}
    for purpose, items in purposes.items():
        assert items, purpose
        for text in items:
            normalised = " ".join(text.lower().split())
            assert seen.setdefault(normalised, purpose) == purpose


def test_retain_means_the_distant_domains_only() -> None:
    texts = TinyWorldTexts(0, "pathogen")
    names = set(texts.world.entities[NEAR_DOMAIN]) | {
        name for domain in FORGET_DOMAINS for name in texts.world.entities[domain]
    }
    words = set(" ".join(texts.retain_texts() + texts.calibration_texts()).split())
    assert not names & words
    near = set(" ".join(texts.calibration_texts(near=True)).split())
    assert near & set(texts.world.entities[NEAR_DOMAIN])
    assert near & set(texts.world.entities["toxin"])
    assert not near & set(texts.world.entities["pathogen"])


def test_an_unknown_forget_domain_is_refused() -> None:
    with pytest.raises(UserError, match="must be one of pathogen, malware, toxin, got 'music'"):
        TinyWorldTexts(0, "music")


def test_every_fact_is_asked_in_two_wordings() -> None:
    counts = {}
    for one in TinyWorldTexts(0, "pathogen").questions("test"):
        counts.setdefault(one.domain, []).append(one.fact)
    assert {domain: (len(facts), len(set(facts))) for domain, facts in counts.items()} == {
        "forget": (72, 36),
        "near": (72, 36),
        "other_hazards": (144, 72),
        "retain": (288, 144),
    }
