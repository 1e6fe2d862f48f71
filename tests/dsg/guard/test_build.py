import hashlib
import json
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsg.errors import UserError
from dsg.guard.build import build_guard
from dsg.guard.guard import Guard
from dsg.selection.rules import select_fisher_ratio
from dsg.selection.splits import split_by_hash, texts_digest
from dsg.selection.statistics import collect_statistics, corpus_batches
from tests.helpers import HOOK_POINT, WORDS, jumprelu_sae, standard_sae

RNG = np.random.default_rng(0)


def texts(num, words):
    made = set()
    while len(made) < num:
        made.add(" ".join(RNG.choice(words, RNG.integers(4, 12))))
    return sorted(made)


FORGET = texts(30, WORDS[:8])
RETAIN = texts(60, WORDS[8:])
OPTIONS = {"hook_point": HOOK_POINT, "num_features": 3, "ratio_percentile": 75.0, "batch_size": 8}


@pytest.fixture
def guard(model, tokenizer):
    return build_guard(model, tokenizer, jumprelu_sae(), FORGET, iter(RETAIN), **OPTIONS)


def test_build_equals_its_steps(guard, model, tokenizer):
    forget, _ = split_by_hash(FORGET, (0.75, 0.25))
    selection, calibration, heldout = split_by_hash(RETAIN, (0.5, 0.25, 0.25))
    sae = jumprelu_sae()
    chosen = select_fisher_ratio(
        *(
            collect_statistics(model, sae, HOOK_POINT, corpus_batches(tokenizer, part, None, 1))
            for part in (forget, selection)
        ),
        3,
        75.0,
    )
    assert guard.feature_ids == list(chosen.feature_ids)

    def density(text):
        return guard.density(model, torch.tensor(tokenizer([text])["input_ids"])).item()

    threshold = np.percentile([density(text) for text in calibration], 95.0)
    assert guard.threshold == pytest.approx(threshold, abs=1e-15)
    rate = guard.facts["false_positive_rate"]
    assert rate["n"] == len(heldout)
    assert rate["value"] == np.mean([density(text) > guard.threshold for text in heldout])
    assert rate["low"] <= rate["value"] <= rate["high"]


def test_facts_tell_how_it_was_made(guard):
    facts = guard.facts
    assert sum(part["n"] for part in facts["texts"].values()) == len(FORGET) + len(RETAIN)
    assert facts["calibration"]["threshold_percentile"] == 95.0
    assert facts["calibration"]["n"] == facts["texts"]["retain_calibration"]["n"]
    assert facts["sae"]["architecture"] == "jumprelu"
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["mean_residual_norm"] == guard.edit.residual_norm > 0
    assert len(facts["selection"]["forget_scores"]) == 3
    forget, _ = split_by_hash(FORGET, (0.75, 0.25))
    assert facts["texts"]["forget_selection"]["sha256"] == texts_digest(reversed(forget))
    json.dumps(facts, allow_nan=False)


def test_built_guard_is_on_the_cpu_and_survives_saving(guard, tmp_path):
    guard.save(tmp_path)
    loaded = Guard.load(tmp_path)
    assert loaded.feature_ids == guard.feature_ids
    assert loaded.facts == json.loads(json.dumps(guard.facts))


def test_explicit_splits_override_and_give_their_share_to_selection(model, tokenizer):
    calibration, heldout = texts(5, WORDS), texts(4, WORDS)
    built = build_guard(
        model,
        tokenizer,
        jumprelu_sae(),
        FORGET,
        RETAIN,
        calibration_texts=calibration,
        heldout_texts=heldout,
        **OPTIONS,
    )
    sizes = {name: part["n"] for name, part in built.facts["texts"].items()}
    assert sizes["retain_selection"] == len(RETAIN)
    assert (sizes["retain_calibration"], sizes["retain_heldout"]) == (5, 4)


def test_overlap_is_refused_whatever_case_and_spacing(model, tokenizer):
    shared = FORGET[0].upper().replace(" ", "  ")
    with pytest.raises(UserError, match="splits must not share a text, got 'w"):
        build_guard(model, tokenizer, standard_sae(), FORGET, [*RETAIN, shared], **OPTIONS)
    with pytest.raises(UserError, match="and 'retain_heldout'; remove it from one"):
        build_guard(
            model, tokenizer, standard_sae(), FORGET, RETAIN, heldout_texts=RETAIN, **OPTIONS
        )


def test_repeated_texts_share_a_split(model, tokenizer):
    built = build_guard(model, tokenizer, jumprelu_sae(), FORGET * 2, RETAIN * 2, **OPTIONS)
    sizes = [part["n"] for part in built.facts["texts"].values()]
    assert sum(sizes) == 2 * (len(FORGET) + len(RETAIN))


