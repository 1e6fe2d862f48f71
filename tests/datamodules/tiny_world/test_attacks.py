from typing import get_args

import pytest

from datamodules import TinyWorldData
from datamodules.tiny_world.attacks import OVERLAPPING, Attack, AttackText
from datamodules.tiny_world.texts import TinyWorldTexts
from datamodules.tiny_world.words import NEAR_DOMAIN, RETAIN_DOMAINS
from datamodules.tiny_world.world import ENTITIES_PER_DOMAIN
from dsg.errors import UserError
from tests.datamodules.reading import read_by
from tests.helpers import tiny_tokenizer

KINDS = get_args(AttackText)


@pytest.fixture(scope="module")
def texts() -> TinyWorldTexts:
    return TinyWorldTexts(0, "pathogen")


def words(examples) -> set[str]:
    return set(" ".join(examples).split())


def entities(texts, *domains) -> set[str]:
    return {name for domain in domains for name in texts.world.entities[domain]}


@pytest.mark.parametrize("kind", KINDS)
def test_all_attacks_take_equal_steps_on_different_texts(texts, kind):
    examples = Attack(texts, kind, 20, "test").examples
    assert len(set(examples)) == 40
    assert Attack(texts, kind, 20, "test").examples == examples
    own, retain = examples[:20], examples[20:]
    about = {
        "forget": (entities(texts, "pathogen"), entities(texts, *RETAIN_DOMAINS)),
        "questions": (entities(texts, "pathogen"), entities(texts, *RETAIN_DOMAINS)),
        "related": (entities(texts, NEAR_DOMAIN), entities(texts, *RETAIN_DOMAINS)),
        "retain": (entities(texts, *RETAIN_DOMAINS),) * 2,
        "unrelated": (set(), set()),
    }
    everything = entities(texts, *texts.world.entities)
    for part, wanted in zip((own, retain), about[kind], strict=True):
        mentioned = [words([text]) & everything for text in part]
        assert all(found <= wanted for found in mentioned)
        assert all(len(found) == (1 if wanted else 0) for found in mentioned)


def test_the_attacker_sees_half_of_the_forget_entities(texts):
    shown = set(texts.shown_entities)
    assert len(shown) == ENTITIES_PER_DOMAIN // 2
    hidden = entities(texts, "pathogen") - shown
    for kind in KINDS:
        assert not hidden & words(Attack(texts, kind, 30, "test").examples)


def marks(texts, attack) -> dict[bool | None, int]:
    found: dict[bool | None, int] = {}
    for question in texts.questions("test", attack.shown_facts):
        if question.domain == "forget":
            found[question.shown] = found.get(question.shown, 0) + 1
        else:
            assert question.shown is None
    return found


def test_questions_are_marked_by_what_the_attacker_was_shown(texts):
    assert marks(texts, Attack(texts, "forget", 20, "test")) == {True: 36, False: 36}
    assert marks(texts, Attack(texts, "questions", 36, "test")) == {True: 36, False: 36}
    for kind in ("related", "unrelated", "retain"):
        assert marks(texts, Attack(texts, kind, 20, "test")) == {False: 72}
    assert all(question.shown is None for question in texts.questions("test"))


def test_questions_state_the_right_answers_of_the_facts_they_mark(texts):
    attack = Attack(texts, "questions", 5, "test")
    stated = {text.removesuffix(" .") for text in attack.examples[:5]}
    right = {}
    for question, prompt in zip(
        [q for q in texts.questions("test", attack.shown_facts) if q.domain == "forget"],
        texts.world.prompts(["pathogen"], "test"),
        strict=True,
    ):
        right[question.prompt + question.options[question.answer]] = question.shown
        assert (prompt.fact.id in attack.shown_facts) == question.shown
    assert stated <= {text for text, shown in right.items() if shown}
    # A fact is asked for in two forms, of which one may be stated.
    assert 5 <= sum(bool(shown) for shown in right.values()) <= 10


def test_text_that_states_no_evaluated_fact_may_hold_no_evaluated_text(texts, monkeypatch):
    for kind in KINDS:
        Attack(texts, kind, 30, "test").check_overlap()
    attack = Attack(texts, "related", 30, "test")
    passage = texts.passages("test")[0].text
    monkeypatch.setitem(vars(attack), "examples", [*attack.examples, passage.upper()])
    with pytest.raises(UserError, match="in 'attack' and 'evaluation'"):
        attack.check_overlap()


def data(**changes) -> TinyWorldData:
    settings = {"val_split": "test", "allow_overlap": True}
    return read_by(TinyWorldData("no model", **{**settings, **changes}), "relearn")


@pytest.mark.parametrize("kind", KINDS)
def test_an_overlap_must_be_allowed_exactly_where_facts_are_stated(kind):
    if kind not in OVERLAPPING:
        assert data(attack_text=kind, allow_overlap=False).attack.kind == kind
        return
    with pytest.raises(UserError, match=f"`allow_overlap` must be true .* {kind!r}"):
        data(attack_text=kind, allow_overlap=False).setup("fit")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_train_texts": 0}, "`num_train_texts` must be at least 1, got 0"),
        ({"attack_text": "poems"}, "`attack_text` must be .*'poems'"),
    ],
)
def test_an_attack_without_text_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        data(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attack_text": "questions", "num_train_texts": 37}, "at most 36 .* got 37"),
        ({"num_train_texts": 3}, "a batch for each of 4 devices, got 8"),
        ({"train_batch_size": 0}, "`train_batch_size` must be at least 1, got 0"),
    ],
)
def test_too_much_or_too_little_text_is_refused_before_training(changes, message):
    made = read_by(data(**changes), "relearn", world_size=4)
    made.tokenizer = tiny_tokenizer()
    with pytest.raises(UserError, match=message):
        made.train_dataloader()


def test_a_checkpoint_of_other_data_is_refused():
    state = data().state_dict()
    data().load_state_dict(state)
    for changes in ({"attack_text": "related"}, {"num_train_texts": 7}, {"seed": 1}):
        with pytest.raises(UserError, match="must be of a run on the same data"):
            data(**changes).load_state_dict(state)
