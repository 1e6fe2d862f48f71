"""Verbatim continuation: does a model go on with a text as the text itself does?"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import LogitsProcessorList

from dsg.errors import UserError
from dsg.evaluation.metrics import rouge_l
from dsg.evaluation.scales import mean_over_runs
from dsg.guard import Guard, GuardStack
from dsg.intervals import Estimate
from dsg.lm import (
    FiniteLogits,
    TokenBatch,
    encode_texts,
    pad_sequences,
    padding_id,
    uncounted_token_ids,
    unwrap,
)


def continuation_rouge(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    guard: Guard | GuardStack | None = None,
    *,
    prompt_tokens: int = 32,
    new_tokens: int = 32,
    batch_size: int = 64,
) -> Float[Tensor, " n"]:
    """ROUGE-L between a text's true continuation and the model's greedy one.

    Args:
        model: The causal LM, wrapped or not.
        tokenizer: Its tokenizer.
        texts: One sequence each.
        guard: Attached meanwhile; the prompt decides, and what is generated extends the counts.
        prompt_tokens: Tokens at the beginning of a text that the model is given.
        new_tokens: Tokens that follow; a shorter text is compared with what it has.
        batch_size: Texts that are generated together.

    Returns:
        One value in [0, 1] per text, float64, on the CPU.

    Raises:
        UserError: A text has no token after the prompt, or a number is below 1.
    """
    for name, number in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens)):
        if number < 1:
            raise UserError(f"`{name}` must be at least 1, got {number}; raise it.")
    rows = encode_texts(tokenizer, texts, prompt_tokens + new_tokens)
    shortest = min(map(len, rows), default=prompt_tokens + 1)
    if shortest <= prompt_tokens:
        raise UserError(
            f"`texts` must have more than {prompt_tokens} tokens each, got one of {shortest}; "
            "leave it out or lower `prompt_tokens`."
        )
    pad_id, uncounted_ids = padding_id(tokenizer), uncounted_token_ids(tokenizer)
    values: list[float] = []
    for start in range(0, len(rows), batch_size):
        chunk = rows[start : start + batch_size]
        prompts = pad_sequences(
            [row[:prompt_tokens] for row in chunk], pad_id, uncounted_ids, side="left"
        )
        generated = greedy_continuation(model, prompts, new_tokens, pad_id, guard)
        for ids, row in zip(generated.tolist(), chunk, strict=True):
            said, true = (
                tokenizer.decode(part, skip_special_tokens=True)
                for part in (ids, row[prompt_tokens:])
            )
            values.append(rouge_l(said, true))
    return torch.tensor(values, dtype=torch.float64)


@torch.no_grad()
def greedy_continuation(
    model: nn.Module,
    prompts: TokenBatch,
    new_tokens: int,
    pad_id: int,
    guard: Guard | GuardStack | None = None,
) -> Int[Tensor, "batch new"]:
    """The most probable next token again and again; rows that have ended hold `pad_id`.

    Args:
        model: The causal LM, wrapped or not.
        prompts: Padded on the left.
        new_tokens: Tokens to generate at most.
        pad_id: Fills rows that end earlier than others.
        guard: Attached meanwhile, with `decision="prompt"`.
    """
    inner: Any = unwrap(model)
    prompts = prompts.to(inner.device)
    with guard.attached(inner, decision="prompt") if guard else nullcontext():
        return generate_greedily(inner, prompts, new_tokens, pad_id)


def generate_greedily(
    model: Any, prompts: TokenBatch, new_tokens: int, pad_id: int
) -> Int[Tensor, "batch new"]:
    """`greedy_continuation` of an unwrapped model, under whatever guard is attached to it.

    Raises:
        UserError: A logit is not finite: the model has diverged.
    """
    watching = FiniteLogits()
    output = model.generate(
        **prompts.model_inputs(),
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        pad_token_id=pad_id,
        logits_processor=LogitsProcessorList([watching]),
    )
    watching.check()
    return output[:, prompts.input_ids.shape[1] :]


def mean_rouge(values: Float[Tensor, " n"]) -> Estimate:
    """Mean over texts with Student's t interval, which is cut to [0, 1].

    Raises:
        UserError: There is no value.
    """
    return mean_over_runs("rouge_l", values.tolist())


def is_measurable(
    memorised: Float[Tensor, " n"], unseen: Float[Tensor, " m"], factor: float = 2.0
) -> bool:
    """Whether memorised texts are continued well enough that forgetting them could be seen.

    Args:
        memorised: ROUGE-L of texts that the model was trained on.
        unseen: ROUGE-L of texts of the same kind that it never saw.
        factor: How many times the mean of the unseen ones it takes; a model that says nothing of
            either is not measurable.
    """
    reached = memorised.mean().item()
    return reached > 0 and reached >= factor * unseen.mean().item()
