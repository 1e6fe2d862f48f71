"""Tells of each text what a guard decides and how the model goes on: a `predict` run."""

import json
from collections.abc import Sequence
from typing import Any, Protocol

from dsg.errors import UserError
from dsg.evaluation import (
    PromptBatch,
    Text,
    measure_predictions,
    predict_in_memory,
    prediction_rows,
)
from dsg.guard import Guard, GuardSettings
from dsg.io import row, write_atomically, write_results
from dsg.selection import texts_digest
from lightning_modules.parts.protocols import data_of
from lightning_modules.parts.run import Run

PREDICTION_DATA = ("name", "tokenizer", "texts")
PREDICTIONS_FILE = "predictions.jsonl"


class PredictionData(Protocol):
    """Texts, and batches that hold each of them exactly once."""

    name: str
    tokenizer: Any
    texts: Sequence[Text]
    """In the order of their ids, which are 0, 1, ..."""

    def predict_dataloader(self) -> Sequence[PromptBatch | None]:
        """Batches of the texts, to be continued by the module's `num_new_tokens`.

        A rank without a batch in the last round yields None. Not a `DataLoader`, which Lightning
        would make anew.
        """
        ...


class PredictionModule(Run):
    """One row per text, in `predictions.jsonl`, in the order of the data.

    A row holds `id`, `domain`, `num_tokens` that were read and whether the text was `truncated`;
    the gate's `statistic`, its `threshold`, whether the text `triggered` it, how many tokens
    counted and on how many of them a feature fired (`num_counted`, `num_fired`). With continuations
    also the greedy ones with the guard off and on, and whether the guard was triggered at the end
    of its own.

    What a batch gave is on disk as soon as it is finished: a run that was killed goes on after it
    with `--resume`, on any number of ranks.

    Args:
        model_name: Hugging Face folder or hub name of the model.
        guard: How to make or load the guard.
        continuations: Continue each text greedily, with the guard off and on.
        max_new_tokens: Longest continuation, in tokens.
        labels: Those of `Run`.
    """

    kind = "prediction"
    guard: Guard

    def __init__(
        self,
        model_name: str,
        guard: GuardSettings,
        continuations: bool = False,
        max_new_tokens: int = 64,
        **labels: Any,
    ) -> None:
        super().__init__(model_name, guard, **labels)
        if max_new_tokens < 1:
            raise UserError(
                f"`max_new_tokens` must be at least 1, got {max_new_tokens}; raise it, or leave "
                "`continuations` out."
            )
        self.num_new_tokens = max_new_tokens if continuations else 0

    def on_predict_start(self) -> None:
        """Read the rows of an earlier attempt.

        Raises:
            UserError: It had another model or guard, or other texts.
        """
        data: PredictionData = data_of(self.trainer, *PREDICTION_DATA)
        texts = [f"{text.key}\x1f{text.num_tokens}\x1f{text.text}" for text in data.texts]
        settings = {
            "model": self.describe()["model"],
            "guard": [str(self.guard), self.guard.feature_ids],
            "texts": texts_digest(texts),
            "new tokens": self.num_new_tokens,
        }
        self._journal = self.open_journal(settings)

    def predict_step(
        self, batch: PromptBatch | None, batch_idx: int, dataloader_idx: int = 0
    ) -> list[dict[str, Any]]:
        """The rows of a batch's texts, made now or by an earlier attempt."""
        del batch_idx, dataloader_idx
        if batch is None:
            return []
        ids = batch.ids.tolist()
        if not all(id in self._journal.known for id in ids):
            values = predict_in_memory(self.model, batch, self.guard)
            rows = prediction_rows(batch, values, self.guard.threshold)
            self._journal.append(ids, rows)
            return rows
        return [self._journal.known[id] for id in ids]

    def on_predict_epoch_end(self) -> None:
        """Gather the rows of all ranks and attempts, and write them and the results."""
        self.trainer.strategy.barrier("the journal is written")
        if self.trainer.is_global_zero:
            self._write()

    def _write(self) -> None:
        data: PredictionData = data_of(self.trainer, *PREDICTION_DATA)
        outcomes = self._journal.read()
        if len(outcomes) != len(data.texts):
            raise UserError(
                f"all {len(data.texts)} texts must be read before predictions are written, got "
                f"{len(outcomes)}; leave limit_predict_batches out and continue with --resume."
            )
        rows = [
            {
                "id": text.key,
                "domain": text.domain,
                "num_tokens": text.num_tokens,
                "truncated": text.truncated,
                **outcomes[text.id],
            }
            for text in data.texts
        ]
        lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in rows]
        write_atomically(self.run_dir / PREDICTIONS_FILE, "".join(lines))
        measured = measure_predictions(data.texts, rows)
        write_results(self.run_dir, [row(**self.labels(), **vars(m), guard="on") for m in measured])
        self.add_facts(self.describe())
        self.log_numbers({f"predict/{m.domain}/{m.metric}": m.value for m in measured})
