"""What a checkpoint needs beside weights, so that a resumed run ends as if never interrupted."""

import random
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch

from dsg.errors import UserError


def rng_states() -> dict[str, Any]:
    """The states of all random number generators, made of plain values and tensors."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),  # type: ignore[union-attr]
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_rng(states: Mapping[str, Any]) -> None:
    """Undo `rng_states`; generators of a GPU that is missing now are left out."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.device_count() == len(states["cuda"]):
        torch.cuda.set_rng_state_all(states["cuda"])


def described(part: object) -> list[Any]:
    """A method by its class and its settings, in plain values."""
    kind, plain = type(part), (str, int, float, type(None))
    settings = {name: value for name, value in vars(part).items() if isinstance(value, plain)}
    return [f"{kind.__module__}.{kind.__qualname__}", settings]


def check_same_run(
    checkpoint: Mapping[str, Any], settings: Mapping[str, Any], trained: Collection[str]
) -> None:
    """Refuses a checkpoint of another run.

    Args:
        checkpoint: What was saved; its entry `settings` holds those of its run.
        settings: What decides this run, in plain values.
        trained: Names of the weights that this run trains.

    Raises:
        UserError: Settings or trained weights differ.
    """
    saved = checkpoint.get("settings")
    if not isinstance(saved, Mapping):
        raise UserError(
            "the checkpoint must have been written by this kind of run, but it says nothing of its "
            "settings; give the checkpoint of this run or start again with --overwrite."
        )
    for name in sorted({*saved, *settings}):
        if saved.get(name) != settings.get(name):
            raise UserError(
                f"the checkpoint must be of this run, but `{name}` was {saved.get(name)!r} there "
                f"and is {settings.get(name)!r} here; give the same settings or start again with "
                "--overwrite."
            )
    if set(checkpoint["state_dict"]) != set(trained):
        raise UserError(
            f"the checkpoint must hold the {len(trained)} weights that this run trains, got "
            f"{len(checkpoint['state_dict'])} others or some of them; start again with --overwrite."
        )
