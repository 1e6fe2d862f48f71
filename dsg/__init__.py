"""Dynamic SAE Guardrails: make a language model forget with a sparse autoencoder, and test it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsg.build import build_guard
    from dsg.calibration import calibrate_threshold, wilson
    from dsg.errors import UserError
    from dsg.guard import Guard
    from dsg.sae import load_sae
    from dsg.selection import Selection, select_fisher_ratio, select_frequency
    from dsg.stack import GuardStack
    from dsg.statistics import FeatureStatistics, collect_statistics

__all__ = [
    "FeatureStatistics",
    "Guard",
    "GuardStack",
    "Selection",
    "UserError",
    "build_guard",
    "calibrate_threshold",
    "collect_statistics",
    "load_sae",
    "select_fisher_ratio",
    "select_frequency",
    "wilson",
]

# Resolved on first use, so that `dsg --help` need not import torch.
_HOMES = {
    "FeatureStatistics": "statistics",
    "Guard": "guard",
    "GuardStack": "stack",
    "Selection": "selection",
    "UserError": "errors",
    "build_guard": "build",
    "calibrate_threshold": "calibration",
    "collect_statistics": "statistics",
    "load_sae": "sae",
    "select_fisher_ratio": "selection",
    "select_frequency": "selection",
    "wilson": "calibration",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
