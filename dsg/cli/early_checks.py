"""What of a run can be refused before a model is loaded or a text is read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from dsg.errors import UserError, did_you_mean
from dsg.guard import GuardSettings
from dsg.io import check_dataset, check_folder
from dsg.lm import ADAPTER_CONFIG, adapter_base
from dsg.sae import check_sae_name

_COUNTS = ("batch_size", "train_batch_size", "max_length", "max_texts")


def check_inputs(module: Any, data: Any) -> None:
    """Refuse what can be seen from names and settings alone.

    Args:
        module: What runs; its model, and the settings of its guard, if it has such attributes.
        data: Its data module; its model's name and its corpora, if it has such attributes.

    Raises:
        UserError: A folder or a file is missing, model and data belong to different models, or
            a guard is to be made from text that is not given.
    """
    for part in (module, data):
        for name in ("model_name", "base_model_name"):
            if value := getattr(part, name, None):
                check_folder(name, value)
        for name in _COUNTS:
            value = getattr(part, name, None)
            if isinstance(value, int) and value < 1:
                raise UserError(f"`{name}` must be at least 1, got {value}; raise it.")
    _check_same_model(module, data)
    settings = getattr(module, "guard_settings", None)
    if settings is not None:
        _check_guard(settings)
        if settings.artifact is None and hasattr(data, "corpora"):
            _check_corpora(settings, data.corpora)


def _check_same_model(module: Any, data: Any) -> None:
    """The data's model is that of the run, or the one that it was changed from."""
    name, given = getattr(module, "model_name", None), getattr(data, "model_name", None)
    if name is None or given is None:
        return
    allowed = {name, getattr(module, "base_model_name", None)}
    if (Path(name) / ADAPTER_CONFIG).is_file():
        allowed.add(adapter_base(Path(name)))
    if given not in allowed:
        raise UserError(
            f"`model_name` of the data must be that of the model, {name!r}, whose tokenizer and "
            f"window it is for, got {given!r}; leave it out, or name the model that was changed "
            "as `base_model_name` of the model."
        )


def _check_guard(settings: GuardSettings) -> None:
    if settings.artifact is not None:
        if not Path(settings.artifact).is_dir():
            raise UserError(
                f"`artifact` must be the folder of a saved guard, got {settings.artifact!r}, which "
                "is none; correct the path."
            )
    else:
        check_sae_name(settings.sae, settings.sae_id)


def _check_corpora(settings: GuardSettings, corpora: Any) -> None:
    if corpora is None:
        raise UserError(
            "`corpora` must name the texts to make a guard from, got none; give `forget` and "
            "`retain` there, or load a saved guard (`artifact`)."
        )
    given = corpora.settings
    needed = {
        "retain": True,
        "forget": settings.parts().selection != "ids",
        "near": settings.method == "dsg_near",
    }
    for kind in needed:
        sources = getattr(given, kind)
        if needed[kind] and not sources:
            raise UserError(
                f"`{kind}` of the corpora must hold text for a guard of the method "
                f"{settings.method!r}, got none; give some."
            )
        for corpus in sources:
            check_dataset(corpus.source)


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
    allowed = _STRATEGIES if class_path is None else _CLASSES
    name = str(strategy) if class_path is None else class_path.rpartition(".")[2]
    if name not in allowed:
        given = strategy if class_path is None else class_path
        advice = did_you_mean(name, allowed) or "; leave it out."
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
        refusal = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"`trainer` cannot be made as it is set ({refusal}); mend it.") from error
