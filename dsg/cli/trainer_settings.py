"""What of Lightning's Trainer a run may use, and its refusals in one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from dsg.errors import UserError, did_you_mean

# Others shard or move weights, which a guard's hooks and the exact sums over ranks do not follow.
_STRATEGIES = (
    "auto",
    "ddp",
    "ddp_find_unused_parameters_false",
    "ddp_find_unused_parameters_true",
    "ddp_spawn",
    "ddp_fork",
    "ddp_notebook",
)
_CLASSES = ("DDPStrategy", "SingleDeviceStrategy")


def check_strategy(strategy: Any) -> None:
    """Refuses a strategy under which no run of this package has been measured.

    Args:
        strategy: `trainer.strategy` of a configuration: a name, or a class path with `init_args`.

    Raises:
        UserError: It is none of the known ones.
    """
    class_path = getattr(strategy, "class_path", None)
    known = _STRATEGIES if class_path is None else _CLASSES
    name = str(strategy) if class_path is None else class_path.rpartition(".")[2]
    if name not in known:
        given = strategy if class_path is None else class_path
        advice = did_you_mean(name, known) or "; leave it out."
        raise UserError(
            f"`trainer.strategy` must be one of {', '.join(_STRATEGIES)}, or a mapping with the "
            f"class path of {' or '.join(_CLASSES)}, got {given!r}{advice}"
        )


@contextmanager
def trainer_refusals() -> Iterator[None]:
    """Says that it was the Trainer's settings which Lightning refused.

    Raises:
        UserError: It refused one.
    """
    try:
        yield
    except (MisconfigurationException, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        said = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"`trainer` cannot be made as it is set ({said}); mend it.") from error
