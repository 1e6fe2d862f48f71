"""Keeps libraries from talking over what a command has to say."""

import contextlib
import logging
import warnings

from dsg.io import is_rank_zero

_MESSAGES = (
    # Data loaders here read from memory; workers would only slow them down.
    r".*does not have many workers which may be a bottleneck",
    # The run directory holds the marker, and a resumed run its checkpoints.
    r".*Experiment logs directory .* exists and is not empty",
    r".*Checkpoint directory .* exists and is not empty",
    r".*smaller than the logging interval",
    # Frozen models are in evaluation mode on purpose, and small ones train without dropout.
    r".*module\(s\) in eval mode at the start of training",
    # Lightning's and PEFT's own use of other libraries.
    r".*is_gradient_checkpointing. is deprecated",
    r".*LeafSpec.* is deprecated",
)


def calm_libraries() -> None:
    """Silence what Lightning and W&B say on every run; warnings that tell something stay."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _MESSAGES:
        warnings.filterwarnings("ignore", message=message)
    import transformers

    # Bars for reading a folder; downloads keep theirs.
    transformers.utils.logging.disable_progress_bar()
    # A run needs no tracker, and where W&B does not work its logger says so.
    if is_rank_zero():
        with contextlib.suppress(Exception):
            import wandb

            # Lightning passes an option that W&B has retired, and W&B complains about it before it
            # has read WANDB_SILENT, unless it is set up beforehand.
            wandb.setup()
