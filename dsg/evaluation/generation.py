"""Greedy continuations: of prompts that are scored, and of texts that a model may know verbatim."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import LogitsProcessorList

from dsg.errors import UserError
from dsg.evaluation.columns import mean_over_runs
from dsg.evaluation.items import PromptBatch
from dsg.evaluation.metrics import repeated_share, rouge_l, rouge_l_recall
from dsg.evaluation.scoring import AnyGuard, Values
from dsg.guard import guarded
from dsg.intervals import Estimate
from dsg.lm import (
    FiniteLogits,
    TokenBatch,
    encode_texts,
    padding_for,
    padding_id,
    unwrap,
)

PROMPT_COLUMNS = (
    *("rouge_l", "rouge_l_recall", "num_tokens", "repetition", "nll", "triggered", "density"),
)
UNUSED = -1  # fills up `generated`; no tokenizer has such an id


@torch.no_grad()
def score_prompts(model: nn.Module, batch: PromptBatch, guard: AnyGuard | None = None) -> Values:
    """Continue the prompts of a batch.

    Args:
        model: The causal LM, wrapped or not.
        batch: Prompts, on the model's device.
        guard: Attached while generating; the prompt decides, and what follows extends the counts.

    Returns:
        Per prompt, in float64: `rouge_l` (F1) and `rouge_l_recall` (of stemmed words) against the
        reference, in [0, 1]; `num_tokens` generated, the end of the text not counted; `repetition`,
        see `repeated_share`; `nll`, the mean loss of the generated tokens under the *unguarded*
        model, in nats (NaN where there is none); `triggered` and `density` at the end (NaN without
        a guard). And `generated` `[b, max_new_tokens]`, the generated ids followed by `UNUSED`.
    """
    inner = unwrap(model)
    with guarded(inner, guard, decision="prompt") as forward:
        generated = generate_to_end(inner, batch)
        triggered, density = forward.decision(len(batch.ids))
    rows = [[token_id for token_id in row if token_id != UNUSED] for row in generated.tolist()]
    texts = [said_text(batch.tokenizer, batch.stop, row) for row in rows]
    columns = {
        "rouge_l": list(map(rouge_l, texts, batch.references)),
        "rouge_l_recall": list(map(rouge_l_recall, texts, batch.references)),
        "num_tokens": [len(row) for row in rows],
        "repetition": [repeated_share(row) for row in rows],
    }
    return {
        **{name: torch.tensor(column, dtype=torch.float64) for name, column in columns.items()},
        "nll": _mean_losses(inner, batch.tokens, generated.to(inner.device)),
        "triggered": triggered.double(),
        "density": density.double(),
        "generated": generated,
    }


def generate_to_end(model: Any, batch: PromptBatch) -> Int[Tensor, "b new"]:
    """Greedy continuations up to the end of the text, under whatever guard is attached.

    Args:
        model: The unwrapped causal LM.
        batch: Prompts, on the model's device.

    Returns:
        The generated ids, the end of the text left out, followed by `UNUSED`; on the CPU.
    """
    pad_id = padding_id(batch.tokenizer)
    output = greedy_continuation(model, batch.tokens, batch.max_new_tokens, pad_id)
    ends = _end_ids(model, batch.tokenizer)
    generated = torch.full((len(output), batch.max_new_tokens), UNUSED)
    for place, row in enumerate(output.tolist()):
        length = next((place for place, token_id in enumerate(row) if token_id in ends), len(row))
        generated[place, :length] = output[place, :length].cpu()
    return generated  # [b, max_new_tokens]


@torch.no_grad()
def greedy_continuation(
    model: nn.Module,
    prompts: TokenBatch,
    new_tokens: int,
    pad_id: int,
    guard: AnyGuard | None = None,
) -> Int[Tensor, "batch new"]:
    """The most probable next token again and again; rows that have ended hold `pad_id`.

    Args:
        model: The causal LM, wrapped or not.
        prompts: Padded on the left.
        new_tokens: Tokens to generate at most.
        pad_id: Fills rows that end earlier than others.
        guard: Attached meanwhile, with `decision="prompt"`.

    Raises:
        UserError: A logit is not finite: the model has diverged.
    """
    inner: Any = unwrap(model)
    watching = FiniteLogits()
    with guarded(inner, guard, decision="prompt"):
        output = inner.generate(
            **prompts.to(inner.device).model_inputs(),
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            pad_token_id=pad_id,
            logits_processor=LogitsProcessorList([watching]),
        )
    watching.check()
    return output[:, prompts.input_ids.shape[1] :]


def said_text(tokenizer: Any, stop: Sequence[str], ids: Sequence[int]) -> str:
    """What was generated, up to the first of the strings at which it is cut."""
    text = tokenizer.decode(
        [token_id for token_id in ids if token_id != UNUSED], skip_special_tokens=True
    )
    ends = [text.find(mark) for mark in stop if mark in text]
    return text[: min(ends, default=len(text))]


def continuation_rouge(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    guard: AnyGuard | None = None,
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
    pad, pad_id = padding_for(tokenizer), padding_id(tokenizer)
    values: list[float] = []
    for start in range(0, len(rows), batch_size):
        chunk = rows[start : start + batch_size]
        prompts = pad([row[:prompt_tokens] for row in chunk], side="left")
        generated = greedy_continuation(model, prompts, new_tokens, pad_id, guard)
        for ids, row in zip(generated.tolist(), chunk, strict=True):
            texts_of_both = (
                tokenizer.decode(part, skip_special_tokens=True)
                for part in (ids, row[prompt_tokens:])
            )
            values.append(rouge_l(*texts_of_both))
    return torch.tensor(values, dtype=torch.float64)


def mean_rouge(values: Float[Tensor, " n"]) -> Estimate:
    """Mean over texts with Student's t interval, which is cut to [0, 1].

    Raises:
        UserError: There is no value.
    """
    return mean_over_runs("rouge_l", values.tolist())


def is_measurable(memorised: Float[Tensor, " n"], unseen: Float[Tensor, " m"]) -> bool:
    """Whether memorised texts are continued well enough that forgetting them could be seen.

    Their mean must be twice that of the unseen ones; a model that says nothing of either is not
    measurable.

    Args:
        memorised: ROUGE-L of texts that the model was trained on.
        unseen: ROUGE-L of texts of the same kind that it never saw.
    """
    reached = memorised.mean().item()
    return reached > 0 and reached >= 2 * unseen.mean().item()


def _mean_losses(
    model: Any, prompts: TokenBatch, generated: Int[Tensor, "b new"]
) -> Float[Tensor, " b"]:
    is_text = generated != UNUSED  # [b, new]
    tokens = TokenBatch(
        torch.cat([prompts.input_ids, generated.clamp(min=0)], dim=1),
        torch.cat([prompts.attention_mask, is_text.to(prompts.attention_mask)], dim=1),
        torch.cat([prompts.token_mask, is_text], dim=1),
    )
    positions = (tokens.attention_mask.cumsum(1) - 1).clamp(min=0)
    with guarded(model, None) as forward:
        new = generated.shape[1]
        # One position more, the last of the prompt, which tells the first new token.
        keep = {"logits_to_keep": new + 1} if forward.can_skip_logits else {}
        logits = forward(tokens, position_ids=positions, use_cache=False, **keep).logits
    # [b, seq + new or new + 1, vocab]; the last `new + 1` positions but the last predict the text.
    return torch.stack(
        [
            F.cross_entropy(row[keep].float(), ids[keep]).double()
            for row, ids, keep in zip(logits[:, -new - 1 : -1], generated, is_text, strict=True)
        ]
    )


def _end_ids(model: Any, tokenizer: Any) -> set[int]:
    """Ids that end a text: an instruction model ends its turn with another than the tokenizer's."""
    configured = model.generation_config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured]
    return {token_id for token_id in (*ends, tokenizer.eos_token_id) if token_id is not None}
