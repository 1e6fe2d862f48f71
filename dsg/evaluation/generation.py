"""Continues prompts greedily and compares what was generated with a reference."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsg.evaluation.continuation import generate_greedily
from dsg.evaluation.items import PromptBatch
from dsg.evaluation.metrics import repeated_share, rouge_l, rouge_l_recall
from dsg.evaluation.scoring import AnyGuard, Values
from dsg.guard import guarded
from dsg.lm import TokenBatch, padding_id, unwrap

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
    pairs = [
        (said_text(batch.tokenizer, batch.stop, row), reference)
        for row, reference in zip(rows, batch.references, strict=True)
    ]
    columns = {
        "rouge_l": [rouge_l(said, reference) for said, reference in pairs],
        "rouge_l_recall": [rouge_l_recall(said, reference) for said, reference in pairs],
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
    output = generate_greedily(model, batch.tokens, batch.max_new_tokens, pad_id)
    ends = _end_ids(model, batch.tokenizer)
    generated = torch.full((len(output), batch.max_new_tokens), UNUSED)
    for place, row in enumerate(output.tolist()):
        said = _before(ends, row)
        generated[place, : len(said)] = torch.tensor(said, dtype=torch.long)
    return generated


def said_text(tokenizer: Any, stop: Sequence[str], ids: Sequence[int]) -> str:
    """What was generated, up to the first of the strings at which it is cut."""
    text = tokenizer.decode(
        [token_id for token_id in ids if token_id != UNUSED], skip_special_tokens=True
    )
    ends = [text.find(mark) for mark in stop if mark in text]
    return text[: min(ends, default=len(text))]


def _mean_losses(
    model: Any, prompts: TokenBatch, generated: Int[Tensor, "b new"]
) -> Float[Tensor, " b"]:
    said = generated != UNUSED
    tokens = TokenBatch(
        torch.cat([prompts.input_ids, generated.clamp(min=0)], dim=1),
        torch.cat([prompts.attention_mask, said.to(prompts.attention_mask)], dim=1),
        torch.cat([prompts.token_mask, said], dim=1),
    )
    positions = (tokens.attention_mask.cumsum(1) - 1).clamp(min=0)
    with guarded(model, None) as forward:
        new = generated.shape[1]
        # One position more, the last of the prompt, which tells the first new token.
        keep = {"logits_to_keep": new + 1} if forward.can_skip_logits else {}
        logits = forward(tokens, position_ids=positions, use_cache=False, **keep).logits
    return torch.stack(
        [
            F.cross_entropy(row[keep].float(), ids[keep]).double()
            for row, ids, keep in zip(logits[:, -new - 1 : -1], generated, said, strict=True)
        ]
    )


def _end_ids(model: Any, tokenizer: Any) -> set[int]:
    """Ids that end a text: an instruction model ends its turn with another than the tokenizer's."""
    configured = model.generation_config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured]
    return {token_id for token_id in (*ends, tokenizer.eos_token_id) if token_id is not None}


def _before(ends: set[int], ids: Sequence[int]) -> list[int]:
    places = (place for place, token_id in enumerate(ids) if token_id in ends)
    return list(ids[: next(places, len(ids))])
