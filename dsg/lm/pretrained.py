"""Loads language models for the modules of this package."""

import logging
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedModel

from dsg.errors import UserError
from dsg.io import read_json, short_name
from dsg.lm.weights import ADAPTER_WEIGHTS, load_adapter, load_causal_lm

__all__ = ["load_model", "load_plain_model", "short_name"]

ADAPTER_CONFIG = "adapter_config.json"

_log = logging.getLogger(__name__)


def load_model(model_name: str) -> PreTrainedModel:
    """Load a causal LM in float32, in evaluation mode and with all weights frozen.

    Args:
        model_name: Hugging Face folder or hub name, perhaps with `@revision`. A folder with a PEFT
            adapter gives the model that the adapter names as its base, with the adapter on and
            unmerged (a `PeftModel`, which stands in for the model inside).

    Raises:
        UserError: There is no such model, the hub refuses it, or its weights are not in
            safetensors, damaged, or not all of the weights that the model has.
    """
    if not (Path(model_name) / ADAPTER_CONFIG).is_file():
        return _load(model_name, model_name)
    folder = Path(model_name)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise UserError(
            f"`model_name` {model_name!r} holds an adapter without {ADAPTER_WEIGHTS}, and pickled "
            "weights are not read; save it with safe_serialization=True."
        )
    base = _load(adapter_base(folder), model_name)
    return cast(PreTrainedModel, load_adapter(base, folder).requires_grad_(False))


def adapter_base(folder: Path) -> str:
    """Name of the model that an adapter belongs to.

    Raises:
        UserError: Its configuration does not tell.
    """
    content = read_json(folder / ADAPTER_CONFIG)
    base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    if not isinstance(base, str):
        raise UserError(
            f"{folder / ADAPTER_CONFIG} must name the model in `base_model_name_or_path`, got "
            f"{base!r}; save the adapter again."
        )
    return base


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
    model = load_causal_lm(model_name, given, dtype=torch.float32)
    return model.eval().requires_grad_(False)
