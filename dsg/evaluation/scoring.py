"""Scores items with or without a guard: questions, passages and continued prompts.

A guard decides once per question, on the prompt alone, for all of its options.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from dsg.evaluation.collate import last_places
from dsg.evaluation.items import AnyBatch, PassageBatch, QuestionBatch
from dsg.guard import Guard, GuardStack, guarded
from dsg.lm import TokenBatch, check_log_probs, unwrap

AnyGuard = Guard | GuardStack
Values = dict[str, Float[Tensor, " b"]]

PASSAGE_COLUMNS = ("nll_sum", "num_tokens", "min_k", "triggered", "density")
_QUESTION_COLUMNS = (
    *("correct", "correct_plain", "correct_chars", "correct_probability", "margin", "chosen"),
    *("triggered", "density"),
)
MIN_K_SHARE = 0.4


def question_columns(num_answers: int) -> tuple[str, ...]:
    """Names of the values of questions with at most as many answers."""
    places = range(num_answers)
    return (
        *_QUESTION_COLUMNS,
        *(f"log_prob_{place}" for place in places),
        *(f"num_tokens_{place}" for place in places),
    )


@torch.no_grad()
def score_questions(
    model: nn.Module, batch: QuestionBatch, guard: AnyGuard | None = None
) -> Values:
    """Answer the questions of a batch.

    Args:
        model: The causal LM, wrapped or not.
        batch: Questions, on the model's device.
        guard: Attached meanwhile; the prompt's counted tokens decide for all options.

    Returns:
        Per question, in float64. By the rule of the protocol: `correct` (0 or 1; a tie goes to the
        lower answer), `correct_probability` (softmax over the answers' scores), `margin` (score of
        the right answer minus that of the best wrong one, in nats) and `chosen`. Whatever the
        protocol: `correct_plain` (highest log-probability), `correct_chars` (highest
        log-probability per character), and of each answer i `log_prob_<i>` and `num_tokens_<i>`.
        `triggered` and `density` are of the unedited model; NaN without a guard.

    Raises:
        UserError: A log-probability is not finite: the model has diverged.
    """
    token_log_probs, triggered, density = _option_log_probs(unwrap(model), batch, guard)
    check_log_probs(token_log_probs)
    rows = (len(batch.ids), batch.num_options)
    log_probs = token_log_probs.sum(dim=1).reshape(rows)  # [b, options]
    tokens = batch.options.token_mask.sum(dim=1).reshape(rows)
    chars = batch.option_chars.reshape(rows)
    if batch.protocol == "dsg":
        # Two spellings of each letter.
        log_probs = log_probs.unflatten(1, (-1, 2)).amax(dim=2)  # [b, answers]
        tokens, chars = tokens[:, ::2], chars[:, ::2]
    scores = log_probs / tokens if batch.protocol == "cloze" else log_probs
    right = batch.answers[:, None]  # [b, 1]
    wrong = scores.scatter(1, right, -torch.inf).amax(dim=1)  # [b]
    chosen = scores.argmax(dim=1)
    by_answer = {f"log_prob_{place}": log_probs[:, place] for place in range(log_probs.shape[1])}
    by_answer |= {f"num_tokens_{place}": tokens[:, place] for place in range(tokens.shape[1])}
    values_by_name = {
        "correct": chosen == batch.answers,
        "correct_plain": log_probs.argmax(dim=1) == batch.answers,
        "correct_chars": (log_probs / chars).argmax(dim=1) == batch.answers,
        "correct_probability": scores.softmax(dim=1).gather(1, right)[:, 0],
        "margin": scores.gather(1, right)[:, 0] - wrong,
        "chosen": chosen,
        "triggered": triggered,
        "density": density,
    }
    return {name: values.double() for name, values in (values_by_name | by_answer).items()}


@torch.no_grad()
def score_passages(model: nn.Module, batch: PassageBatch, guard: AnyGuard | None = None) -> Values:
    """Next-token loss of the passages of a batch.

    Args:
        model: The causal LM, wrapped or not.
        batch: Passages, on the model's device.
        guard: Attached meanwhile. The whole passage decides; where there is a context, that is the
            prompt and the passage its continuation.

    Returns:
        Per passage, in float64: `nll_sum` (nats, over the counted tokens after the first and after
        the context, and the end of a closed passage), `num_tokens` (how many those are), `min_k`
        (mean log-probability of the 40 % least probable ones, rounded down but at least one: Min-K
        %, Shi et al. 2024; NaN where there is no token), `triggered` and `density` (NaN without a
        guard).

    Raises:
        UserError: As for `score_questions`.
    """
    inner, tokens = unwrap(model), batch.tokens
    places = torch.arange(tokens.input_ids.shape[1], device=tokens.input_ids.device)
    in_context = places < batch.context_lengths[:, None]  # [b, seq]
    has_context = bool(in_context.any())
    masks = {"prompt_mask": in_context} if has_context and guard is not None else {}
    decision = "prompt" if has_context else "sequence"
    with guarded(inner, guard, decision=decision) as forward:
        logits = forward(tokens, use_cache=False, **masks).logits  # [b, seq, vocab]
        triggered, density = forward.decision(len(tokens.input_ids))
    closing = last_places(tokens) & batch.closed[:, None]
    scored = ((tokens.token_mask | closing) & ~in_context)[:, 1:]  # [b, seq - 1]
    losses = [
        # Row by row, so that only one row's logits are ever copied to float32.
        F.cross_entropy(row[:-1][keep].float(), ids[1:][keep], reduction="none").double()
        for row, ids, keep in zip(logits, tokens.input_ids, scored, strict=True)
    ]
    sums = torch.stack([row.sum() for row in losses])
    check_log_probs(sums)
    return {
        "nll_sum": sums,
        "num_tokens": scored.sum(dim=1).double(),
        "min_k": torch.stack([_min_k(row) for row in losses]),
        "triggered": triggered.double(),
        "density": density.double(),
    }


def halving(
    score: Callable[[nn.Module, Any, Any], Values],
) -> Callable[[nn.Module, Any, AnyGuard | None], Values]:
    """Make a scoring function that tries again with half the batch when memory runs out.

    Items do not depend on their batch, so the values are the same but for the order in which sums
    of floating-point numbers are taken.
    """

    def score_or_halve(model: nn.Module, batch: AnyBatch, guard: AnyGuard | None = None) -> Values:
        try:
            return score(model, batch, guard)
        except torch.OutOfMemoryError:
            if len(batch.ids) == 1:
                raise
        # Outside of the handler, whose traceback keeps the tensors of the first attempt alive.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        middle = len(batch.ids) // 2
        parts = [
            score_or_halve(model, batch[half], guard)
            for half in (slice(middle), slice(middle, None))
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    return score_or_halve


def _min_k(losses: Float[Tensor, " tokens"]) -> Float[Tensor, ""]:
    if len(losses) == 0:
        return losses.new_full((), torch.nan)
    return -losses.topk(max(1, int(MIN_K_SHARE * len(losses)))).values.mean()


def _option_log_probs(
    model: PreTrainedModel, batch: QuestionBatch, guard: AnyGuard | None
) -> tuple[Float[Tensor, "rows tokens"], Tensor, Tensor]:
    """Log-probability of each option token, 0 for padding, and the guard's decision per prompt.

    The options of a question continue one KV cache, so that the prompt is read only once.
    """
    prompts, options, copies = batch.prompts, batch.options, batch.num_options
    prompt_mask, scored = prompts.attention_mask, options.token_mask
    log_probs = torch.zeros(scored.shape, dtype=torch.float64, device=scored.device)
    goes_on = options.input_ids.shape[1] > 1
    with guarded(model, guard, decision="prompt", continuation="frozen") as forward:
        positions = (prompt_mask.cumsum(1) - 1).clamp(min=0)
        keep = {"logits_to_keep": 1} if forward.can_skip_logits else {}
        first = forward(prompts, position_ids=positions, use_cache=goes_on, **keep)
        triggered, density = forward.decision(len(prompts.input_ids))
        # All options begin at the same logits.
        after_prompt = first.logits[:, -1].float().log_softmax(dim=-1)  # [b, vocab]
        first_ids = options.input_ids[:, 0].reshape(-1, copies)  # [b, options]
        beginnings = after_prompt.gather(1, first_ids).flatten()  # [b * options]
        log_probs[:, 0] = beginnings.double() * scored[:, 0]
        if goes_on:
            # No logit is needed after an option's last token.
            inputs = TokenBatch(
                options.input_ids[:, :-1],
                torch.cat(
                    [prompt_mask.repeat_interleave(copies, 0), options.attention_mask[:, :-1]], 1
                ),
                options.token_mask[:, :-1],
            )
            forward.repeat_sequences(first.past_key_values, copies)
            start = prompt_mask.sum(1).repeat_interleave(copies)
            logits = forward(
                inputs,
                position_ids=start[:, None] + torch.arange(inputs.input_ids.shape[1]).to(start),
                past_key_values=first.past_key_values,
                use_cache=True,
            ).logits  # [b * options, tokens - 1, vocab]
            # Only the options' tokens meet the softmax: with a large vocabulary it is costly.
            rest, ids = scored[:, 1:], options.input_ids[:, 1:]
            losses = F.cross_entropy(logits[rest].float(), ids[rest], reduction="none")
            log_probs[:, 1:][rest] = -losses.double()
    return log_probs, triggered, density
