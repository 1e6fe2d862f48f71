"""Scores validation or test batches with the guard off and on, logs and records the outcome."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lightning
import torch
from torch import Tensor, nn

from dsg.drift import DRIFT_COLUMNS, Drift, measure_drift
from dsg.errors import UserError
from dsg.evaluation import Measurement, PerSample, columns_of, score, summarise
from dsg.guard import Guard
from dsg.results import row, write_results
from dsg.scoring import (
    PASSAGE_COLUMNS,
    QUESTION_COLUMNS,
    ClozeBatch,
    Passage,
    PassageBatch,
    Question,
)
from dsg.stack import GuardStack
from lightning_modules.protocols import Split

AnyGuard = Guard | GuardStack
Values = dict[str, Tensor]

_ON_PASSAGES_ONLY = ("perplexity", "drift_cosine", "drift_norm_ratio")


@dataclass(frozen=True)
class Labels:
    """The columns of the results file that stay the same during a run.

    Attributes:
        experiment: Name of the experiment.
        method: `base`, `dsg`, `dsg_near`, `static_clamp`, `farrell`, `random` or `rmu`.
        mode: `test_time`, `train_time` or None.
        attack: `relearn_full` or `relearn_lora`, and what is not ordinary about it; or None.
        seed: Of the run.
        model: Short name of the model.
        dataset: Name of the data set.
    """

    experiment: str
    method: str
    model: str
    dataset: str
    mode: str | None = None
    attack: str | None = None
    seed: int | None = None


class Measurer:
    """Collects one evaluation at a time and keeps the rows of all of them.

    Attributes:
        rows: Result rows of all finished evaluations.
        baseline: Question values of the base model, for the alignment score.
        samples: Per-sample values of the last evaluation in the order of the sample ids, under
            the guard's state (`none`, `off`, `on`, or the name of a further guard) and the protocol
            (`cloze`, `passages`).
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.samples: dict[tuple[str, str], Values] = {}
        self.baseline: Values | None = None
        self._questions: Sequence[Question] = ()
        self._passages: Sequence[Passage] = ()
        self._split: Split = "validation"
        self._base_model: nn.Module | None = None
        self._further: dict[str, AnyGuard] = {}
        self._drift: Drift | None = None
        self._metrics: dict[tuple[str, tuple[str, ...]], PerSample] = {}

    def start(
        self,
        data: Any,
        split: Split,
        guard: AnyGuard | None,
        base_model: nn.Module | None = None,
        *,
        further: Mapping[str, AnyGuard] | None = None,
        drift: Drift | None = None,
    ) -> None:
        """Begin an evaluation.

        Args:
            data: An `EvaluationData`.
            split: Which questions and passages the batches will hold.
            guard: What will be attached.
            base_model: Scored as well, as the baseline of the alignment score. Without it the
                first unguarded values that were ever measured are the baseline.
            further: Guards to measure beside `guard`; each one's name is appended to the `method`
                of its rows.
            drift: What the model's activations are compared with; None measures no drift.
        """
        self._further = dict(further or {})
        self._drift = drift
        self._base_model = base_model
        self._questions, self._passages = data.questions(split), data.passages(split)
        self._split = split
        sizes = {QUESTION_COLUMNS: len(self._questions), PASSAGE_COLUMNS: len(self._passages)}
        self._metrics = {
            (state, columns): PerSample(columns, expected)
            for state in (*(("none",) if guard is None else ("off", "on")), *self._further)
            for columns, expected in sizes.items()
        }
        if base_model is not None:
            self._metrics["base", QUESTION_COLUMNS] = PerSample(
                QUESTION_COLUMNS, len(self._questions)
            )
        if drift is not None:
            self._metrics["drift", DRIFT_COLUMNS] = PerSample(DRIFT_COLUMNS, len(self._passages))

    def update(
        self, model: nn.Module, batch: ClozeBatch | PassageBatch | None, guard: AnyGuard | None
    ) -> None:
        """Score a batch: once without a guard, else with the guard off and on."""
        if batch is None:
            return
        columns = columns_of(batch)
        if self._base_model is not None and isinstance(batch, ClozeBatch):
            self._metrics["base", columns].update(batch.ids, score(self._base_model, batch))
        if self._drift is not None and isinstance(batch, PassageBatch):
            moved = self._drift.values(model, batch)
            self._metrics["drift", DRIFT_COLUMNS].update(batch.ids, moved)
        for name, other in self._further.items():
            self._metrics[name, columns].update(batch.ids, score(model, batch, other))
        if guard is None:
            self._metrics["none", columns].update(batch.ids, score(model, batch))
            return
        on = score(model, batch, guard)
        self._metrics["on", columns].update(batch.ids, on)
        if on["triggered"].any():
            off = score(model, batch)
        else:
            # An untriggered sequence is bit-identical to the plain model.
            unknown = torch.full_like(on["density"], torch.nan)
            off = {**on, "triggered": unknown, "density": unknown}
        self._metrics["off", columns].update(batch.ids, off)

    def finish(
        self,
        trainer: lightning.Trainer,
        labels: Labels,
        *,
        stage: Literal["val", "test"],
        epoch: float | None = None,
        request: int | None = None,
        forget_domains: Sequence[str] = ("forget",),
    ) -> None:
        """Gather all ranks' values, log the measurements and write the rows so far.

        Does nothing in the sanity check of a resumed run, whose rows tell the state before
        training already.
        """
        if trainer.sanity_checking and self.rows:
            return
        values = {key: metric.by_id() for key, metric in self._metrics.items()}
        known = ("none", "off", "on", *self._further)
        states = [state for state in known if (state, QUESTION_COLUMNS) in values]
        if ("base", QUESTION_COLUMNS) in values:
            self.baseline = values["base", QUESTION_COLUMNS]
        elif self.baseline is None:
            self.baseline = values[states[0], QUESTION_COLUMNS]
        logged: dict[str, float] = {}
        for state in states:
            question_values = values[state, QUESTION_COLUMNS]
            passage_values = values[state, PASSAGE_COLUMNS]
            self.samples[state, "cloze"] = question_values
            self.samples[state, "passages"] = passage_values
            measurements = summarise(
                self._questions,
                question_values,
                self._passages,
                passage_values,
                baseline=self.baseline,
                forget_domains=forget_domains,
            )
            if state in ("none", "off") and self._drift is not None:
                measurements += measure_drift(self._passages, values["drift", DRIFT_COLUMNS])
            logged |= {metric_key(found, stage, state): found.value for found in measurements}
            columns = vars(labels)
            if state in self._further:
                columns = {**columns, "method": f"{labels.method}_{state}"}
            self.rows += [
                row(
                    **columns,
                    **vars(measurement),
                    guard="on" if state in self._further else state,
                    epoch=epoch,
                    request=request,
                    split=self._split,
                )
                for measurement in measurements
            ]
        # Not through `LightningModule.log`, which would average over batches and ranks.
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=None if epoch is None else int(epoch))
        if trainer.is_global_zero:
            write_results(trainer.default_root_dir, self.rows)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs so that a resumed run writes the same results."""
        return {"rows": self.rows, "baseline": self.baseline}

    def load_state(self, state: dict[str, Any]) -> None:
        """Undo `state`."""
        self.rows, self.baseline = state["rows"], state["baseline"]


def metric_key(measurement: Measurement, stage: str, guard: str) -> str:
    """The logged name, `<stage>/<domain>/guard_<on|off>/<metric>`.

    A further guard's name takes the place of `on`. A protocol other than `cloze` follows the
    metric, where the metric has several.
    """
    suffix = measurement.protocol.removeprefix("cloze").removeprefix("_")
    if measurement.metric in _ON_PASSAGES_ONLY or not suffix:
        name = measurement.metric
    else:
        name = f"{measurement.metric}_{suffix}"
    state = "off" if guard == "none" else guard
    return f"{stage}/{measurement.domain}/guard_{state}/{name}"


def epochs_done(trainer: lightning.Trainer) -> int:
    """Epochs of training behind the evaluation that is running, 0 in the sanity check."""
    return 0 if trainer.sanity_checking else trainer.current_epoch + 1


def require_full_sanity_check(trainer: lightning.Trainer) -> None:
    """The sanity check is the evaluation before training, so it must be complete.

    Raises:
        UserError: It is not.
    """
    if trainer.num_sanity_val_steps != float("inf"):
        raise UserError(
            "`num_sanity_val_steps` must be -1, because the state before training is measured "
            f"then, got {trainer.num_sanity_val_steps}; set trainer.num_sanity_val_steps: -1."
        )
