from dataclasses import replace

import pytest
import torch

from dsg.errors import UserError
from dsg.guard.build import GuardBuilder, build_guard
from dsg.guard.edit import Clamp, Refusal
from dsg.guard.gate import DensityGate, OpenGate, WindowGate
from dsg.guard.recipes import GuardSettings
from dsg.selection.splits import FORGET_FRACTIONS, split_by_hash
from tests.helpers import HOOK_POINT, standard_sae
from tests.lightning_modules.toy import texts

FORGET, RETAIN = texts(24, 0, 0, 10), texts(24, 1, 8, 26)
CALIBRATION, HELDOUT = texts(16, 2, 8, 26), texts(16, 3, 8, 26)
SETTINGS = GuardSettings(
    hook_point=HOOK_POINT,
    sae="unused",
    num_features=3,
    ratio_percentile=50.0,
    threshold_percentile=60.0,
    clamp_value=-30.0,
)


@pytest.fixture
def make(model, tokenizer):
    maker = GuardBuilder(SETTINGS, model, tokenizer, standard_sae(), RETAIN, CALIBRATION, HELDOUT)

    def make(**changes):
        maker.settings = replace(SETTINGS, **changes)
        return maker.make(maker.statistics(split_by_hash(FORGET, FORGET_FRACTIONS)[0]))

    return make


def test_dsg_is_what_build_guard_builds(model, tokenizer, make):
    expected = build_guard(
        model,
        tokenizer,
        standard_sae(),
        FORGET,
        RETAIN,
        hook_point=HOOK_POINT,
        num_features=3,
        ratio_percentile=50.0,
        threshold_percentile=60.0,
        clamp_value=-30.0,
        calibration_texts=CALIBRATION,
        heldout_texts=HELDOUT,
    )
    guard = make()
    assert guard.feature_ids == expected.feature_ids
    assert guard.threshold == expected.threshold
    norm = guard.edit.residual_norm
    assert norm == pytest.approx(expected.edit.residual_norm)
    assert isinstance(guard.gate, DensityGate)
    assert guard.edit == Clamp(-30.0, "all", residual_norm=norm)
    assert guard.facts["false_positive_rate"] == expected.facts["false_positive_rate"]
    for name, buffer in expected.features.named_buffers():
        assert torch.equal(guard.features.get_buffer(name), buffer)


def test_a_threshold_chosen_by_hand_is_kept(make, model, tokenizer):
    measured, chosen = make(), make(threshold=0.25)
    assert chosen.feature_ids == measured.feature_ids
    assert chosen.threshold == 0.25 != measured.threshold
    assert "calibration" not in chosen.facts
    above = 0
    for text in HELDOUT:
        ids = torch.tensor(tokenizer([text])["input_ids"])
        above += chosen.density(model, ids).item() > 0.25
    rate = chosen.facts["false_positive_rate"]
    assert (rate["value"], rate["n"]) == (above / len(HELDOUT), len(HELDOUT))


@pytest.mark.parametrize("changes", [{"threshold": 1.5}, {"threshold": 0.5, "gate": "cusum"}])
def test_a_threshold_that_cannot_be_chosen(make, changes):
    with pytest.raises(UserError, match=r"`threshold` must be in \[0, 1\] and its gate"):
        make(**changes)


def test_static_clamp_is_dsg_without_its_gate(make):
    dsg, static = make(), make(method="static_clamp")
    assert static.feature_ids == dsg.feature_ids
    assert (static.gate, static.edit.scope) == (OpenGate(), "all")


def test_farrell_selects_by_frequency_and_clamps_active_features(make):
    farrell = make(method="farrell", max_retain_frequency=0.5)
    assert farrell.feature_ids != make().feature_ids
    assert (farrell.gate, farrell.edit.scope) == (OpenGate(), "active")


def test_random_features_share_none_with_dsg_and_have_their_own_threshold(make):
    dsg = make()
    draws = [make(method="random", draw=draw) for draw in range(3)]
    for guard in draws:
        assert len(guard.feature_ids) == 3
        assert not set(guard.feature_ids) & set(dsg.feature_ids)
        assert isinstance(guard.gate, DensityGate)
    assert len({tuple(guard.feature_ids) for guard in draws}) > 1
    assert {guard.threshold for guard in draws} != {dsg.threshold}


def test_flat_settings_become_the_parts(make):
    window = make(gate="window", window_size=3, clamp_scope="active", trigger_limit=0.1)
    assert window.gate == WindowGate(window.threshold, 3)
    norm = window.edit.residual_norm
    assert window.edit == Clamp(-30.0, "active", residual_norm=norm, trigger_limit=0.1)
    refusal = make(method="refusal_clamp", max_retain_frequency=1.0, clamp_unit="residual_norm")
    assert refusal.gate == OpenGate()
    assert refusal.edit == Refusal(-30.0, unit="residual_norm", residual_norm=norm)
    assert refusal.refusal_id not in refusal.feature_ids
