"""What must be settled in the process before torch is imported."""

import contextlib
import os
import sys


def prepare_environment() -> None:
    """Set the import path, and environment variables; whatever the user has set stays.

    `OMP_NUM_THREADS` is set because Lightning would otherwise give each rank of a distributed run
    its own share of the cores, and another number of threads adds floats in another order: results
    would depend on the number of ranks. `WANDB_MODE=online` is how a user uploads.

    Classes of one's own are found in the working directory, behind everything that is installed: a
    `datasets.py` there must not stand in for the library.
    """
    with contextlib.suppress(FileNotFoundError):  # the working directory is gone
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
    defaults = {
        "OMP_NUM_THREADS": str(min(4, available_cpus())),
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_CONSOLE": "off",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    if os.environ.get("WANDB_MODE") == "online":
        del defaults["WANDB_SILENT"]  # an uploaded run says where it can be seen
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def available_cpus() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # counts what a container or batch system grants
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
