"""Scores validation or test batches with the guard off and on, logs and records the outcome."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dsg.attacks import DRIFT_COLUMNS, Drift, measure_drift
from dsg.evaluation import (
    AnyBatch,
    AnyGuard,
    Item,
    Measurement,
    PassageBatch,
    PerSample,
    Prompt,
    PromptBatch,
    QuestionBatch,
    Values,
    columns_of,
    gather_objects,
    in_id_order,
    item_rows,
    named_twice,
    said_text,
    score,
    summarise,
    write_items,
)
from dsg.guard import GuardSettings
from dsg.io import row, write_results
from lightning_modules.parts.protocols import EVALUATION_DATA, Split, data_of
from lightning_modules.parts.run import Run

_KINDS = ("questions", "passages", "prompts")
_KIND_OF: dict[type, str] = {
    QuestionBatch: "questions",
    PassageBatch: "passages",
    PromptBatch: "prompts",
}
_ON_PASSAGES_ONLY = ("perplexity", "drift_cosine", "drift_norm_ratio")


class Measurer:
    """Collects one evaluation at a time and keeps the rows of all of them.

    Attributes:
        rows: Result rows of all finished evaluations.
        baseline: Question values of the base model, for the alignment score.
        items: What the last evaluation was about, in the order of the ids.
        samples: Per-sample values of the last evaluation in the same order, under the guard's state
            (`none`, `off`, `on`, or the name of a further guard) and the kind of item.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.items: dict[str, list[Any]] = {kind: [] for kind in _KINDS}
        self.samples: dict[tuple[str, str], Values] = {}
        self.baseline: Values | None = None
        self._data: Any = None
        self._split: Split = "validation"
        self._guard: AnyGuard | None = None
        self._base_model: nn.Module | None = None
        self._further: dict[str, AnyGuard] = {}
        self._drift: Drift | None = None
        self._metrics: dict[tuple[str, str], PerSample] = {}
        self._drift_metric: PerSample | None = None
        self._generated: dict[str, list[tuple[Tensor, Tensor]]] = {}

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
            split: Which questions, passages and prompts the batches will hold.
            guard: Scored as well as the model without it; None scores the model once.
            base_model: Scored as well, as the baseline of the alignment score. Without it the
                first unguarded values that were ever measured are the baseline.
            further: Guards to measure beside `guard`; each one's name is appended to the `method`
                of its rows.
            drift: What the model's activations are compared with; None measures no drift.
        """
        self._data, self._split = data, split
        self._guard, self._base_model = guard, base_model
        self._further = dict(further or {})
        self._drift = drift
        prompts: Sequence[Prompt] = data.prompts(split) if hasattr(data, "prompts") else ()
        items: tuple[Sequence[Item], ...] = (data.questions(split), data.passages(split), prompts)
        ordered = map(in_id_order, items)
        self.items = dict(zip(_KINDS, ordered, strict=True))
        states = (*(("none",) if guard is None else ("off", "on")), *self._further)
        self._metrics = {
            (state, kind): PerSample(columns_of(some), len(some))
            for state in states
            for kind, some in self.items.items()
        }
        self._generated = {state: [] for state in states}
        if base_model is not None:
            questions = self.items["questions"]
            self._metrics["base", "questions"] = PerSample(columns_of(questions), len(questions))
        if drift is not None:
            self._drift_metric = PerSample(DRIFT_COLUMNS, len(self.items["passages"]))

    def update(self, model: nn.Module, batch: AnyBatch | None) -> None:
        """Score a batch: once without a guard, else with the guard off and on."""
        if batch is None:
            return
        if self._base_model is not None and isinstance(batch, QuestionBatch):
            self._record("base", batch, score(self._base_model, batch))
        if self._drift is not None and isinstance(batch, PassageBatch):
            assert self._drift_metric is not None
            self._drift_metric.update(batch.ids, self._drift.values(model, batch))
        for name, other in self._further.items():
            self._record(name, batch, score(model, batch, other))
        if self._guard is None:
            self._record("none", batch, score(model, batch))
            return
        on = score(model, batch, self._guard)
        self._record("on", batch, on)
        if on["triggered"].any():
            off = score(model, batch)
        else:
            # An untriggered sequence is bit-identical to the plain model.
            unknown = torch.full_like(on["density"], torch.nan)
            off = {**on, "triggered": unknown, "density": unknown}
        self._record("off", batch, off)

    def _record(self, state: str, batch: AnyBatch, values: Values) -> None:
        self._metrics[state, _KIND_OF[type(batch)]].update(batch.ids, values)
        if isinstance(batch, PromptBatch):
            self._generated[state].append((batch.ids.cpu(), values["generated"].cpu()))

    def finish(
        self,
        trainer: lightning.Trainer,
        labels: Mapping[str, Any],
        *,
        stage: Literal["val", "test"],
        epoch: float | None = None,
        request: int | None = None,
        forget_domains: Sequence[str] = ("forget",),
    ) -> dict[str, float]:
        """Gather all ranks' values and write the rows so far; the numbers to log.

        A domain that is the whole of a pool is logged under the pool's name alone.

        Does nothing in the sanity check of a resumed run, whose rows tell the state before
        training already.
        """
        if trainer.sanity_checking and self.rows:
            return {}
        values = {key: metric.by_id() for key, metric in self._metrics.items()}
        states = ("none",) if self._guard is None else ("off", "on")
        states += tuple(self._further)
        if ("base", "questions") in values:
            self.baseline = values["base", "questions"]
        elif self.baseline is None:
            self.baseline = values[states[0], "questions"]
        logged: dict[str, float] = {}
        twice = named_twice((i.domain, i.pool) for items in self.items.values() for i in items)
        for state in states:
            samples = {kind: values[state, kind] for kind in _KINDS}
            self.samples |= {(state, kind): sample for kind, sample in samples.items()}
            plain = values[states[0], "prompts"].get("nll")  # none and off come first
            measurements = self._measure(samples, plain, forget_domains)
            if state in ("none", "off") and self._drift_metric is not None:
                moved = self._drift_metric.by_id()
                measurements += measure_drift(self.items["passages"], moved)
            logged |= {
                metric_key(measurement, stage, state): measurement.value
                for measurement in measurements
                if measurement.domain not in twice
            }
            further = {"method": f"{labels['method']}_{state}"} if state in self._further else {}
            self.rows += [
                row(
                    **{**labels, **further},
                    **vars(measurement),
                    guard="on" if state in self._further else state,
                    epoch=epoch,
                    request=request,
                    split=self._split,
                )
                for measurement in measurements
            ]
        if epoch is not None:
            logged["epoch"] = float(epoch)
        if trainer.is_global_zero:
            write_results(trainer.default_root_dir, self.rows)
        return logged

    def _measure(
        self, samples: dict[str, Values], own_nll: Tensor | None, forget_domains: Sequence[str]
    ) -> list[Measurement]:
        measurements = summarise(
            self.items["questions"],
            samples["questions"],
            self.items["passages"],
            samples["passages"],
            baseline=self.baseline,
            forget_domains=forget_domains,
            prompts=self.items["prompts"],
            prompt_values=samples["prompts"],
            own_nll=own_nll,
        )
        if hasattr(self._data, "measure"):
            measurements += self._data.measure(self._split, samples)
        return measurements

    def write_items(self, trainer: lightning.Trainer) -> None:
        """Write the values of every item of the last evaluation, and what was generated."""
        rows = []
        for (state, kind), values in self.samples.items():
            texts = self._texts(state) if kind == "prompts" else None
            rows += item_rows(state, kind, self.items[kind], values, texts)
        if trainer.is_global_zero:
            write_items(trainer.default_root_dir, rows)

    def _texts(self, state: str) -> list[str]:
        """What was generated in the last evaluation, in the order of the prompts' ids."""
        by_id = {
            int(prompt_id): ids
            for part in gather_objects(self._generated[state])
            for prompt_ids, generated in part
            for prompt_id, ids in zip(prompt_ids, generated, strict=True)
        }
        tokenizer = self._data.tokenizer
        return [
            said_text(tokenizer, prompt.stop, by_id[prompt.id].tolist())
            for prompt in self.items["prompts"]
        ]


class Measured(Run):
    """A run that scores the questions, passages and prompts of its data module."""

    def __init__(self, model_name: str, guard: GuardSettings | None = None, **labels: Any) -> None:
        super().__init__(model_name, guard, **labels)
        self.measurer = Measurer()
        self.base_model: PreTrainedModel | None = None

    def on_validation_start(self) -> None:
        """Begin an evaluation on the split that the data module validates on."""
        self.begin(data_of(self.trainer, *EVALUATION_DATA).val_split)

    def validation_step(
        self, batch: AnyBatch | None, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Score a batch."""
        del batch_idx, dataloader_idx
        self.measurer.update(self.model, batch)

    def on_validation_epoch_end(self) -> None:
        """Log and write the results."""
        self.finish("val")

    def begin(self, split: Split, **options: Any) -> None:
        """Begin an evaluation of a split; for the options see `Measurer.start`."""
        data = data_of(self.trainer, *EVALUATION_DATA)
        self.measurer.start(data, split, **{"guard": self.guard, **options})

    def finish(self, stage: Literal["val", "test"], step: int = 0, **options: Any) -> None:
        """Log and write the results of an evaluation; for the options see `Measurer.finish`."""
        logged = self.measurer.finish(self.trainer, self.labels(), stage=stage, **options)
        if logged:
            self.log_numbers(logged, step)


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
