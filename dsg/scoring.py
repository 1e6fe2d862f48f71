"""What one evaluation item is and how it is scored: cloze questions and passages.

A cloze question is answered by the option whose tokens have the highest mean log-probability after
the prompt. A guard decides once per question, on the prompt alone, for all of its options.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dsg.errors import UserError
from dsg.guard import Guard
from dsg.hooks import unwrap
from dsg.stack import GuardStack
from dsg.tokens import TokenBatch, encode_texts, pad_sequences, padding_id, uncounted_token_ids

QUESTION_COLUMNS = ("correct", "correct_probability", "margin", "triggered", "density")
PASSAGE_COLUMNS = ("nll_sum", "num_tokens", "triggered", "density")


@dataclass(frozen=True)
class Question:
    """A multiple-choice question without letters.

    Attributes:
        id: Unique among the questions that are scored together.
        domain: Name under which it is reported, such as `forget` or `retain`.
        form: `statement` or `question`.
        prompt: Text before the option.
        options: Continuations, each beginning with the separator it needs (`" Vexin"`).
        answer: Index of the right option.
        shown: Whether an attacker's data states the fact; `None` where there is no attacker.
    """

    id: int
    domain: str
    form: str
    prompt: str
    options: tuple[str, ...]
    answer: int
    shown: bool | None = None


@dataclass(frozen=True)
class Passage:
    """A text whose perplexity is measured; the attributes are those of `Question`."""

    id: int
    domain: str
    text: str
    shown: bool | None = None


@dataclass(frozen=True)
class ClozeBatch:
    """Questions of one batch, one row per option, the options of a question in adjacent rows.

    Attributes:
        tokens: Prompt and option of each row, padded on the right; `[b * num_options, seq]`.
        prompt_mask: The prompt's tokens.
        option_mask: The option's tokens, which are scored.
        question_ids: `[b]`.
        answers: Index of the right option, `[b]`.
        num_options: Rows per question.
    """

    tokens: TokenBatch
    prompt_mask: Bool[Tensor, "rows seq"]
    option_mask: Bool[Tensor, "rows seq"]
    question_ids: Int[Tensor, " b"]
    answers: Int[Tensor, " b"]
    num_options: int

    @property
    def ids(self) -> Int[Tensor, " b"]:
        """Sample ids, under the name that all batches share."""
        return self.question_ids

    def to(self, device: torch.device | str) -> "ClozeBatch":
        """The same batch on `device`."""
        moved = ("tokens", "prompt_mask", "option_mask", "question_ids", "answers")
        return replace(self, **{name: getattr(self, name).to(device) for name in moved})


@dataclass(frozen=True)
class PassageBatch:
    """Passages of one batch, padded on the right: `tokens` `[b, seq]`, `passage_ids` `[b]`."""

    tokens: TokenBatch
    passage_ids: Int[Tensor, " b"]

    @property
    def ids(self) -> Int[Tensor, " b"]:
        """Sample ids, under the name that all batches share."""
        return self.passage_ids

    def to(self, device: torch.device | str) -> "PassageBatch":
        """The same batch on `device`."""
        return PassageBatch(self.tokens.to(device), self.passage_ids.to(device))


def cloze_collate(tokenizer: Any) -> Callable[[Sequence[Question]], ClozeBatch]:
    """Make the function that turns questions with equally many options into a batch."""
    uncounted_ids = uncounted_token_ids(tokenizer)
    pad_id = padding_id(tokenizer)
    # Every evaluation of a run scores the same questions again.
    encoded: dict[Question, tuple[int, list[list[int]]]] = {}

    def collate(questions: Sequence[Question]) -> ClozeBatch:
        for question in questions:
            if question not in encoded:
                encoded[question] = encode_question(tokenizer, question)
        num_options = len(questions[0].options)
        if any(len(question.options) != num_options for question in questions):
            counts = sorted({len(question.options) for question in questions})
            raise UserError(
                f"`questions` of one batch must have equally many options, got {counts}; "
                "batch them apart."
            )
        rows = [row for question in questions for row in encoded[question][1]]
        prompt_lengths = torch.tensor(
            [encoded[question][0] for question in questions]
        ).repeat_interleave(num_options)
        tokens = pad_sequences(rows, pad_id, uncounted_ids)
        in_prompt = torch.arange(tokens.input_ids.shape[1]) < prompt_lengths[:, None]
        return ClozeBatch(
            tokens=tokens,
            prompt_mask=in_prompt,
            option_mask=tokens.token_mask & ~in_prompt,
            question_ids=torch.tensor([question.id for question in questions]),
            answers=torch.tensor([question.answer for question in questions]),
            num_options=num_options,
        )

    return collate


def passage_collate(
    tokenizer: Any, max_length: int | None = None
) -> Callable[[Sequence[Passage]], PassageBatch]:
    """Make the function that turns passages, cut to `max_length` tokens, into a batch."""
    uncounted_ids = uncounted_token_ids(tokenizer)
    pad_id = padding_id(tokenizer)

    def collate(passages: Sequence[Passage]) -> PassageBatch:
        rows = encode_texts(tokenizer, [passage.text for passage in passages], max_length)
        return PassageBatch(
            tokens=pad_sequences(rows, pad_id, uncounted_ids),
            passage_ids=torch.tensor([passage.id for passage in passages]),
        )

    return collate


def encode_question(tokenizer: Any, question: Question) -> tuple[int, list[list[int]]]:
    """Tokens of a question's prompt with each of its options.

    Prompt and option are tokenized as one text, because a tokenizer may merge across the boundary.
    What the prompt and all the options then share is the prompt.

    Returns:
        Number of prompt tokens, and one token list per option.

    Raises:
        UserError: An option adds no token to the prompt.
    """
    texts = [question.prompt, *(question.prompt + option for option in question.options)]
    prompt, *rows = encode_texts(tokenizer, texts, None)
    num_prompt = min(_shared_prefix(prompt, row) for row in rows)
    if any(len(row) <= num_prompt for row in rows) or num_prompt == 0:
        raise UserError(
            f"Question {question.id} needs a prompt and options that each add a token to it, got "
            f"prompt {question.prompt!r} and options {question.options}; reword it."
        )
    return num_prompt, rows


@torch.no_grad()
def score_cloze(
    model: nn.Module, batch: ClozeBatch, guard: Guard | GuardStack | None = None
) -> dict[str, Float[Tensor, " b"]]:
    """Answer the questions of a batch.

    Args:
        model: The causal LM, wrapped or not.
        batch: Questions, on the model's device.
        guard: Attached meanwhile; the prompt's counted tokens decide for all options.

    Returns:
        Per question, in float64: `correct` (0 or 1; a tie goes to the lower option),
        `correct_probability` (softmax of the options' mean log-probabilities), `margin` (mean
        log-probability of the right option minus that of the best wrong one, in nats), `triggered`
        and `density` (of the unedited model; NaN without a guard).
    """
    # The logits that predict an option's token in any row.
    positions = batch.option_mask.any(dim=0).nonzero()[:, 0] - 1
    logits, triggered, density = _forward(
        model,
        batch.tokens,
        guard,
        positions,
        decision="prompt",
        continuation="frozen",
        prompt_mask=batch.prompt_mask,
    )
    targets = batch.tokens.input_ids[:, positions + 1]
    scored = batch.option_mask[:, positions + 1]
    # Only the options' tokens meet the softmax: with a large vocabulary it is the main cost.
    log_probs = torch.zeros(scored.shape, dtype=torch.float32, device=logits.device)
    log_probs[scored] = -F.cross_entropy(logits[scored].float(), targets[scored], reduction="none")
    mean_log_probs = log_probs.double().sum(dim=1) / scored.sum(dim=1)
    options = mean_log_probs.reshape(-1, batch.num_options)
    right = batch.answers[:, None]
    chosen = options.argmax(dim=1)
    wrong = options.scatter(1, right, -torch.inf).amax(dim=1)
    return {
        "correct": (chosen == batch.answers).double(),
        "correct_probability": options.softmax(dim=1).gather(1, right)[:, 0],
        "margin": options.gather(1, right)[:, 0] - wrong,
        "triggered": triggered[:: batch.num_options].double(),
        "density": density[:: batch.num_options].double(),
    }


@torch.no_grad()
def score_passages(
    model: nn.Module, batch: PassageBatch, guard: Guard | GuardStack | None = None
) -> dict[str, Float[Tensor, " b"]]:
    """Next-token loss of the passages of a batch.

    Args:
        model: The causal LM, wrapped or not.
        batch: Passages, on the model's device.
        guard: Attached meanwhile; the whole passage decides.

    Returns:
        Per passage, in float64: `nll_sum` (nats, over the counted tokens after the first),
        `num_tokens` (how many those are), `triggered` and `density` (NaN without a guard).
    """
    logits, triggered, density = _forward(model, batch.tokens, guard, None, decision="sequence")
    scored = batch.tokens.token_mask[:, 1:]
    sums = [
        # Row by row, so that only one row's logits are ever copied to float32.
        F.cross_entropy(row[:-1][keep].float(), ids[1:][keep], reduction="none").double().sum()
        for row, ids, keep in zip(logits, batch.tokens.input_ids, scored, strict=True)
    ]
    return {
        "nll_sum": torch.stack(sums),
        "num_tokens": scored.sum(dim=1).double(),
        "triggered": triggered.double(),
        "density": density.double(),
    }


def _forward(
    model: nn.Module,
    tokens: TokenBatch,
    guard: Guard | GuardStack | None,
    positions: Int[Tensor, " kept"] | None,
    *,
    prompt_mask: Bool[Tensor, "rows seq"] | None = None,
    **attach: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits at `positions` (all of them if None), and what the guard decided."""
    inner = unwrap(model)
    inputs: dict[str, Any] = {**tokens.model_inputs(), "use_cache": False}
    # Most models can skip the output layer where no logit is asked for.
    early = (
        positions is not None and "logits_to_keep" in inspect.signature(inner.forward).parameters
    )
    if early:
        inputs["logits_to_keep"] = positions
    if guard is None:
        logits = inner(**inputs).logits
        triggered = density = torch.full(
            (len(tokens.input_ids),), torch.nan, dtype=torch.float64, device=logits.device
        )
    else:
        masks = {"token_mask": tokens.token_mask}
        if prompt_mask is not None:
            masks["prompt_mask"] = prompt_mask
        with guard.attached(inner, **attach) as attachment:
            logits = inner(**inputs, **masks).logits
        triggered, density = attachment.triggered, attachment.density
    if positions is not None and not early:
        logits = logits[:, positions]
    return logits, triggered, density


def _shared_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(first), len(second)))
