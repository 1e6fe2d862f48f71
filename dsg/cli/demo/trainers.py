"""The Trainer of one stage of a composed run, with a CSV file and the run's W&B log."""

import contextlib
import csv
from pathlib import Path
from typing import Any, Self

import lightning
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from dsg.cli.demo.stages import DONE_FILE
from dsg.cli.tracking import (
    Unfailing,
    earlier_id,
    offline_runs,
    remove_folders,
    report_failure,
)
from dsg.io import write_atomically

# Says beside a stage's metrics.csv under what prefix the W&B run holds the same rows.
_PREFIX_FILE = ".tracked_as"


class Tracking:
    """One offline W&B run for all stages of a composed run; W&B can fail without harm.

    A context manager: the W&B run ends with it, also when the composed run is interrupted.

    Args:
        run_dir: Where the W&B files go; what an earlier attempt logged there in stages that it
            finished is taken over.
        config: What the run was started with.
    """

    def __init__(self, run_dir: Path, config: dict[str, Any]) -> None:
        self._run: Any = None
        earlier = offline_runs(run_dir)
        try:
            logger = WandbLogger(
                project="dynamic-sae-guardrails",
                name=run_dir.name,
                save_dir=str(run_dir),
                id=earlier_id(run_dir),
                job_type="demo",
                tags=["demo"],
            )
            self._run = logger.experiment
            self._run.config.update(config)
            if self._run.step == 0:  # otherwise it went on online, where everything is still there
                self._tell_again(run_dir)
                remove_folders(earlier)
        except Exception as error:  # whatever a tracker does, the run goes on without it
            report_failure(error)

    def loggers(self, folder: Path, prefix: str) -> list[Logger]:
        """`metrics.csv` in the stage's folder, and the W&B run with the stage's name as prefix."""
        loggers: list[Logger] = [CSVLogger(save_dir=str(folder), name="", version="")]
        write_atomically(folder / _PREFIX_FILE, prefix)
        if self._run is not None:
            loggers.append(Unfailing(WandbLogger(experiment=self._run), prefix))
        return loggers

    def _tell_again(self, run_dir: Path) -> None:
        """Log the rows of finished stages, in the order in which they were finished."""
        marks = sorted(run_dir.rglob(DONE_FILE), key=lambda mark: mark.stat().st_mtime_ns)
        for mark in marks:
            files = mark.parent.rglob("metrics.csv")
            for path in sorted(files, key=lambda file: file.stat().st_mtime_ns):
                prefix = (path.parent / _PREFIX_FILE).read_text(encoding="utf-8")
                logger = Unfailing(WandbLogger(experiment=self._run), prefix)
                with path.open(encoding="utf-8", newline="") as file:
                    for row in csv.DictReader(file):
                        values = {name: float(value) for name, value in row.items() if value}
                        logger.log_metrics(values, int(values.pop("step")))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._run is not None:
            with contextlib.suppress(Exception):  # the run's own files are complete
                self._run.finish(exit_code=0 if kind is None else 1)


def make_trainer(
    folder: Path, loggers: list[Logger], *, max_epochs: int = 1, **options: Any
) -> lightning.Trainer:
    """A single-process CPU trainer whose run directory is `folder`."""
    return lightning.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=1,
        max_epochs=max_epochs,
        logger=loggers,
        log_every_n_steps=10,
        use_distributed_sampler=False,
        num_sanity_val_steps=-1,
        enable_checkpointing=False,
        enable_model_summary=False,
        **options,
    )
