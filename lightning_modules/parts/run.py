"""What every run of a model has: the model, its guard, and the labels of its results."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import lightning
from torch import nn

from dsg.guard import Guard, GuardSettings
from dsg.io import FOLDER, Journal, read_run_facts, write_run_facts
from dsg.lm import load_model, short_name, unwrap
from lightning_modules.parts.guards import describe, make_guard, method_of
from lightning_modules.parts.precision import use_precision
from lightning_modules.parts.protocols import Reads, data_of


class Run(lightning.LightningModule):
    """A run of one model, with or without a guard.

    Args:
        model_name: Hugging Face folder or hub name of the model.
        guard: How to make or load the guard, or None to take the model as it is.
        method: The `method` column; None takes the guard's, or `base`.
        experiment: The `experiment` column; None takes the kind of run.
        seed: The `seed` column.
        model_label: The `model` column; None takes the model's name.
    """

    kind: ClassVar[str]
    """The `experiment` column of a run that is not given another one."""
    reads: Reads = "evaluate"
    """What the data module gives this kind of run."""
    model: nn.Module
    """The model, None before `configure_model`."""

    def __init__(
        self,
        model_name: str,
        guard: GuardSettings | None = None,
        method: str | None = None,
        experiment: str | None = None,
        seed: int | None = None,
        model_label: str | None = None,
    ) -> None:
        super().__init__()
        self.model_name = model_name
        self.guard_settings = guard
        self.method = method or ""
        self.experiment = experiment or self.kind
        self.seed = seed
        self.model_label = model_label or short_name(model_name)
        self.register_module("model", None)
        self.guard: Guard | None = None

    def configure_model(self) -> None:
        """Load the model and make the guard, once."""
        if self.model is not None:
            return
        use_precision(self.trainer)
        self.model = model = load_model(self.model_name)
        if self.guard_settings is not None:
            self.guard = make_guard(self.guard_settings, model, self.trainer)
        self.method = self.method or method_of(self.guard)

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return Path(self.trainer.default_root_dir)

    def labels(self) -> dict[str, Any]:
        """The columns of the results that stay the same during a run."""
        return {
            "experiment": self.experiment,
            "method": self.method,
            "model": self.model_label,
            "dataset": data_of(self.trainer, "name").name,
            "seed": self.seed,
        }

    def add_facts(self, facts: Mapping[str, Any]) -> None:
        """Write facts to `run.json`, beside those that it holds; on rank zero."""
        if self.trainer.is_global_zero:
            write_run_facts(self.run_dir, {**read_run_facts(self.run_dir), **facts})

    def describe(self) -> dict[str, Any]:
        """The origin and the settings of the model and its guard, for `run.json`."""
        return describe(unwrap(self.model), self.guard)

    def log_numbers(self, numbers: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers of the whole data set, which `log` would average over batches and ranks."""
        for logger in self.trainer.loggers:
            logger.log_metrics(dict(numbers), step)

    def open_journal(self, settings: Mapping[str, Any]) -> Journal:
        """The outcomes that an earlier attempt has left in the run directory.

        Args:
            settings: What decides the outcomes, in plain values.

        Raises:
            UserError: The earlier attempt had other settings.
        """
        journal = Journal(self.run_dir / FOLDER, self.global_rank)
        journal.open(settings)
        self.trainer.strategy.barrier("the journal is read")
        if self.trainer.is_global_zero:
            journal.begin(settings)
        return journal
