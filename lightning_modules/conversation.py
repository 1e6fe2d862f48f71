"""Holds MT-Bench's conversations with a model, guarded and not, and has the answers judged."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import torch
from transformers import PreTrainedModel

from dsg.errors import UserError
from dsg.evaluation import AnyGuard, Measurement, PerSample, Values, write_items
from dsg.evaluation.benchmarks.mt_bench.conversations import (
    COLUMNS,
    NUM_TURNS,
    Conversation,
    ConversationBatch,
    check_room,
    hold,
)
from dsg.evaluation.benchmarks.mt_bench.grading import Grader
from dsg.evaluation.benchmarks.mt_bench.judge import JudgeSettings
from dsg.evaluation.benchmarks.mt_bench.scores import (
    Answers,
    Ratings,
    answer_rows,
    item_rows,
    measure_generations,
    measure_ratings,
)
from dsg.guard import Guard, GuardSettings
from dsg.io import read_run_facts, row, write_atomically, write_results, write_run_facts
from dsg.lm import load_model, short_name
from lightning_modules.parts.guards import describe, make_guard, method_of
from lightning_modules.parts.measuring import Labels, metric_key
from lightning_modules.parts.precision import use_precision
from lightning_modules.parts.protocols import Reads, data_of

CONVERSATION_DATA = ("name", "tokenizer", "conversations")

AnswersById = dict[int, tuple[str, str]]


class ConversationModule(lightning.LightningModule):
    """Generates both answers of each conversation, without and with the guard, and grades them.

    The run directory keeps the answers (`answers_<state>.jsonl`, which FastChat's own grading reads
    too), every judgement (`judgements.jsonl`) and the items for `dsg compare`; none of them goes to
    a logger. A grading that was killed goes on with `--resume`: the greedy answers are generated
    again, and what was judged is not judged again. Judgements that failed are, so that the same
    command mends them.

    Only rank zero asks the judge, after the last step in which the ranks wait for each other.

    Args:
        model_name: Hugging Face folder or hub name of the model.
        guard: How to make or load the guard, or None to evaluate the model as it is.
        judge: Who grades; None generates only.
        max_new_tokens: Longest answer, in tokens, as published.
        method: The `method` column; None takes the guard's, or `base`.
        experiment: The `experiment` column.
        seed: The `seed` column.
        model_label: The `model` column; None takes the model's name.
    """

    reads: Reads = "evaluate"

    def __init__(
        self,
        model_name: str,
        guard: GuardSettings | None = None,
        judge: JudgeSettings | None = None,
        max_new_tokens: int = 1024,
        method: str | None = None,
        experiment: str = "mt_bench",
        seed: int | None = None,
        model_label: str | None = None,
    ) -> None:
        super().__init__()
        self.model_name = model_name
        self.guard_settings = guard
        self.judge_settings = judge
        self.max_new_tokens = max_new_tokens
        self.method = method or ""
        self.experiment = experiment
        self.seed = seed
        self.model_label = model_label or short_name(model_name)
        self.model: PreTrainedModel | None = None
        self.guard: Guard | None = None
        self._grader: Grader | None = None
        self._metrics: dict[str, PerSample] = {}
        self._answers: dict[str, AnswersById] = {}

    def configure_model(self) -> None:
        """Find out whether the judge can be asked, load the model and make the guard, once."""
        if self.model is not None:
            return
        use_precision(self.trainer)
        if self.judge_settings is not None:
            self._grader = Grader(self.judge_settings)
            if self.trainer.is_global_zero:
                self._grader.check()
        self.model = load_model(self.model_name)
        if self.guard_settings is not None:
            self.guard = make_guard(self.guard_settings, self.model, self.trainer)
        self.method = self.method or method_of(self.guard)

    def on_test_start(self) -> None:
        """Begin, if there is room for both answers of every conversation."""
        assert self.model is not None
        if self.max_new_tokens < 1:
            raise UserError(
                f"`max_new_tokens` must be at least 1, got {self.max_new_tokens}; raise it."
            )
        data = data_of(self.trainer, *CONVERSATION_DATA)
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if context is not None:
            check_room(data.tokenizer, data.conversations(), self.max_new_tokens, context)
        states = ("none",) if self.guard is None else ("off", "on")
        self._metrics = {state: PerSample(COLUMNS, len(data.conversations())) for state in states}
        self._answers = {state: {} for state in states}

    def test_step(self, batch: ConversationBatch | None, batch_idx: int) -> None:
        """Hold the conversations of a batch."""
        del batch_idx
        if batch is None:
            return
        if self.guard is None:
            self._record("none", batch, *self._hold(batch, None))
            return
        answers, on = self._hold(batch, self.guard)
        self._record("on", batch, answers, on)
        if any(on[f"triggered_turn_{turn + 1}"].any() for turn in range(NUM_TURNS)):
            answers, off = self._hold(batch, None)
        else:
            # An untriggered sequence is bit-identical to the plain model.
            decided = [name for name in on if name.startswith(("triggered", "density"))]
            off = {**on, **{name: torch.full_like(on[name], torch.nan) for name in decided}}
        self._record("off", batch, answers, off)

    def on_test_epoch_end(self) -> None:
        """Gather all ranks' answers; rank zero has them judged and writes everything."""
        data = data_of(self.trainer, *CONVERSATION_DATA)
        values = {state: metric.by_id() for state, metric in self._metrics.items()}
        gathered = {state: _gathered(answers) for state, answers in self._answers.items()}
        if not self.trainer.is_global_zero:
            return
        conversations: list[Conversation] = data.conversations()
        answers: dict[str, Answers] = {
            state: [found[conversation.id] for conversation in conversations]
            for state, found in gathered.items()
        }
        folder = Path(self.trainer.default_root_dir)
        for state, said in answers.items():
            lines = answer_rows(self.model_label, conversations, said)
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            write_atomically(folder / f"answers_{state}.jsonl", text)
        assert self.model is not None
        told = describe(self.model, self.guard)
        write_run_facts(folder, {**read_run_facts(folder), **told})
        # Before the grading, so that a killed one leaves them.
        self._write_items(conversations, answers, values, {})
        ratings: dict[str, Ratings] = {}
        if self._grader is not None:
            ratings, facts = self._grader.grade(folder, conversations, answers)
            write_run_facts(folder, {**read_run_facts(folder), "judge": facts})
        self._write_items(conversations, answers, values, ratings)
        self._write_results(data, conversations, values, ratings)

    def _hold(
        self, batch: ConversationBatch, guard: AnyGuard | None
    ) -> tuple[list[tuple[str, str]], Values]:
        assert self.model is not None
        tokenizer = data_of(self.trainer, "tokenizer").tokenizer
        return hold(self.model, tokenizer, batch.conversations, self.max_new_tokens, guard)

    def _record(
        self, state: str, batch: ConversationBatch, answers: list[tuple[str, str]], values: Values
    ) -> None:
        ids = [conversation.id for conversation in batch.conversations]
        self._metrics[state].update(torch.tensor(ids), values)
        self._answers[state] |= dict(zip(ids, answers, strict=True))

    def _write_items(
        self,
        conversations: list[Conversation],
        answers: dict[str, Answers],
        values: dict[str, Values],
        ratings: dict[str, Ratings],
    ) -> None:
        rows: list[dict[str, Any]] = []
        for state, said in answers.items():
            rows += item_rows(state, conversations, said, values[state], ratings.get(state))
        write_items(self.trainer.default_root_dir, rows)

    def _write_results(
        self,
        data: Any,
        conversations: list[Conversation],
        values: dict[str, Values],
        ratings: dict[str, Ratings],
    ) -> None:
        labels = Labels(self.experiment, self.method, self.model_label, data.name, seed=self.seed)
        rows: list[dict[str, Any]] = []
        logged: dict[str, float] = {}
        own = values["none" if self.guard is None else "off"]
        for state, of in values.items():
            found: list[Measurement] = measure_generations(
                of, own, guarded=state == "on", max_new_tokens=self.max_new_tokens
            )
            logged |= {metric_key(one, "test", state): one.value for one in found}
            if self._grader is not None:
                judged = measure_ratings(conversations, ratings[state], self._grader.protocol)
                # One judge per run: its name would only make the logged keys long.
                keys = [metric_key(replace(one, protocol=""), "test", state) for one in judged]
                logged |= {key: one.value for key, one in zip(keys, judged, strict=True)}
                found += judged
            rows += [row(**vars(labels), **vars(one), guard=state, split="test") for one in found]
        # Not through `LightningModule.log`, which would average over batches and ranks.
        for logger in self.trainer.loggers:
            logger.log_metrics(logged)
        write_results(self.trainer.default_root_dir, rows)


def _gathered(answers: AnswersById) -> AnswersById:
    """The answers of all ranks; every rank must call this."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return answers
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, answers)
    return {key: said for part in parts for key, said in part.items()}
