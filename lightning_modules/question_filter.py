"""Finds the questions that a model knows for certain: the papers' filter, as a `validate` run."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

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
from dsg.io import row, write_results
from dsg.lm import unwrap
from lightning_modules.parts.protocols import data_of
from lightning_modules.parts.run import Run


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


class QuestionFilterModule(Run):
    """Asks every question in all 24 orders of its choices, with and without the question.

    Writes `questions.json` to the run directory: the keys of the questions that each rule of
    `kept_rows` keeps, with the model's identity and the hash of the data.
    The outcomes of each batch are on disk as soon as it is finished: a run that was killed goes on
    after it with `--resume`, on any number of ranks.

    Args:
        model_name: Hugging Face folder or hub name of the model.
        labels: Those of `Run`.
    """

    kind = "question_filter"
    reads = "filter"

    def __init__(self, model_name: str, **labels: Any) -> None:
        super().__init__(model_name, guard=None, method="base", **labels)

    def on_validation_start(self) -> None:
        """Read the answers of an earlier attempt.

        Raises:
            UserError: It had another model, protocol or other questions, or the data module offers
                no variants.
        """
        data = data_of(self.trainer, "name", "protocol", "sets")
        self.identity = FilteredModel.of(self.model_name, unwrap(self.model).config)
        settings = {
            "model": vars(self.identity),
            "protocol": data.protocol,
            "questions": {name: rows_digest(list(rows)) for name, rows in data.sets.items()},
        }
        self.outcomes = self.open_journal(settings)

    def validation_step(
        self, batch: QuestionBatch | None, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Answer a batch, unless an earlier attempt has answered it."""
        del batch_idx, dataloader_idx
        if batch is None or all(id in self.outcomes.known for id in batch.ids.tolist()):
            return
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
        write_filter(self.run_dir / FILTER_FILE, content)
        rows = self._rows(data, content, correct)
        write_results(self.run_dir, rows)
        self.log_numbers(
            {f"val/{row['domain']}/guard_off/{row['metric']}": row["value"] for row in rows}
        )

    def _rows(
        self, data: FilterData, content: Mapping[str, Any], correct: Mapping[int, bool]
    ) -> list[dict[str, Any]]:
        measured, start = [], 0
        for domain, rows in data.sets.items():
            places = range(start, start + len(rows))
            start += len(rows)
            counts = {f"kept_{rule}": len(content["sets"][domain][rule]) for rule in RULES}
            # The first order is that of the data.
            counts["accuracy"] = sum(correct[VARIANTS * place] for place in places)
            measured += [
                row(
                    **self.labels(),
                    guard="none",
                    domain=domain,
                    split="all",
                    protocol=data.protocol,
                    metric=metric,
                    **vars(wilson(count, len(rows))),
                )
                for metric, count in counts.items()
            ]
        return measured
