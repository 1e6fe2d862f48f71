import pytest

from dsg.errors import UserError
from dsg.guard.gate import OpenGate
from tests.guard_reference import make_guard
from tests.helpers import standard_sae
from tests.steering_files import (
    CLAMP_PRIME,
    FACTS,
    HARNESS,
    HEADER,
    PRIME_ROWS,
    REFUSAL_CLAMP,
    SAE,
    WIDE_SAE,
    imported,
    written,
)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scope": "all"}, "`scope` must be 'active'.* got 'all'; use guard.replace"),
        (
            {"scope": "active", "trigger_limit": 0.2},
            r"`trigger_limit` must be 0.* got 0.2; use guard.replace",
        ),
        ({"scope": "active", "facts": {}}, "`facts` must name the guard's SAE"),
    ],
)
def test_what_the_format_cannot_say_is_refused(tmp_path, settings, message):
    guard = make_guard(SAE, **{"gate": OpenGate(), "facts": FACTS, **settings})
    with pytest.raises(UserError, match=message):
        guard.to_steering_csv(tmp_path / "steer.csv")


def test_residual_norms_of_an_sae_that_rescales_are_refused(tmp_path):
    settings = {"gate": OpenGate(), "scope": "active", "facts": FACTS, "residual_norm": 3.0}
    guard = make_guard(
        standard_sae(normalize_activations="layer_norm"), unit="residual_norm", **settings
    )
    with pytest.raises(UserError, match=r"`unit` must be 'activation'.* got 'residual_norm'"):
        guard.to_steering_csv(tmp_path / "steer.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
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
        (CLAMP_PRIME.replace("1709", "17.5"), "`latent_idx` must be a whole number"),
        (HEADER, "must hold a header and at least one row, got 1 lines"),
        (HARNESS.replace(",7,", ",,"), "`feature_index` must be a finite number .* got ''"),
        (REFUSAL_CLAMP.replace("0.05", "-1"), "`trigger_limit` must be finite and at least 0"),
        (CLAMP_PRIME.replace("1709", "16384"), r"below d_sae 16384, got \[16384\]"),
        (CLAMP_PRIME.replace("1709", "-1"), r"not negative and below d_sae 16384, got \[-1\]"),
        (CLAMP_PRIME.replace("1709", "9723"), "unique"),
        (REFUSAL_CLAMP.replace("15864", "1709"), "unique"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        imported(written(tmp_path, text), WIDE_SAE, reinterpret=True)
    assert "\n" not in str(caught.value)


def test_a_file_that_names_too_little_is_refused(tmp_path):
    with pytest.raises(UserError, match="`hook_point` must be given, because neither"):
        imported(written(tmp_path, CLAMP_PRIME), WIDE_SAE, hook_point=None)
    path = written(tmp_path, HARNESS.replace("sae_lens", "sparsify"))
    with pytest.raises(UserError, match=r"`sae` must be given .* loader 'sparsify'"):
        imported(path, None, reinterpret=True)
    assert imported(path, reinterpret=True).feature_ids == [3, 7]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = written(tmp_path, "old")
    with pytest.raises(UserError):
        make_guard(SAE, gate=OpenGate(), facts=FACTS).to_steering_csv(path)
    assert [file.name for file in tmp_path.iterdir()] == ["steer.csv"]
    assert path.read_text() == "old"
