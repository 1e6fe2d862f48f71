"""Forward passes that are the same to write down with and without a guard."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dsg.guard.attachment import Attachment
from dsg.guard.guard import Guard, GuardStack
from dsg.lm import TokenBatch


class Forward:
    """Forward passes of a model under a guard, or of the plain model; made by `guarded`.

    Attributes:
        model: The unwrapped causal LM.
        can_skip_logits: Whether the model takes `logits_to_keep`.
    """

    def __init__(self, model: PreTrainedModel, attachment: Attachment | None) -> None:
        self.model = model
        self._attachment = attachment
        parameters = inspect.signature(model.forward).parameters
        self.can_skip_logits = "logits_to_keep" in parameters

    def __call__(self, tokens: TokenBatch, **options: Any) -> Any:
        """The model's output for a batch of tokens."""
        if self._attachment is not None:
            options["token_mask"] = tokens.token_mask
        return self.model(**tokens.model_inputs(), **options)

    def repeat_sequences(self, cache: Any, repeats: int) -> None:
        """Repeat each sequence of a KV cache, the copies in adjacent rows."""
        if self._attachment is None:
            cache.batch_repeat_interleave(repeats)
        else:
            self._attachment.repeat_sequences(cache, repeats)

    def decision(self, num_sequences: int) -> tuple[Tensor, Tensor]:
        """`triggered` and the gate's statistic of the last pass; NaN without a guard."""
        if self._attachment is None:
            unknown = torch.full((num_sequences,), torch.nan, dtype=torch.float64)
            return unknown, unknown
        return self._attachment.triggered, self._attachment.statistic


@contextmanager
def guarded(
    model: PreTrainedModel, guard: Guard | GuardStack | None, **options: Any
) -> Iterator[Forward]:
    """Attach a guard, if there is one, inside a `with` block.

    Args:
        model: The unwrapped causal LM.
        guard: None leaves the model as it is.
        options: `decision` and `continuation` of `dsg.guard.attachment.Attachment`.
    """
    with nullcontext() if guard is None else guard.attached(model, **options) as attachment:
        yield Forward(model, attachment)
