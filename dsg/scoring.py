"""What one evaluation item is and how it is scored: cloze questions and passages.

A cloze question is answered by the option whose tokens have the highest mean log-probability after
the prompt. A guard decides once per question, on the prompt alone, for all of its options.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from dsg.errors import UserError
from dsg.forward import guarded
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
    """Questions of one batch; the options of a question lie in adjacent rows.

    Attributes:
        prompts: One row per question, padded on the left, `[b, seq]`.
        options: One row per option, padded on the right, `[b * num_options, tokens]`.
        question_ids: `[b]`.
        answers: Index of the right option, `[b]`.
        num_options: Options per question.
    """

    prompts: TokenBatch
    options: TokenBatch
    question_ids: Int[Tensor, " b"]
    answers: Int[Tensor, " b"]
    num_options: int

    @property
    def ids(self) -> Int[Tensor, " b"]:
        """Sample ids, under the name that all batches share."""
        return self.question_ids

    def to(self, device: torch.device | str) -> "ClozeBatch":
        """The same batch on `device`."""
        moved = ("prompts", "options", "question_ids", "answers")
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
        prompts, options = [], []
        for question in questions:
            num_prompt, rows = encoded[question]
            prompts.append(rows[0][:num_prompt])
            options += [row[num_prompt:] for row in rows]
        return ClozeBatch(
            # On the left, so that an option follows its prompt without a gap.
            prompts=pad_sequences(prompts, pad_id, uncounted_ids, side="left"),
            options=pad_sequences(options, pad_id, uncounted_ids),
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
    log_probs, triggered, density = _option_log_probs(unwrap(model), batch, guard)
    mean_log_probs = log_probs.sum(dim=1) / batch.options.token_mask.sum(dim=1)
    options = mean_log_probs.reshape(-1, batch.num_options)
    right = batch.answers[:, None]
    chosen = options.argmax(dim=1)
    wrong = options.scatter(1, right, -torch.inf).amax(dim=1)
    return {
        "correct": (chosen == batch.answers).double(),
        "correct_probability": options.softmax(dim=1).gather(1, right)[:, 0],
        "margin": options.gather(1, right)[:, 0] - wrong,
        "triggered": triggered.double(),
        "density": density.double(),
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
    inner, tokens = unwrap(model), batch.tokens
    with guarded(inner, guard, decision="sequence") as forward:
        logits = forward(tokens, use_cache=False).logits
        triggered, density = forward.decision(len(tokens.input_ids))
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


def _option_log_probs(
    model: PreTrainedModel, batch: ClozeBatch, guard: Guard | GuardStack | None
) -> tuple[Float[Tensor, "rows tokens"], Tensor, Tensor]:
    """Log-probability of each option token, 0 for padding, and the guard's decision per prompt.

    The options of a question continue one KV cache, so that the prompt is read only once.
    """
    prompts, options, copies = batch.prompts, batch.options, batch.num_options
    prompt_mask = prompts.attention_mask
    with guarded(model, guard, decision="prompt", continuation="frozen") as forward:
        positions = (prompt_mask.cumsum(1) - 1).clamp(min=0)
        keep = {"logits_to_keep": 1} if forward.can_skip_logits else {}
        first = forward(prompts, position_ids=positions, use_cache=True, **keep)
        triggered, density = forward.decision(len(prompts.input_ids))
        logits = first.logits[:, -1:].repeat_interleave(copies, dim=0)
        if options.input_ids.shape[1] > 1:
            # No logit is needed after an option's last token.
            known = TokenBatch(
                options.input_ids[:, :-1],
                torch.cat(
                    [prompt_mask.repeat_interleave(copies, 0), options.attention_mask[:, :-1]], 1
                ),
                options.token_mask[:, :-1],
            )
            forward.repeat_sequences(first.past_key_values, copies)
            start = prompt_mask.sum(1).repeat_interleave(copies)
            rest = forward(
                known,
                position_ids=start[:, None] + torch.arange(known.input_ids.shape[1]).to(start),
                past_key_values=first.past_key_values,
                use_cache=True,
            )
            logits = torch.cat([logits, rest.logits], dim=1)
    scored = options.token_mask
    # Only the options' tokens meet the softmax: with a large vocabulary it is the main cost.
    log_probs = torch.zeros(scored.shape, dtype=torch.float64, device=logits.device)
    losses = F.cross_entropy(logits[scored].float(), options.input_ids[scored], reduction="none")
    log_probs[scored] = -losses.double()
    return log_probs, triggered, density


def _shared_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(first), len(second)))