def test_what_does_not_fit_is_refused(model, tokenizer):
    with pytest.raises(UserError, match="residual width 16, got 8"):
        build_guard(model, tokenizer, standard_sae(d_in=8), FORGET, RETAIN, **OPTIONS)
    with pytest.raises(UserError, match=r"the split 'retain_.*' must hold at least one text"):
        build_guard(model, tokenizer, standard_sae(), FORGET, RETAIN[:1], **OPTIONS)
    with pytest.raises(UserError, match="the split 'forget_selection' must hold at least one"):
        build_guard(model, tokenizer, standard_sae(), [], RETAIN, **OPTIONS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"forget": [*FORGET, " \n\t"]},
            "every text must hold a word, got a blank one in",
        ),
        ({"retain": []}, "the split 'retain_selection' must hold at least one text"),
        ({"num_features": 0}, "`num_features` must be at least 1, got 0"),
        ({"ratio_percentile": 101.0}, r"`ratio_percentile` must be in \[0, 100\], got 101.0"),
        ({"threshold_percentile": -1.0}, r"`threshold_percentile` must be in \[0, 100\]"),
        ({"hook_point": "blocks.9.hook_resid_post"}, "one of the model's 3 decoder layers"),
        ({"clamp_value": float("nan")}, "`clamp_value` must be a finite number"),
        ({"max_length": 0}, "`max_length` must be at least 1"),
    ],
)
def test_bad_input_is_one_sentence(model, tokenizer, changes, message):
    options = {**OPTIONS, "forget": FORGET, "retain": RETAIN, **changes}
    forget, retain = options.pop("forget"), options.pop("retain")
    with pytest.raises(UserError, match=message) as caught:
        build_guard(model, tokenizer, jumprelu_sae(), forget, retain, **options)
    assert "\n" not in str(caught.value)


def test_saes_that_do_not_belong_here_are_refused(model, tokenizer):
    elsewhere, spoilt = jumprelu_sae(), jumprelu_sae()
    elsewhere.cfg.metadata.hook_name = "blocks.0.hook_resid_post"
    with pytest.raises(UserError, match=r"where the SAE was trained, 'blocks\.0\.hook_resid_post'"):
        build_guard(model, tokenizer, elsewhere, FORGET, RETAIN, **OPTIONS)
    spoilt.W_dec.data[3, 3] = torch.nan
    with pytest.raises(UserError, match="weights must be finite, got nan or inf in W_dec"):
        build_guard(model, tokenizer, spoilt, FORGET, RETAIN, **OPTIONS)


def test_the_same_place_under_another_name_is_accepted(model, tokenizer):
    sae = jumprelu_sae()
    sae.cfg.metadata.hook_name = "blocks.2.hook_resid_pre"
    guard = build_guard(model, tokenizer, sae, FORGET, RETAIN, **OPTIONS)
    assert guard.facts["sae"]["hook_name"] == "blocks.2.hook_resid_pre"


def test_fewer_features_than_asked_for_are_taken_without_a_log_line(model, tokenizer, caplog):
    options = {**OPTIONS, "num_features": 24, "ratio_percentile": 80.0}
    guard = build_guard(model, tokenizer, jumprelu_sae(), FORGET, RETAIN, **options)
    assert 0 < len(guard.feature_ids) < 24
    assert "passed the selection" not in caplog.text


@given(st.lists(st.text(max_size=5), max_size=20), st.text(max_size=5))
def test_a_texts_split_does_not_depend_on_the_others(others, text):
    alone = split_by_hash([text], (0.5, 0.25, 0.25))
    place = next(index for index, split in enumerate(alone) if split)
    assert text in split_by_hash([*others, text], (0.5, 0.25, 0.25))[place]


def test_split_follows_the_hash():
    first = hashlib.sha256(b"some text").digest()[0] / 256
    expected = 0 if first < 0.5 else 1
    assert split_by_hash(["some text"], (0.5, 0.5))[expected] == ["some text"]
    sizes = [len(part) for part in split_by_hash(map(str, range(4000)), (0.5, 0.25, 0.25))]
    assert sizes == pytest.approx([2000, 1000, 1000], abs=120)


@pytest.mark.parametrize("fractions", [(), (0.5, 0.6), (-0.5, 1.5)])
def test_bad_fractions(fractions):
    with pytest.raises(UserError, match="`fractions` must be at least 0 and sum to 1"):
        split_by_hash(["a"], fractions)


@pytest.mark.parametrize(("num", "warned"), [(13, True), (99, True), (100, False)])
def test_few_calibration_texts_are_warned_of(model, tokenizer, caplog, num, warned):
    calibration = texts(num, WORDS)
    built = build_guard(
        model,
        tokenizer,
        jumprelu_sae(),
        FORGET,
        RETAIN,
        calibration_texts=calibration,
        **OPTIONS,
    )
    assert built.facts["calibration"]["n"] == num
    said = [record.getMessage() for record in caplog.records if record.name == "dsg.guard.build"]
    assert bool(said) == warned
    if warned:
        assert (
            f"comes from {num} calibration texts, of which {num / 20:.1f} are expected" in said[0]
        )


@pytest.mark.parametrize(("terminal", "show"), [(True, True), (True, False), (False, True)])
def test_bars_on_a_terminal_only(model, tokenizer, capsys, monkeypatch, terminal, show):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    build_guard(model, tokenizer, jumprelu_sae(), FORGET, RETAIN, show_progress=show, **OPTIONS)
    written = capsys.readouterr()
    assert not written.out
    parts = (
        "Features on retain_selection",
        "Features on forget_selection",
        "Gate on retain_heldout",
    )
    assert [part in written.err for part in parts] == [terminal and show] * 3
