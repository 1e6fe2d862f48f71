"""Holds MT-Bench's conversations with a model, guarded and not, and has the answers judged."""

import json
from dataclasses import replace
from typing import Any

import torch

from dsg.errors import UserError
from dsg.evaluation import AnyGuard, Measurement, PerSample, Values, gather_objects, write_items
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
from dsg.guard import GuardSettings
from dsg.io import row, write_atomically, write_results
from dsg.lm import unwrap
from lightning_modules.parts.measuring import metric_key
from lightning_modules.parts.protocols import data_of
from lightning_modules.parts.run import Run

CONVERSATION_DATA = ("name", "tokenizer", "conversations")

AnswersById = dict[int, tuple[str, str]]


class ConversationModule(Run):
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
        labels: Those of `Run`.
    """

    kind = "mt_bench"

    def __init__(
        self,
        model_name: str,
        guard: GuardSettings | None = None,
        judge: JudgeSettings | None = None,
        max_new_tokens: int = 1024,
        **labels: Any,
    ) -> None:
        super().__init__(model_name, guard, **labels)
        self.judge_settings = judge
        self.max_new_tokens = max_new_tokens
        self._grader: Grader | None = None
        self._metrics: dict[str, PerSample] = {}
        self._answers: dict[str, AnswersById] = {}

    def configure_model(self) -> None:
        """Ask whether the judge can be asked, load the model and make the guard, once."""
        if self.model is None and self.judge_settings is not None:
            self._grader = Grader(self.judge_settings)
            if self.trainer.is_global_zero:
                self._grader.check()
        super().configure_model()

    def on_test_start(self) -> None:
        """Begin, if there is room for both answers of every conversation."""
        if self.max_new_tokens < 1:
            raise UserError(
                f"`max_new_tokens` must be at least 1, got {self.max_new_tokens}; raise it."
            )
        data = data_of(self.trainer, *CONVERSATION_DATA)
        config = unwrap(self.model).config.get_text_config()
        context = getattr(config, "max_position_embeddings", None)
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
        gathered: dict[str, AnswersById] = {
            state: {id: text for part in gather_objects(answers) for id, text in part.items()}
            for state, answers in self._answers.items()
        }
        if not self.trainer.is_global_zero:
            return
        conversations: list[Conversation] = data.conversations()
        answers: dict[str, Answers] = {
            state: [texts[conversation.id] for conversation in conversations]
            for state, texts in gathered.items()
        }
        for state, texts in answers.items():
            lines = answer_rows(self.model_label, conversations, texts)
            content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            write_atomically(self.run_dir / f"answers_{state}.jsonl", content)
        self.add_facts(self.describe())
        # Before the grading, so that a killed one leaves them.
        self._write_items(conversations, answers, values, {})
        ratings: dict[str, Ratings] = {}
        if self._grader is not None:
            ratings, facts = self._grader.grade(self.run_dir, conversations, answers)
            self.add_facts({"judge": facts})
        self._write_items(conversations, answers, values, ratings)
        self._write_results(conversations, values, ratings)

    def _hold(
        self, batch: ConversationBatch, guard: AnyGuard | None
    ) -> tuple[list[tuple[str, str]], Values]:
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
        for state, texts in answers.items():
            rows += item_rows(state, conversations, texts, values[state], ratings.get(state))
        write_items(self.run_dir, rows)

    def _write_results(
        self,
        conversations: list[Conversation],
        values: dict[str, Values],
        ratings: dict[str, Ratings],
    ) -> None:
        rows: list[dict[str, Any]] = []
        logged: dict[str, float] = {}
        own = values["none" if self.guard is None else "off"]
        for state, per_sample in values.items():
            measured: list[Measurement] = measure_generations(
                per_sample, own, guarded=state == "on", max_new_tokens=self.max_new_tokens
            )
            logged |= {metric_key(number, "test", state): number.value for number in measured}
            if self._grader is not None:
                judged = measure_ratings(conversations, ratings[state], self._grader.protocol)
                # A run has a single judge: its name would only make the logged keys long.
                keys = [
                    metric_key(replace(rating, protocol=""), "test", state) for rating in judged
                ]
                logged |= {key: rating.value for key, rating in zip(keys, judged, strict=True)}
                measured += judged
            rows += [
                row(**self.labels(), **vars(number), guard=state, split="test")
                for number in measured
            ]
        self.log_numbers(logged)
        write_results(self.run_dir, rows)
