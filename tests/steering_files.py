"""Steering CSV files as the paper and the harness write them, and how to read them in tests."""

from pathlib import Path
from typing import Any

from dsg.guard.guard import Guard
from tests.helpers import HOOK_POINT, standard_sae, tiny_tokenizer

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


def imported(path: Path, sae: Any = SAE, **changes) -> Guard:
    return Guard.from_steering_csv(
        path, sae, **{"tokenizer": TOKENIZER, "hook_point": HOOK_POINT, **changes}
    )
