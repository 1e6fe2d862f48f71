"""A saved guard is what it was made as: its label, and the settings beside its folder."""

import json
from typing import Any

import pytest

from dsg.errors import UserError
from dsg.guard.gate import OpenGate
from dsg.guard.recipes import GuardSettings
from lightning_modules import EvaluationModule
from lightning_modules.parts.guards import method_of, saved_guard
from tests.dsg.evaluation.scoring_helpers import tiny_guard
from tests.helpers import HOOK_POINT, tiny_model, tiny_tokenizer
from tests.lightning_modules.toy import ToyData, make_trainer

SAE = "unused"
MADE = {"hook_point": HOOK_POINT, "sae": SAE, "method": "farrell", "num_features": 7}


@pytest.fixture
def folder(tmp_path):
    guard = tiny_guard(tiny_model(), tiny_tokenizer(), 0.7)
    guard.replace(gate=OpenGate(), facts={"settings": MADE}).save(tmp_path / "guard")
    return str(tmp_path / "guard")


def test_settings_that_say_the_same_are_accepted(folder):
    saved_guard(GuardSettings(HOOK_POINT, SAE, artifact=folder))
    saved_guard(GuardSettings(HOOK_POINT, SAE, artifact=folder, num_features=7))
    saved_guard(GuardSettings(HOOK_POINT, SAE, artifact=folder, method="farrell"))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"num_features": 8}, r"`num_features` .* was made with, 7, got 8"),
        ({"method": "random"}, r"`method` .* was made with, 'farrell', got 'random'"),
        ({"clamp_value": -3.0}, r"`clamp_value` must be left out beside `artifact`"),
        ({"threshold": 0.25}, r"`threshold` must be left out beside `artifact`"),
        ({"hook_point": "blocks.0.hook_resid_post"}, r"`hook_point` .* 'blocks.1.hook_resid_post'"),
    ],
)
def test_settings_that_contradict_a_saved_guard_are_refused(folder, other, message):
    given: dict[str, Any] = {"hook_point": HOOK_POINT, "sae": SAE, "artifact": folder, **other}
    settings = GuardSettings(**given)
    with pytest.raises(UserError, match=message):
        saved_guard(settings)


def test_a_saved_guard_of_another_hand_has_a_label_of_its_own():
    guard = tiny_guard(tiny_model(), tiny_tokenizer(), 0.7)
    assert method_of(guard.replace(facts={})) == "guard"
    assert method_of(None) == "base"


def test_results_call_a_saved_guard_by_the_method_that_made_it(folder, toy, tmp_path):
    settings = GuardSettings(HOOK_POINT, SAE, artifact=folder)
    module = EvaluationModule(str(toy / "model"), guard=settings)
    make_trainer(tmp_path / "run").test(module, ToyData(), verbose=False)
    rows = (tmp_path / "run" / "results.jsonl").read_text().splitlines()
    assert {json.loads(row)["method"] for row in rows} == {"farrell"}
