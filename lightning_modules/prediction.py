"""Tells of each text what a guard decides and how the model goes on: a `predict` run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import lightning
from transformers import PreTrainedModel

from dsg.errors import UserError
from dsg.evaluation import (
    PromptBatch,
    Text,
    measure_predictions,
    predict_in_memory,
    prediction_rows,
)
from dsg.guard import Guard, GuardSettings
from dsg.io import (
    FOLDER,
    Journal,
    read_run_facts,
    row,
    write_atomically,
    write_results,
    write_run_facts,
)
from dsg.lm import load_model, short_name
from dsg.selection import texts_digest
from lightning_modules.parts.guards import describe, make_guard, method_of
from lightning_modules.parts.measuring import Labels
from lightning_modules.parts.precision import use_precision
from lightning_modules.parts.protocols import Reads, data_of

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


class PredictionModule(lightning.LightningModule):
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
        experiment: The `experiment` column of the results.
        method: The `method` column; None takes the guard's.
        seed: The `seed` column.
        model_label: The `model` column; None takes the model's name.
    """

    reads: Reads = "evaluate"

    def __init__(
        self,
        model_name: str,
        guard: GuardSettings,
        continuations: bool = False,
        max_new_tokens: int = 64,
        experiment: str = "prediction",
        method: str | None = None,
        seed: int | None = None,
        model_label: str | None = None,
    ) -> None:
        super().__init__()
        if max_new_tokens < 1:
            raise UserError(
                f"`max_new_tokens` must be at least 1, got {max_new_tokens}; raise it, or leave "
                "`continuations` out."
            )
        self.model_name = model_name
        self.guard_settings = guard
        self.num_new_tokens = max_new_tokens if continuations else 0
        self.experiment = experiment
        self.method = method or ""
        self.seed = seed
        self.model_label = model_label or short_name(model_name)
        self.model: PreTrainedModel | None = None
        self.guard: Guard | None = None

    def configure_model(self) -> None:
        """Load the model and make the guard, once."""
        if self.model is None:
            use_precision(self.trainer)
            self.model = load_model(self.model_name)
            self.guard = make_guard(self.guard_settings, self.model, self.trainer)
            self.method = self.method or method_of(self.guard)

    def on_predict_start(self) -> None:
        """Read what an earlier attempt has found out.

        Raises:
            UserError: It had another model or guard, or other texts.
        """
        assert self.model is not None
        assert self.guard is not None
        data: PredictionData = data_of(self.trainer, *PREDICTION_DATA)
        texts = [f"{text.key}\x1f{text.num_tokens}\x1f{text.text}" for text in data.texts]
        settings = {
            "model": describe(self.model, None)["model"],
            "guard": [str(self.guard), self.guard.feature_ids],
            "texts": texts_digest(texts),
            "new tokens": self.num_new_tokens,
        }
        self._journal = Journal(Path(self.trainer.default_root_dir) / FOLDER, self.global_rank)
        self._journal.open(settings)
        self.trainer.strategy.barrier("the journal is read")
        if self.trainer.is_global_zero:
            self._journal.begin(settings)

    def predict_step(
        self, batch: PromptBatch | None, batch_idx: int, dataloader_idx: int = 0
    ) -> list[dict[str, Any]]:
        """What is found about each text of a batch, now or in an earlier attempt."""
        del batch_idx, dataloader_idx
        if batch is None:
            return []
        ids = batch.ids.tolist()
        if not all(id in self._journal.known for id in ids):
            assert self.model is not None
            assert self.guard is not None
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
        assert self.model is not None
        data: PredictionData = data_of(self.trainer, *PREDICTION_DATA)
        found = self._journal.read()
        if len(found) != len(data.texts):
            raise UserError(
                f"all {len(data.texts)} texts must be read before predictions are written, got "
                f"{len(found)}; leave limit_predict_batches out and continue with --resume."
            )
        rows = [
            {
                "id": text.key,
                "domain": text.domain,
                "num_tokens": text.num_tokens,
                "truncated": text.truncated,
                **found[text.id],
            }
            for text in data.texts
        ]
        folder = Path(self.trainer.default_root_dir)
        lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in rows]
        write_atomically(folder / PREDICTIONS_FILE, "".join(lines))
        labels = Labels(self.experiment, self.method, self.model_label, data.name, seed=self.seed)
        measured = measure_predictions(data.texts, rows)
        write_results(folder, [row(**vars(labels), **vars(one), guard="on") for one in measured])
        facts = describe(self.model, self.guard)
        write_run_facts(folder, {**read_run_facts(folder), **facts})
        logged = {f"predict/{one.domain}/{one.metric}": one.value for one in measured}
        for logger in self.trainer.loggers:
            logger.log_metrics(logged)
