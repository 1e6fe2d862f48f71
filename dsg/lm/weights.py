"""Loads models whose every weight comes from a file; the libraries would draw what is missing."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from dsg.errors import UserError
from dsg.io import first_line, load_pretrained, no_model, note_revision

ADAPTER_WEIGHTS = "adapter_model.safetensors"

# Buffers that old versions of Transformers saved, and that no list of its own names.
_REMNANTS = re.compile(r"\.masked_bias$")
_SHOWN = 3


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


def load_adapter(base: Any, folder: str | Path) -> Any:
    """A `PeftModel` with exactly the weights of its folder, in evaluation mode.

    Args:
        base: The model that it adapts.
        folder: Holds the adapter in safetensors.

    Raises:
        UserError: The adapter is damaged, or it fits another model.
    """
    # Here, because importing peft takes a second and most runs need none of it.
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    name = str(folder)
    try:
        model = PeftModel.from_pretrained(base, name)
        with safe_open(Path(folder) / ADAPTER_WEIGHTS, framework="pt") as file:
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
    found = [f"{verb} {_some(keys)}" for verb, keys in wrong.items() if keys]
    if found:
        raise UserError(
            f"`model_name` must be a model whose weights fit its configuration, got {name!r}, "
            f"whose weights {' and '.join(found)}; download or save it again."
        )


def _some(keys: Collection[str]) -> str:
    shown = ", ".join(sorted(keys)[:_SHOWN])
    return shown if len(keys) <= _SHOWN else f"{shown} and {len(keys) - _SHOWN} more"


def _damaged(name: str, error: BaseException) -> UserError:
    return UserError(
        f"`model_name` must be a model whose files are whole, got {name!r} with damaged weights "
        f"({first_line(error)}); download or save it again."
    )
