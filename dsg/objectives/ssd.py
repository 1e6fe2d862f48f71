"""Selective synaptic dampening (SSD): shrink the weights that matter far more for forget text.

No gradient descent: two passes over the data measure every weight's importance, one step changes
the weights. Foster et al., "Fast Machine Unlearning Without Retraining Through Selective Synaptic
Dampening", 2024, Eqs. 3 and 4.
"""

from collections.abc import Iterable, Mapping
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsg.errors import UserError
from dsg.lm import (
    TokenBatch,
    evaluating,
    mean_nll,
    mean_or_zero,
    next_token_logits,
    target_mask,
)
from dsg.objectives.objective import OneShot
from dsg.objectives.terms import Loss, check_positive


class DiagonalFisher:
    """Sums the squared gradients of a model's loss over sequences, batch after batch.

    Each sequence counts with the square of the gradient of its negative log-likelihood per target:
    the published importance with batches of one, so that padding, order and batch size change
    nothing. (The published code squares the gradient of a batch's mean.) Takes one backward pass
    per sequence and float32 memory for one more copy of the weights.

    Attributes:
        sums: Squared gradients by weight name, float32.
        num_sequences: Sequences behind them, those without a target left out; an int64 number.

    Args:
        model: A causal LM; its weights that require gradients are measured.

    Raises:
        UserError: No weight requires gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.num_sequences = torch.zeros((), dtype=torch.long)
        self.sums = {
            name: torch.zeros_like(weight, dtype=torch.float32)
            for name, weight in _measured(model).items()
        }

    def update(self, batch: TokenBatch) -> Float[Tensor, ""]:
        """Add the sequences of a batch; the model runs in evaluation mode, its `grad`s stay.

        Returns:
            Mean over the sequences of their negative log-likelihood per target, in nats.
        """
        losses = torch.zeros(0, device=batch.input_ids.device)
        weights = _measured(self._model)
        with torch.enable_grad(), evaluating(self._model):
            for row in _rows(batch):
                loss = mean_nll(next_token_logits(self._model, row), row)
                # A weight may be unused: an expert that no token is routed to.
                gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
                for name, gradient in zip(weights, gradients, strict=True):
                    if gradient is not None:
                        self.sums[name] += gradient.float().square()
                self.num_sequences += 1
                losses = torch.cat([losses, loss.detach()[None]])
        return mean_or_zero(losses)

    def tensors(self) -> list[Tensor]:
        """All sums, which may be added up in place over batches and ranks."""
        return [*self.sums.values(), self.num_sequences]

    def mean(self) -> dict[str, Tensor]:
        """Importance by weight name: the mean over sequences, >= 0.

        Raises:
            UserError: No sequence had a target.
        """
        if self.num_sequences == 0:
            raise UserError(
                "the texts must hold at least one sequence with two counted tokens, got none; "
                "give longer texts."
            )
        return {name: total / int(self.num_sequences) for name, total in self.sums.items()}


class Importances(NamedTuple):
    """What both texts need every weight for."""

    forget: DiagonalFisher
    retain: DiagonalFisher


class Dampening(NamedTuple):
    """What SSD did to a model."""

    num_selected: int
    """Weights (single numbers) whose importance for forget text passed the threshold."""
    num_weights: int
    """Weights that were measured."""


class SSD(OneShot):
    """theta <- theta * min(lambda F_retain / F_forget, 1) wherever F_forget > alpha F_retain.

    Calls sum importances up, `finish` changes the weights; there is nothing to descend on.

    The published method takes F of the whole training set in place of F_retain: pass such batches
    as `retain` for that. The defaults are the method's own; the DSG paper sweeps both (Table 6:
    threshold 0.1 to 5, dampening 1e-5 to 1).

    Args:
        selection_threshold: alpha of the paper, >= 0; infinity selects nothing.
        dampening: lambda of the paper, > 0; smaller ones leave less of the selected weights.

    Raises:
        UserError: One of them is out of its range.
    """

    name: ClassVar[str] = "ssd"

    def __init__(self, *, selection_threshold: float = 10.0, dampening: float = 1.0) -> None:
        # NaN compares false.
        if not selection_threshold >= 0:
            raise UserError(
                f"`selection_threshold` must be at least 0, got {selection_threshold}; raise it."
            )
        check_positive(dampening=dampening)
        self.selection_threshold = selection_threshold
        self.dampening = dampening

    def prepare(self, model: nn.Module) -> None:
        """Begin with no importances; weights that require gradients may change.

        Raises:
            UserError: No weight requires gradients.
        """
        self.importances = Importances(DiagonalFisher(model), DiagonalFisher(model))

    def sums(self) -> list[Tensor]:
        """The squared gradients and numbers of sequences of both texts."""
        return [tensor for fisher in self.importances for tensor in fisher.tensors()]

    def measure(
        self, model: nn.Module, forget: TokenBatch, retain: TokenBatch
    ) -> tuple[list[Tensor], Loss]:
        """The importances of a batch; the parts of the loss are the likelihoods of its texts."""
        part = Importances(DiagonalFisher(model), DiagonalFisher(model))
        forget_nll, retain_nll = part.forget.update(forget), part.retain.update(retain)
        added = [*part.forget.tensors(), *part.retain.tensors()]
        return added, Loss(torch.zeros_like(forget_nll), forget_nll, retain_nll)

    def finish(self, model: nn.Module) -> None:
        """Change the model's weights in place.

        Raises:
            UserError: One of the two texts had no target.
        """
        self.dampen(model, self.importances.forget.mean(), self.importances.retain.mean())

    @torch.no_grad()
    def dampen(
        self, model: nn.Module, forget: Mapping[str, Tensor], retain: Mapping[str, Tensor]
    ) -> Dampening:
        """Change the model's weights in place, given the importances by weight name."""
        num_selected = num_weights = 0
        for name, weight in _measured(model).items():
            for_forget, for_retain = (text[name].to(weight.device) for text in (forget, retain))
            # Infinity times 0 is NaN, which selects nothing either.
            selected = for_forget > self.selection_threshold * for_retain
            # Only selected weights are divided, and those have an importance above 0.
            factor = (self.dampening * for_retain / for_forget).clamp(max=1.0)
            weight.copy_(torch.where(selected, weight.float() * factor, weight.float()))
            num_selected += int(selected.sum())
            num_weights += weight.numel()
        return Dampening(num_selected, num_weights)


def _measured(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that require gradients by name, tied ones once."""
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if not weights:
        raise UserError(
            "`model` must have weights that require gradients, got none; call requires_grad_(True) "
            "on those that SSD may change."
        )
    return weights


def _rows(batch: TokenBatch) -> Iterable[TokenBatch]:
    """The sequences of a batch that have a target, one by one and without their padding."""
    for index in target_mask(batch).any(dim=1).nonzero()[:, 0].tolist():
        real = batch.attention_mask[index] != 0
        yield TokenBatch(
            batch.input_ids[index, real][None],
            batch.attention_mask[index, real][None],
            batch.token_mask[index, real][None],
        )
