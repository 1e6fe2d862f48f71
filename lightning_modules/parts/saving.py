"""Saves the model that a run has changed."""

from pathlib import Path
from typing import Any, cast

import lightning
from torch import nn
from transformers import PreTrainedModel

from dsg.lm import check_weights

MODEL_FOLDER = "model"


def save_model_folder(trainer: lightning.Trainer, model: nn.Module) -> Path | None:
    """Write `model`, and the data module's tokenizer if it has one, on rank zero.

    Of a PEFT model the adapter is written, unmerged, with the name of its base model.

    Args:
        trainer: The running trainer; its `default_root_dir` is the run directory.
        model: The model to save.

    Returns:
        The folder `<run directory>/model`, or `None` on the other ranks.

    Raises:
        UserError: A weight is not finite: the last step was one too many.
    """
    if not trainer.is_global_zero:
        return None
    check_weights(model)
    folder = Path(trainer.default_root_dir) / MODEL_FOLDER
    # By default PEFT asks the hub whether the base model's vocabulary has grown.
    options = {} if isinstance(model, PreTrainedModel) else {"save_embedding_layers": False}
    cast(Any, model).save_pretrained(folder, **options)
    tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder
