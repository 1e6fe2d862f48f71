"""Where a run leaves a changed model: an ordinary Hugging Face folder in the run directory."""

from pathlib import Path

import lightning
from transformers import PreTrainedModel

MODEL_FOLDER = "model"


def save_model_folder(trainer: lightning.Trainer, model: PreTrainedModel) -> Path | None:
    """Write `model`, and the data module's tokenizer if it has one, on rank zero.

    Args:
        trainer: The running trainer; its `default_root_dir` is the run directory.
        model: The model to save.

    Returns:
        The folder `<run directory>/model`, or `None` on the other ranks.
    """
    if not trainer.is_global_zero:
        return None
    folder = Path(trainer.default_root_dir) / MODEL_FOLDER
    model.save_pretrained(folder)
    tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder
