"""Finds the questions that a model knows for certain: the papers' filter, as a `validate` run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import lightning
from transformers import PreTrainedModel

from dsg.evaluation import Protocol as QuestionProtocol
from dsg.evaluation import QuestionBatch, score
from dsg.evaluation.benchmarks.multiple_choice.permutations import RULES, VARIANTS
from dsg.evaluation.benchmarks.multiple_choice.prompts import ChoiceRow, rows_digest
from dsg.evaluation.benchmarks.multiple_choice.question_filter import (
    FILTER_FILE,
    FilteredModel,
    filter_content,
    write_filter,
)
from dsg.intervals import wilson
from dsg.io import FOLDER, Journal, row, write_results
from dsg.lm import load_model, short_name, unwrap
from lightning_modules.parts.measuring import Labels
from lightning_modules.parts.precision import use_precision
from lightning_modules.parts.protocols import Reads, data_of


class FilterData(Protocol):
    """All questions, and batches that hold each variant of each of them exactly once.

    The id of variant v of question i is `VARIANTS * i + v`, the sets' questions counted one set
    after the other (`dsg.evaluation.benchmarks.multiple_choice.permutations`).
    """

    name: str
    protocol: QuestionProtocol
    sets: Mapping[str, Sequence[ChoiceRow]]

    def val_dataloader(self) -> Sequence[QuestionBatch | None]:
        """Batches of all variants; a rank without one in the last round yields None."""
        ...


class QuestionFilterModule(lightning.LightningModule):
    """Asks every question in all 24 orders of its choices, with and without the question.

    Writes `questions.json` to the run directory: the keys of the questions that each rule of
    `kept_rows` keeps, with the model's identity and the hash of the data.
    The outcomes of each batch are on disk as soon as it is finished: a run that was killed goes on
    after it with `--resume`, on any number of ranks.

    Args:
        model_name: Hugging Face folder or hub name of the model.
        experiment: The `experiment` column.
        model_label: The `model` column; None takes the model's name.
    """

    reads: Reads = "filter"

    def __init__(
        self,
        model_name: str,
        experiment: str = "question_filter",
        model_label: str | None = None,
    ) -> None:
        super().__init__()
        self.model_name = model_name
        self.experiment = experiment
        self.model_label = model_label or short_name(model_name)
        self.model: PreTrainedModel | None = None

    def configure_model(self) -> None:
        """Load the model, once."""
        if self.model is None:
            use_precision(self.trainer)
            self.model = load_model(self.model_name)

    def on_validation_start(self) -> None:
        """Read what an earlier attempt has found out.

        Raises:
            UserError: It had another model, protocol or other questions, or the data module offers
                no variants.
        """
        assert self.model is not None
        data = data_of(self.trainer, "name", "protocol", "sets")
        self.identity = FilteredModel.of(self.model_name, unwrap(self.model).config)
        settings = {
            "model": vars(self.identity),
            "protocol": data.protocol,
            "questions": {name: rows_digest(list(rows)) for name, rows in data.sets.items()},
        }
        folder = Path(self.trainer.default_root_dir) / FOLDER
        self.outcomes = Journal(folder, self.global_rank)
        self.outcomes.open(settings)
        self.trainer.strategy.barrier("outcomes are read")
        if self.trainer.is_global_zero:
            self.outcomes.begin(settings)

    def validation_step(
        self, batch: QuestionBatch | None, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Answer a batch, unless an earlier attempt has answered it."""
        del batch_idx, dataloader_idx
        if batch is None or all(id in self.outcomes.known for id in batch.ids.tolist()):
            return
        assert self.model is not None
        correct = score(self.model, batch)["correct"]
        self.outcomes.append(batch.ids.tolist(), [value == 1 for value in correct.tolist()])

    def on_validation_epoch_end(self) -> None:
        """Write the filter and the results."""
        self.trainer.strategy.barrier("outcomes are written")
        if self.trainer.is_global_zero:
            self._write()

    def _write(self) -> None:
        data: FilterData = data_of(self.trainer, "name", "protocol", "sets")
        correct = self.outcomes.read()
        expected = VARIANTS * sum(map(len, data.sets.values()))
        if set(correct) != set(range(expected)):
            raise RuntimeError(
                f"all {expected} variants must be answered, got {len(correct)}; run the whole "
                "validation (no limit_val_batches)."
            )
        content = filter_content(self.identity, data.protocol, data.sets, correct)
        folder = Path(self.trainer.default_root_dir)
        write_filter(folder / FILTER_FILE, content)
        rows = self._rows(data, content, correct)
        write_results(folder, rows)
        logged = {f"val/{row['domain']}/guard_off/{row['metric']}": row["value"] for row in rows}
        for logger in self.trainer.loggers:
            logger.log_metrics(logged)

    def _rows(
        self, data: FilterData, content: Mapping[str, Any], correct: Mapping[int, bool]
    ) -> list[dict[str, Any]]:
        labels = Labels(
            experiment=self.experiment, method="base", model=self.model_label, dataset=data.name
        )
        found, start = [], 0
        for domain, rows in data.sets.items():
            places = range(start, start + len(rows))
            start += len(rows)
            counts = {f"kept_{rule}": len(content["sets"][domain][rule]) for rule in RULES}
            # The first order is that of the data.
            counts["accuracy"] = sum(correct[VARIANTS * place] for place in places)
            found += [
                row(
                    **vars(labels),
                    guard="none",
                    domain=domain,
                    split="all",
                    protocol=data.protocol,
                    metric=metric,
                    **vars(wilson(count, len(rows))),
                )
                for metric, count in counts.items()
            ]
        return found
