import csv
from pathlib import Path

import pytest
import torch

import dsg
from dsg.errors import UserError
from dsg.guard import Guard
from tests.guard_reference import LAYER, UNCOUNTED, make_guard
from tests.helpers import BOS, HOOK_POINT, PAD, random_ids, standard_sae, tiny_model, tiny_tokenizer

# Eager attention takes its softmax in float32, where a float64 mask overflows.
MODEL = tiny_model(attn_implementation="sdpa").double()
TOKENIZER = tiny_tokenizer()
SAE = standard_sae(dtype="float64")
# As wide as the SAE of the paper, so that its feature ids exist.
WIDE_SAE = standard_sae(d_sae=16384, dtype="float64")
RELEASE, SAE_ID = "gemma-scope-2b-pt-res-canonical", "layer_7/width_16k/canonical"
FACTS = {"sae": {"loaded_from": [RELEASE, SAE_ID]}}

# The paper's final configurations, in its own columns.
LATENTS = {
    11766: "coronavirus",
    9723: "viral RNA",
    4788: '"infections, and health"',
    1709: "transmission",
    9186: "",
}
HEADER = "latent_idx,hook_action,steering_coefficient,sae_id,sae_release,description\n"
PRIME_ROWS = [
    f"{latent},clamp,-300,{SAE_ID},{RELEASE},{text}\n" for latent, text in LATENTS.items()
]
CLAMP_PRIME = HEADER + "".join(PRIME_ROWS)
TRIGGERS = [11766, 9723, 4788, 1709, 9186, 3058, 13381, 14050, 11078, 16246]
REFUSAL_HEADER = (
    "latent_idx,hook_action,refuse_id,clamp_value,steering_coefficient,sae_id,sae_release,"
    "description\n"
)
REFUSAL_CLAMP = REFUSAL_HEADER + "".join(
    f"{latent},clamp_refusal,15864,0.05,-500,{SAE_ID},{RELEASE},about {latent}\n"
    for latent in TRIGGERS
)
# The merged harness's columns, with the trailing comma of its documentation.
HARNESS = (
    "loader,action,sparse_model,hookpoint,feature_index,steering_coefficient,sae_id,description,\n"
    f"sae_lens,clamp,{RELEASE},layers.1,3,-20.0,{SAE_ID},first,\n"
    f"sae_lens,clamp,{RELEASE},layers.1,7,-20,{SAE_ID},,\n"
)


def written(folder: Path, text: str) -> Path:
    path = folder / "steer.csv"
    path.write_text(text)
    return path


def imported(path: Path, sae=SAE, **changes) -> Guard:
    return Guard.from_steering_csv(
        path, sae, **{"tokenizer": TOKENIZER, "hook_point": HOOK_POINT, **changes}
    )


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
    assert (guard.gate, guard.edit, guard.clamp_scope) == ("token", "clamp", "active")
    assert (guard.clamp_value, guard.trigger_limit, guard.refusal_id) == (-300.0, 0.0, None)
    assert (guard.hook_point, guard.uncounted_ids, guard.pad_id) == (HOOK_POINT, UNCOUNTED, PAD)


def test_refusal_clamp_writes_another_feature_above_the_limit(tmp_path):
    guard = imported(written(tmp_path, REFUSAL_CLAMP), WIDE_SAE)
    assert (guard.feature_ids, guard.refusal_id) == (TRIGGERS, 15864)
    assert (guard.gate, guard.edit) == ("token", "refusal")
    assert (guard.clamp_value, guard.trigger_limit) == (-500.0, 0.05)


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
        {"clamp_scope": "active"},
        {"clamp_scope": "active", "clamp_value": -0.1 / 3},
        {"clamp_scope": "active", "clamp_unit": "residual_norm", "residual_norm": 1.7},
        {"edit": "refusal", "trigger_limit": 0.3},
        {"feature_ids": [5], "clamp_scope": "all"},
    ],
)
def test_guards_come_back_with_equal_decisions_and_logits(tmp_path, settings):
    guard = make_guard(SAE, gate="token", facts=FACTS, **settings)
    again = imported(guard.to_steering_csv(tmp_path / "steer.csv"))
    assert (again.feature_ids, again.refusal_id) == (guard.feature_ids, guard.refusal_id)
    assert again.clamp_value == guard.activation_value
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
    guard = make_guard(sae, gate="token", clamp_scope="active", facts=facts)
    path = guard.to_steering_csv(tmp_path / "steer.csv")
    again = imported(path, None)
    ids = random_ids(2, 5)
    assert torch.equal(guarded(again, ids)[0], guarded(guard, ids)[0])
    # Also the file of a guard whose file named no SAE.
    unnamed = written(tmp_path, path.read_text().replace(str(tmp_path / "sae"), ""))
    assert imported(unnamed, sae).to_steering_csv(path).read_text().count(str(tmp_path)) == 3


def test_a_dropped_gate_is_noted_in_each_row(tmp_path):
    guard = make_guard(SAE, clamp_scope="active", facts=FACTS)
    path = tmp_path / "steer.csv"
    with pytest.raises(UserError, match=r"`gate` must be 'token'.* got 'density'; pass drop_gate"):
        guard.to_steering_csv(path)
    assert not path.exists()
    guard.to_steering_csv(path, drop_gate=True)
    descriptions = [row["description"] for row in csv.DictReader(path.open())]
    assert descriptions == ["density gate left out"] * 3
    assert imported(path).gate == "token"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clamp_scope": "all"}, "`clamp_scope` must be 'active'.* got 'all'; use guard.replace"),
        (
            {"clamp_scope": "active", "trigger_limit": 0.2},
            r"`trigger_limit` must be 0.* got 0.2; use guard.replace",
        ),
        ({"clamp_scope": "active", "facts": {}}, "`facts` must name the guard's SAE"),
    ],
)
def test_what_the_format_cannot_say_is_refused(tmp_path, settings, message):
    guard = make_guard(SAE, **{"gate": "token", "facts": FACTS, **settings})
    with pytest.raises(UserError, match=message):
        guard.to_steering_csv(tmp_path / "steer.csv")


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
    expected = make_guard(SAE, [3, 7], gate="token", clamp_scope="active")
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


