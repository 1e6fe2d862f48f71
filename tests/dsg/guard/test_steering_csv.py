import csv
from pathlib import Path

import pytest
import torch

import dsg
from dsg.errors import UserError
from dsg.guard.edit import Clamp, Refusal
from dsg.guard.gate import OpenGate
from dsg.guard.guard import Guard
from tests.guard_reference import LAYER, UNCOUNTED, make_guard
from tests.helpers import BOS, HOOK_POINT, PAD, random_ids, standard_sae, tiny_model
from tests.steering_files import (
    CLAMP_PRIME,
    FACTS,
    HARNESS,
    HEADER,
    REFUSAL_CLAMP,
    REFUSAL_HEADER,
    RELEASE,
    SAE,
    SAE_ID,
    TRIGGERS,
    WIDE_SAE,
    imported,
    written,
)

# Eager attention takes its softmax in float32, where a float64 mask overflows.
MODEL = tiny_model(attn_implementation="sdpa").double()


def guarded(guard: Guard, ids: torch.Tensor) -> tuple[torch.Tensor, list[bool]]:
    with torch.no_grad(), guard.attached(MODEL) as attachment:
        logits = MODEL(ids).logits
        return logits, attachment.triggered.tolist()


def edited_logits(ids: torch.Tensor, edit) -> torch.Tensor:
    """Logits with the hook point's output h replaced by edit(h)."""
    layer = MODEL.model.layers[LAYER]
    handle = layer.register_forward_hook(lambda _module, _args, output: edit(output))
    with torch.no_grad():
        logits = MODEL(ids).logits
    handle.remove()
    return logits


def applied_by_hand(path: Path, sae, ids: torch.Tensor, positions: list[int]) -> torch.Tensor:
    """Logits under the rows of a file in the paper's columns, one after the other, full decode."""
    rows = list(csv.DictReader(path.open()))

    def edit(h):
        z = sae.encode(h)
        changed = z.clone()
        for row in rows:
            latent, value = int(row["latent_idx"]), float(row["steering_coefficient"])
            for batch in range(len(ids)):
                for t in positions:
                    if row["hook_action"] == "clamp" and changed[batch, t, latent] > 0:
                        changed[batch, t, latent] = value
                    if row["hook_action"] == "clamp_refusal" and changed[batch, t, latent] > float(
                        row["clamp_value"]
                    ):
                        changed[batch, t, int(row["refuse_id"])] = value
        return h + sae.decode(changed) - sae.decode(z)

    return edited_logits(ids, edit)


@pytest.mark.parametrize("text", [CLAMP_PRIME, REFUSAL_CLAMP])
def test_the_papers_files_come_back_byte_for_byte(tmp_path, text):
    path = written(tmp_path, text)
    guard = imported(path, WIDE_SAE)
    assert guard.to_steering_csv(tmp_path / "copies" / "again.csv").read_text() == text


def test_clamp_prime_is_an_open_clamp_of_active_features(tmp_path):
    guard = imported(written(tmp_path, CLAMP_PRIME), WIDE_SAE)
    assert guard.feature_ids == [11766, 9723, 4788, 1709, 9186]
    assert (guard.gate, guard.edit) == (OpenGate(), Clamp(-300.0, "active"))
    assert (guard.hook_point, guard.uncounted_ids, guard.pad_id) == (HOOK_POINT, UNCOUNTED, PAD)


def test_refusal_clamp_writes_another_feature_above_the_limit(tmp_path):
    guard = imported(written(tmp_path, REFUSAL_CLAMP), WIDE_SAE)
    assert (guard.feature_ids, guard.refusal_id) == (TRIGGERS, 15864)
    assert (guard.gate, guard.edit) == (OpenGate(), Refusal(-500.0, trigger_limit=0.05))


@pytest.mark.parametrize("text", [CLAMP_PRIME, REFUSAL_CLAMP])
def test_the_imported_guard_does_what_the_rows_say(tmp_path, text):
    path, ids = written(tmp_path, text), random_ids(3, 6)
    logits, triggered = guarded(imported(path, WIDE_SAE), ids)
    by_hand = applied_by_hand(path, WIDE_SAE, ids, list(range(6)))
    torch.testing.assert_close(logits, by_hand, rtol=0, atol=1e-8)
    assert (logits - edited_logits(ids, lambda h: h)).abs().max() > 0.1
    assert triggered == [True] * 3


@pytest.mark.parametrize("action", ["clamp", "clamp_refusal,11,0.8"])
def test_rows_count_one_by_one_above_their_limit(tmp_path, action):
    rows = "".join(f"{latent},{action},-2.5,{SAE_ID},{RELEASE},\n" for latent in (3, 0, 7))
    path = written(tmp_path, (HEADER if action == "clamp" else REFUSAL_HEADER) + rows)
    ids = random_ids(4, 6, seed=1)
    hidden = MODEL(ids, output_hidden_states=True).hidden_states[LAYER + 1]
    # Tokens with some but not all features active, and with activity below the limit only.
    z = SAE.encode(hidden)[..., [3, 0, 7]]
    assert ((z > 0).any(-1) & ~(z > 0).all(-1)).any()
    assert ((z > 0).any(-1) & ~(z > 0.8).any(-1)).any()
    logits, _ = guarded(imported(path), ids)
    by_hand = applied_by_hand(path, SAE, ids, list(range(6)))
    torch.testing.assert_close(logits, by_hand, rtol=0, atol=1e-8)


