"""Loads language models for the modules of this package."""

import json
import logging
from pathlib import Path
from typing import cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from dsg.errors import UserError
from dsg.hub import load_pretrained, no_model, short_name

__all__ = ["load_model", "load_plain_model", "short_name"]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_log = logging.getLogger(__name__)


def load_model(model_name: str) -> PreTrainedModel:
    """Load a causal LM in float32, in evaluation mode and with all weights frozen.

    Args:
        model_name: Hugging Face folder or hub name, perhaps with `@revision`. A folder with a PEFT
            adapter gives the model that the adapter names as its base, with the adapter on and
            unmerged (a `PeftModel`, which stands in for the model inside).

    Raises:
        UserError: There is no such model, the hub refuses it, or weights are not in safetensors.
    """
    if not (Path(model_name) / ADAPTER_CONFIG).is_file():
        return _load(model_name, model_name)
    folder = Path(model_name)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise UserError(
            f"`model_name` {model_name!r} holds an adapter without {ADAPTER_WEIGHTS}, and pickled "
            "weights are not read; save it with safe_serialization=True."
        )
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    base = _load(str(config.get("base_model_name_or_path")), model_name)
    # Here, because importing peft takes a second and most runs need none of it.
    from peft import PeftModel

    try:
        model = PeftModel.from_pretrained(base, model_name)
    except (OSError, ValueError, RuntimeError) as error:
        raise no_model(model_name, error) from error
    return cast(PreTrainedModel, model.eval().requires_grad_(False))


def load_plain_model(model_name: str) -> PreTrainedModel:
    """Load a causal LM whose weights are to be changed: an adapter is merged, in float32.

    Merging rounds the sums of weights, about one part in ten million.

    Args:
        model_name: As for `load_model`.

    Raises:
        UserError: As for `load_model`.
    """
    model = load_model(model_name)
    if isinstance(model, PreTrainedModel):
        return model
    _log.warning("The adapter in %s is merged into its base model in float32.", model_name)
    return model.merge_and_unload().requires_grad_(False)


def _load(model_name: str, given: str) -> PreTrainedModel:
    model = load_pretrained(
        AutoModelForCausalLM.from_pretrained,
        model_name,
        given=given,
        dtype=torch.float32,
        use_safetensors=True,
    )
    return model.eval().requires_grad_(False)
