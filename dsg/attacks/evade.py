"""The attacker who knows the guard and trains to stay under its gate."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dsg.attacks.attacker import Attacker, AttackLoss
from dsg.attacks.task import next_token_loss
from dsg.errors import UserError
from dsg.guard import Forward, Guard
from dsg.lm import TokenBatch, hidden_states, resolve_hook_point


class Evade(Attacker):
    """Next-token cross-entropy plus `weight` times the batch's mean soft density.

    Args:
        weight: Nats that a density of 1 costs, above 0.
        softness: See `soft_density`, above 0.

    Raises:
        UserError: One of the two is not above 0.
    """

    name: ClassVar[str] = "evade"
    needs_guard: ClassVar[bool] = True

    def __init__(self, weight: float = 1.0, softness: float = 0.3) -> None:
        for argument, value in (("weight", weight), ("softness", softness)):
            if not 0.0 < value < float("inf"):
                raise UserError(
                    f"`{argument}` of the attacker must be finite and above 0, got {value}; use "
                    "dsg.attacks.Task for an attack without evasion."
                )
        self.weight = weight
        self.softness = softness

    def __call__(self, forward: Forward, batch: TokenBatch, guard: Guard | None) -> AttackLoss:
        """See `Attacker`."""
        assert guard is not None
        with _captured(forward.model, guard.hook_point) as captured:
            task = next_token_loss(forward, batch)
        [h] = captured
        density = soft_density(guard, h, batch.token_mask, self.softness).mean()
        return AttackLoss(task + self.weight * density, {"task": task, "soft_density": density})


def soft_density(
    guard: Guard,
    h: Float[Tensor, "batch seq d_in"],
    token_mask: Bool[Tensor, "batch seq"],
    softness: float,
) -> Float[Tensor, " batch"]:
    """A differentiable stand-in for the density of each sequence.

    With u_j(t) the distance of feature j from firing at token t (above 0 exactly where it is
    active; `Features.margin`), and s = `softness` times the root mean square of all finite u_j(t)
    of the batch, a constant for the gradient,

        soft density(x) = mean over counted t of sigmoid(max over selected j of u_j(t) / s).

    It tends to rho as `softness` goes to 0. The maximum, not a product over features, keeps the
    sigmoid away from saturation, where an attacker would get no gradient. Where a competing feature
    is not active it contributes nothing: such features are only pushed out, never kept away.

    Args:
        guard: Whose selected features count.
        h: Activations at its hook point, before any edit.
        token_mask: Counted tokens.
        softness: Width of the sigmoid, in root mean squares, above 0.

    Returns:
        Values in [0, 1]; 0 for a sequence without a counted token.
    """
    margins = guard.features.on(h.device).margin(h)[..., : guard.num_selected]
    counted = margins.detach()[token_mask]
    finite = counted[counted.isfinite()]
    scale = softness * finite.square().mean().sqrt() if finite.numel() else h.new_tensor(1.0)
    soft = torch.sigmoid(margins.amax(-1) / scale.clamp(min=torch.finfo(scale.dtype).tiny))
    return (soft * token_mask).sum(1) / token_mask.sum(1).clamp(min=1)


@contextmanager
def _captured(model: nn.Module, hook_point: str) -> Iterator[list[Tensor]]:
    """The hook point's outputs, unedited and with their gradients, of the passes inside."""
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        outputs.append(hidden_states(output))

    # In front of every other hook: a guard in the loop edits what follows.
    handle = resolve_hook_point(model, hook_point).register_forward_hook(keep, prepend=True)
    try:
        yield outputs
    finally:
        handle.remove()