def test_other_programs_spellings_are_read(tmp_path):
    # A byte order mark, an index column, blanks, floats for ids, and a short last row.
    text = (
        "\ufeff,hook_action, latent_idx,steering_coefficient,sae_release,sae_id,description\r\n"
        f"0,clamp,3.0, -2e1,{RELEASE},{SAE_ID},x\r\n"
        f"1,clamp,0,-20.000,{RELEASE},{SAE_ID}\r\n"
    )
    guard = imported(written(tmp_path, text))
    assert (guard.feature_ids, guard.clamp_value) == ([3, 0], -20.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold a header and at least one row, got 0 lines"),
        (HEADER, "must hold a header and at least one row, got 1 lines"),
        (
            CLAMP_PRIME.replace("sae_release", "release"),
            "must have the columns latent_idx, .* misses sae_release; add them",
        ),
        (
            HARNESS.replace("loader", "load"),
            "must have the columns loader, sparse_model, hookpoint, .* misses loader; add them",
        ),
        (
            REFUSAL_CLAMP.replace("clamp_value", "limit"),
            "must have the columns refuse_id, clamp_value, misses clamp_value",
        ),
        (
            HEADER + PRIME_ROWS[0].replace("clamp", "push"),
            r"`hook_action` .*'clamp_refusal'\], got 'push'",
        ),
        (CLAMP_PRIME.replace(",clamp,", ",clamp_cond,"), "got 'clamp_cond'"),
        (CLAMP_PRIME.replace("hook_action", "kind"), "got 'add', which no guard does"),
        (HARNESS.replace("clamp", "add"), r"`action` in .* must be one of \['clamp'\], got 'add'"),
        (
            HEADER + PRIME_ROWS[0] + PRIME_ROWS[1].replace("clamp", "add"),
            "the same `hook_action`, got 'clamp' and 'add'",
        ),
        (
            HEADER + PRIME_ROWS[0] + PRIME_ROWS[1].replace("-300", "-100"),
            "the same `steering_coefficient`, got -300.0 and -100.0; make one file for each",
        ),
        (
            HEADER + PRIME_ROWS[0] + PRIME_ROWS[1].replace("layer_7", "layer_3"),
            "the same `sae_id`, got 'layer_7/width_16k/canonical' and 'layer_3",
        ),
        (
            HEADER + PRIME_ROWS[0] + PRIME_ROWS[1].replace("-pt-", "-it-"),
            "the same `sae_release`",
        ),
        (REFUSAL_CLAMP.replace("0.05", "0.1", 1), "the same `clamp_value`, got 0.1 and 0.05"),
        (REFUSAL_CLAMP.replace("15864", "1", 1), "the same `refuse_id`, got 1 and 15864"),
        (HARNESS.replace("layers.1", "layers.2", 1), "the same `hookpoint`"),
        (CLAMP_PRIME.replace("-300", "nan", 1), "`steering_coefficient` must be a finite number"),
        (CLAMP_PRIME.replace("-300", "low", 1), "must be a finite number .* got 'low'"),
        (CLAMP_PRIME.replace("1709", "17.5"), "`latent_idx` must be a whole number .* got '17.5'"),
        (HARNESS.replace(",7,", ",,"), "`feature_index` must be a finite number .* got ''"),
        (REFUSAL_CLAMP.replace("0.05", "-1"), "`trigger_limit` must be finite and at least 0"),
        (CLAMP_PRIME.replace("1709", "16384"), r"below d_sae 16384, got \[16384\]"),
        (CLAMP_PRIME.replace("1709", "-1"), r"not negative and below d_sae 16384, got \[-1\]"),
        (CLAMP_PRIME.replace("1709", "9723"), "unique"),
        (REFUSAL_CLAMP.replace("15864", "1709"), "unique"),
        (HEADER + PRIME_ROWS[0].rstrip() + ", too\n", "at most the header's 6 cells, got 7"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        imported(written(tmp_path, text), WIDE_SAE, reinterpret=True)
    assert "\n" not in str(caught.value)


def test_unreadable_files_and_unnamed_places_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"`path` must be a CSV file, got .*No such file"):
        imported(tmp_path / "missing.csv")
    path = tmp_path / "steer.csv"
    path.write_bytes(b"latent_idx\n\xff\xfe\n")
    with pytest.raises(UserError, match="must be a CSV file in UTF-8, got another file"):
        imported(path)
    with pytest.raises(UserError, match="`hook_point` must be given, because neither"):
        imported(written(tmp_path, CLAMP_PRIME), WIDE_SAE, hook_point=None)
    path = written(tmp_path, HARNESS.replace("sae_lens", "sparsify"))
    with pytest.raises(UserError, match=r"`sae` must be given .* loader 'sparsify'"):
        imported(path, None, reinterpret=True)
    assert imported(path, reinterpret=True).feature_ids == [3, 7]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = written(tmp_path, "old")
    with pytest.raises(UserError):
        make_guard(SAE, gate="token", facts=FACTS).to_steering_csv(path)
    assert [file.name for file in tmp_path.iterdir()] == ["steer.csv"]
    assert path.read_text() == "old"
