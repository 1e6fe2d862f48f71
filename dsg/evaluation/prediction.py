"""A guard's decision about each text, and its continuation with the guard off and on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dsg.evaluation.generation import generate_to_end, said_text
from dsg.evaluation.items import PromptBatch
from dsg.evaluation.scoring import Values, halving
from dsg.evaluation.summary import Measurement
from dsg.guard import Forward, Guard
from dsg.intervals import wilson
from dsg.lm import count_mask, unwrap

PROTOCOL = "prediction"


@dataclass(frozen=True)
class Text:
    """A text to predict about.

    Attributes:
        id: Its place among all texts, from 0.
        key: What the rows call it.
        text: What the model reads, without the tokenizer's own special tokens.
        domain: Name under which it is reported.
        is_chat: Whether it is a conversation in the model's template, whose end must not be cut.
        num_tokens: Tokens that the model reads.
        truncated: Whether there were more.
    """

    id: int
    key: str
    text: str
    domain: str = "all"
    is_chat: bool = False
    num_tokens: int = 0
    truncated: bool = False


@torch.no_grad()
def predict_batch(model: nn.Module, batch: PromptBatch, guard: Guard) -> Values:
    """Let a guard decide about each text of a batch and continue it with the guard off and on.

    Args:
        model: The causal LM, wrapped or not.
        batch: The texts, on the model's device; with `max_new_tokens` 0 none is continued.
        guard: The guard; it counts tokens by its own rule, as where the model is served.

    Returns:
        Per text: `statistic` and `triggered` of the whole text, `num_counted` and `num_fired`
        tokens. Where texts are continued also `triggered_at_end`, of the text with its guarded
        continuation, and the ids of both continuations, `off` and `on`, followed by `UNUSED`.
    """
    inner, tokens = unwrap(model), batch.tokens
    positions = (tokens.attention_mask.cumsum(1) - 1).clamp(min=0)
    with guard.attached(inner) as attachment:
        skip = {"logits_to_keep": 1} if Forward(inner, None).can_skip_logits else {}
        inner(**tokens.model_inputs(), position_ids=positions, use_cache=False, **skip)
        counted = count_mask(
            tokens.input_ids, tokens.attention_mask, guard.uncounted_ids, guard.pad_id
        ).sum(1)
        decisions = {
            "statistic": attachment.statistic,
            "triggered": attachment.triggered,
            "num_counted": counted,
            # The density is this count over the other, so the product misses it by a rounding.
            "num_fired": (attachment.density.to(counted.device) * counted).round().long(),
        }
    if batch.max_new_tokens:
        with guard.attached(inner, decision="prompt") as attachment:
            on = generate_to_end(inner, batch)
            decisions["triggered_at_end"] = attachment.triggered
        # An untriggered sequence is bit-identical to the plain model.
        off = generate_to_end(inner, batch) if decisions["triggered_at_end"].any() else on
        decisions |= {"off": off, "on": on}
    return {name: values.cpu() for name, values in decisions.items()}


predict_in_memory = halving(predict_batch)


def prediction_rows(batch: PromptBatch, values: Values, threshold: float) -> list[dict[str, Any]]:
    """Decision and continuations of each text in plain values, in the order of the batch."""
    rows = []
    for place in range(len(batch.ids)):
        row: dict[str, Any] = {
            "statistic": float(values["statistic"][place]),
            "threshold": threshold,
            "triggered": bool(values["triggered"][place]),
            "num_counted": int(values["num_counted"][place]),
            "num_fired": int(values["num_fired"][place]),
        }
        if batch.max_new_tokens:
            row["triggered_at_end"] = bool(values["triggered_at_end"][place])
            for state in ("off", "on"):
                ids = values[state][place].tolist()
                row[f"continuation_{state}"] = said_text(batch.tokenizer, batch.stop, ids)
        rows.append(row)
    return rows


def measure_predictions(
    texts: Sequence[Text], rows: Sequence[Mapping[str, Any]]
) -> list[Measurement]:
    """Trigger rate of each domain, and the share of continuations that the guard changed.

    Args:
        texts: All texts.
        rows: Their `prediction_rows`, in the same order.
    """
    measurements = []
    for domain in sorted({text.domain for text in texts}):
        members = [row for text, row in zip(texts, rows, strict=True) if text.domain == domain]
        counts = {"trigger_rate": sum(row["triggered"] for row in members)}
        if "continuation_on" in members[0]:
            counts["changed_rate"] = sum(
                row["continuation_on"] != row["continuation_off"] for row in members
            )
        measurements += [
            Measurement(domain, metric, PROTOCOL, **vars(wilson(count, len(members))))
            for metric, count in counts.items()
        ]
    return measurements
