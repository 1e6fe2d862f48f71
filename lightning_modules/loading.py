"""Loads language models for the modules of this package."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from dsg.errors import UserError


def load_model(model_name: str) -> PreTrainedModel:
    """Load a causal LM in float32, in evaluation mode and with all weights frozen.

    Args:
        model_name: Hugging Face folder or hub name.

    Raises:
        UserError: There is no such model.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"`model_name` must be a Hugging Face folder or hub name, got {model_name!r} "
            f"({reason}); check the spelling and that you may read it."
        ) from error
    return model.eval().requires_grad_(False)


def short_name(model_name: str) -> str:
    """How the results call a model: hub names stay, folders lose their place on this machine."""
    return Path(model_name).name if Path(model_name).exists() else model_name
