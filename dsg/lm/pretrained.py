"""Loads language models whose every weight comes from a file; libraries draw what is missing."""

import logging
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, PreTrainedModel

from dsg.errors import UserError
from dsg.io import first_line, load_pretrained, no_model, note_revision, read_json, short_name

__all__ = ["load_model", "load_plain_model", "short_name"]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

# Buffers that old versions of Transformers saved, and that no list of its own names.
_REMNANTS = re.compile(r"\.masked_bias$")
_SHOWN = 3

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
    folder = Path(model_name)
    has_adapter = (folder / ADAPTER_CONFIG).is_file()
    if has_adapter and not (folder / ADAPTER_WEIGHTS).is_file():
        raise UserError(
            f"`model_name` {model_name!r} holds an adapter without {ADAPTER_WEIGHTS}, and pickled "
            "weights are not read; save it with safe_serialization=True."
        )
    base = adapter_base(folder) if has_adapter else model_name
    model = load_causal_lm(base, model_name, dtype=torch.float32).eval()
    model = _with_adapter(model, folder) if has_adapter else model
    return cast(PreTrainedModel, model.requires_grad_(False))


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


def load_config(model_name: str) -> Any:
    """A model's Transformers configuration; for an adapter that of the model it belongs to.

    Args:
        model_name: Hugging Face folder or hub name, perhaps with `@revision`.

    Raises:
        UserError: There is none, or the hub refuses it.
    """
    folder = Path(model_name)
    if (folder / ADAPTER_CONFIG).is_file():
        return load_config(adapter_base(folder))
    config = load_pretrained(AutoConfig.from_pretrained, model_name, " with a config.json")
    note_revision(config, model_name)
    return config


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


def load_causal_lm(model_name: str, given: str | None = None, **options: Any) -> Any:
    """A causal LM with exactly the weights of its safetensors.

    Tied weights may be left out of a file, and so may buffers that the model computes.

    Args:
        model_name: Hugging Face folder or hub name, perhaps with `@revision`.
        given: The name that the user gave, where it led to this one.
        options: Passed to `from_pretrained`, such as `dtype`.

    Raises:
        UserError: There is no such model, the hub refuses it, its weights are damaged or not in
            safetensors, or they are those of another architecture or size.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    name = given or model_name
    try:
        model, info = load_pretrained(
            AutoModelForCausalLM.from_pretrained,
            model_name,
            given=given,
            use_safetensors=True,
            output_loading_info=True,
            # They are refused below, by name, and not after a table of a page.
            ignore_mismatched_sizes=True,
            **options,
        )
    except SafetensorError as error:
        raise _damaged(name, error) from error
    mismatched = [
        f"{key} of shape {list(saved)} for {list(wanted)}"
        for key, saved, wanted in sorted(info["mismatched_keys"])
    ]
    unexpected = [key for key in info["unexpected_keys"] if not _REMNANTS.search(key)]
    _check_weights(name, info["missing_keys"], unexpected, mismatched)
    note_revision(model.config, model_name)
    return model


def _with_adapter(base: PreTrainedModel, folder: Path) -> Any:
    """A `PeftModel` with exactly the weights of its folder, in evaluation mode."""
    # Here, because importing peft takes a second and most runs need none of it.
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    name = str(folder)
    try:
        model = PeftModel.from_pretrained(base, name)
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            saved = set(file.keys())
    except SafetensorError as error:
        raise _damaged(name, error) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise no_model(name, error) from error
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    # Embeddings are saved beside an adapter that does not change them.
    unexpected = [key for key in saved - wanted if "lora_" in key]
    _check_weights(name, wanted - saved, unexpected)
    return model.eval()


def _check_weights(
    name: str,
    missing: Collection[str],
    unexpected: Collection[str],
    mismatched: Collection[str] = (),
) -> None:
    wrong = {"lack": missing, "add": unexpected, "have": mismatched}
    faults = [f"{verb} {_some(keys)}" for verb, keys in wrong.items() if keys]
    if faults:
        raise UserError(
            f"`model_name` must be a model whose weights fit its configuration, got {name!r}, "
            f"whose weights {' and '.join(faults)}; download or save it again."
        )


def _some(keys: Collection[str]) -> str:
    shown = ", ".join(sorted(keys)[:_SHOWN])
    return shown if len(keys) <= _SHOWN else f"{shown} and {len(keys) - _SHOWN} more"


def _damaged(name: str, error: BaseException) -> UserError:
    return UserError(
        f"`model_name` must be a model whose files are whole, got {name!r} with damaged weights "
        f"({first_line(error)}); download or save it again."
    )