def test_special_tokens_are_edited_only_without_uncounted_ids(tmp_path):
    path = written(tmp_path, REFUSAL_CLAMP)
    ids = torch.cat([torch.full((2, 1), BOS), random_ids(2, 4)], 1)
    guard = imported(path, WIDE_SAE)
    counted = applied_by_hand(path, WIDE_SAE, ids, [1, 2, 3, 4])
    everywhere = applied_by_hand(path, WIDE_SAE, ids, [0, 1, 2, 3, 4])
    assert (counted - everywhere).abs().max() > 0.1
    torch.testing.assert_close(guarded(guard, ids)[0], counted, rtol=0, atol=1e-8)
    open_guard = guard.replace(uncounted_ids=[])
    torch.testing.assert_close(guarded(open_guard, ids)[0], everywhere, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    "settings",
    [
        {"edit": Clamp(-20.0, "active")},
        {"edit": Clamp(-0.1 / 3, "active")},
        {"edit": Clamp(-20.0, "active", unit="residual_norm", residual_norm=1.7)},
        {"edit": Refusal(-20.0, trigger_limit=0.3)},
        {"feature_ids": [5], "edit": Clamp(-20.0, "all")},
    ],
)
def test_guards_come_back_with_equal_decisions_and_logits(tmp_path, settings):
    guard = make_guard(SAE, gate=OpenGate(), facts=FACTS, **settings)
    again = imported(guard.to_steering_csv(tmp_path / "steer.csv"))
    assert (again.feature_ids, again.refusal_id) == (guard.feature_ids, guard.refusal_id)
    assert again.clamp_value == guard.edit.written_value
    # One sequence without a counted token, which no gate triggers.
    ids = torch.cat([random_ids(3, 6), torch.full((1, 6), BOS)])
    logits, triggered = guarded(guard, ids)
    logits_again, triggered_again = guarded(again, ids)
    assert torch.equal(logits, logits_again)
    assert triggered == triggered_again == [True, True, True, False]


def test_an_imported_guard_survives_its_artifact(tmp_path):
    path = written(tmp_path, REFUSAL_CLAMP)
    imported(path, WIDE_SAE).save(tmp_path / "guard")
    loaded = Guard.load(tmp_path / "guard")
    assert loaded.to_steering_csv(tmp_path / "again.csv").read_text() == REFUSAL_CLAMP


def test_a_folder_stands_for_the_sae_where_none_is_given(tmp_path):
    SAE.save_model(tmp_path / "sae")
    sae = dsg.load_sae(str(tmp_path / "sae"))
    facts = {"sae": {"loaded_from": sae.cfg.metadata.loaded_from}}
    guard = make_guard(sae, gate=OpenGate(), scope="active", facts=facts)
    path = guard.to_steering_csv(tmp_path / "steer.csv")
    again = imported(path, None)
    ids = random_ids(2, 5)
    assert torch.equal(guarded(again, ids)[0], guarded(guard, ids)[0])
    # Also the file of a guard whose file named no SAE.
    unnamed = written(tmp_path, path.read_text().replace(str(tmp_path / "sae"), ""))
    assert imported(unnamed, sae).to_steering_csv(path).read_text().count(str(tmp_path)) == 3


def test_a_dropped_gate_is_noted_in_each_row(tmp_path):
    guard = make_guard(SAE, scope="active", facts=FACTS)
    path = tmp_path / "steer.csv"
    with pytest.raises(UserError, match=r"`gate` must be 'token'.* got 'density'; pass drop_gate"):
        guard.to_steering_csv(path)
    assert not path.exists()
    guard.to_steering_csv(path, drop_gate=True)
    descriptions = [row["description"] for row in csv.DictReader(path.open())]
    assert descriptions == ["density gate left out"] * 3
    assert imported(path).gate == OpenGate()


def test_the_harness_clamp_is_another_edit_than_a_guards(tmp_path):
    path = written(tmp_path, HARNESS)
    with pytest.raises(UserError, match=r"`action` in .* moves every token .* reinterpret=True"):
        imported(path)

    def harness(h):
        # Its last row, the only one that counts: every token gets this projection.
        direction = SAE.W_dec[7] / SAE.W_dec[7].norm()
        projection = (h - SAE.b_dec) @ direction
        return h + (-20.0 - projection)[..., None] * direction

    guard = imported(path, hook_point=None, reinterpret=True)
    ids = random_ids(2, 5)
    assert (guarded(guard, ids)[0] - edited_logits(ids, harness)).abs().max() > 0.1
    expected = make_guard(SAE, [3, 7], gate=OpenGate(), scope="active")
    assert torch.equal(guarded(guard, ids)[0], guarded(expected, ids)[0])
    assert guard.hook_point == HOOK_POINT


@pytest.mark.parametrize(
    ("hookpoint", "recorded", "given", "expected"),
    [
        ("", HOOK_POINT, None, HOOK_POINT),
        ("h.1", None, None, HOOK_POINT),
        ("gpt_neox.layers.1", None, None, "gpt_neox.layers.1"),
        ("layers.0", HOOK_POINT, "model.layers.1", "model.layers.1"),
    ],
)
def test_hook_point_comes_from_argument_file_or_sae(tmp_path, hookpoint, recorded, given, expected):
    sae = standard_sae()
    sae.cfg.metadata.hook_name = recorded
    path = written(tmp_path, HARNESS.replace("layers.1", hookpoint))
    assert imported(path, sae, hook_point=given, reinterpret=True).hook_point == expected
