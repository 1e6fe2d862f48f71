"""Task-vector negation: learn the forget text, then walk the other way.

Ilharco et al., "Editing Models with Task Arithmetic", 2023, section 3.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from dsg.errors import UserError
from dsg.lm import Reference, TokenBatch, mean_nll, next_token_logits
from dsg.objectives.objective import Objective
from dsg.objectives.terms import Loss, check_not_negative


class TaskVector(Objective):
    """Fine-tuning with NLL(forget) per target; `finish` then mirrors what it changed.

    theta = theta_ref - scale * (theta_finetuned - theta_ref), with theta_ref the weights that
    `prepare` found and kept: one more copy of what is trained. For a LoRA adapter the
    task vector is the product B A, so that B is mirrored and A stays.

    The default scale is that of MUSE's command line, whose scripts take 5; the method's own grid is
    0.05 to 1. The DSG paper has no such baseline.

    Args:
        scale: How far to go, >= 0: 0 gives the original weights back.

    Raises:
        UserError: `scale` is negative.
    """

    name: ClassVar[str] = "task_vector"
    changes_at_end: ClassVar[bool] = True

    def __init__(self, *, scale: float = 1.0) -> None:
        check_not_negative(scale=scale)
        self.scale = scale
        self._original: dict[str, Tensor] = {}

    def prepare(self, model: nn.Module) -> None:
        """Keep the weights that require gradients; their change will be the task vector.

        Raises:
            UserError: No weight requires gradients, or an adapter is not new.
        """
        self._original = {name: weight.detach().clone() for name, weight in _moving(model).items()}
        if not self._original:
            raise UserError(
                "`model` must have weights that require gradients, got none; call "
                "requires_grad_(True) on those that fine-tuning may change."
            )
        for name, weight in self._original.items():
            if _is_lora(name, "B") and bool(weight.any()):
                raise UserError(
                    f"the adapter must be new (B = 0) for a task vector, but {name!r} is not 0; "
                    "merge it into the weights and start another."
                )

    def __call__(
        self,
        model: nn.Module,
        forget: TokenBatch,
        retain: TokenBatch,
        *,
        reference: Reference | None = None,
        step: int | None = None,
    ) -> Loss:
        """The loss of fine-tuning on a forget batch; the retain batch is not run."""
        del reference, step
        loss = mean_nll(next_token_logits(model, forget), forget)
        return Loss(loss, loss, torch.zeros((), device=retain.input_ids.device))

    @torch.no_grad()
    def finish(self, model: nn.Module) -> None:
        """Mirror the fine-tuned weights in place, in float32."""
        for name, weight in _moving(model).items():
            original = self._original[name].to(weight.device).float()
            weight.copy_(original - self.scale * (weight.float() - original))


def _moving(model: nn.Module) -> dict[str, Tensor]:
    """The weights that make up the task vector, by name."""
    return {
        name: weight
        for name, weight in model.named_parameters()
        if weight.requires_grad and not _is_lora(name, "A")
    }


def _is_lora(name: str, factor: str) -> bool:
    return f".lora_{factor}." in name or f".lora_embedding_{factor}." in name
