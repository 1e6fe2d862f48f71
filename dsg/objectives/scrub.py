"""SCRUB: a student that strays from its teacher on forget text and follows it on retain text.

Kurmanji et al., "Towards Unbounded Machine Unlearning", 2023, Eq. 3. The teacher is the reference.
"""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsg.errors import UserError
from dsg.lm import Reference, TokenBatch, mean_kl, mean_nll, next_token_logits
from dsg.objectives.objective import Objective
from dsg.objectives.terms import Loss, check_not_negative, check_positive, required


class SCRUB(Objective):
    """Max steps: -beta * KL_T(forget). Min steps: alpha * KL_T(retain) + gamma * NLL(retain).

    KL_T = temperature^2 * KL(reference || model) of the distributions softmax(logits /
    temperature), per target; the NLL is per target too. Called with a step number, max and min
    steps alternate, a max step first, and after `max_steps` only min steps follow, which repair
    what the max steps broke. The published code alternates whole epochs instead, one over the
    forget set before one over the retain set, and counts `msteps` in epochs. Called without a step
    number, both terms are added, which is the objective as the paper writes it.

    At the reference the KL terms are zero and their gradients are rounding errors, so that the
    first max step has no direction. Plain SGD stays where it is; AdamW, which divides a gradient
    by its size, takes a step of up to its learning rate all the same.

    The defaults are those of the DSG paper's Table 5. It fixes alpha, gamma and the temperature and
    sweeps a "beta" that it does not explain; here that is the weight of the forget term.

    Args:
        alpha: Weight of the divergence on retain text, >= 0.
        beta: Weight of the divergence on forget text, >= 0.
        gamma: Weight of the likelihood of retain text, >= 0.
        temperature: T above, > 0.
        max_steps: Steps during which every other one, the first included, is a max step; None
            alternates to the end.

    Raises:
        UserError: A weight is negative, the temperature is not positive, or `max_steps` is below 1.
    """

    name: ClassVar[str] = "scrub"
    needs_reference = True

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 2.0,
        max_steps: int | None = None,
    ) -> None:
        check_not_negative(alpha=alpha, beta=beta, gamma=gamma)
        check_positive(temperature=temperature)
        if max_steps is not None and max_steps < 1:
            raise UserError(
                f"`max_steps` must be at least 1, got {max_steps}; use None to alternate always."
            )
        self.alpha = alpha
        self.beta = beta
        self.gamma = gamma
        self.temperature = temperature
        self.max_steps = max_steps

    def maximises(self, step: int) -> bool:
        """Whether a step, counted from 0, is a max step."""
        return step % 2 == 0 and (self.max_steps is None or step < self.max_steps)

    def __call__(
        self,
        model: nn.Module,
        forget: TokenBatch,
        retain: TokenBatch,
        *,
        reference: Reference | None = None,
        step: int | None = None,
    ) -> Loss:
        """The loss on a forget and a retain batch.

        Args:
            model: The student.
            forget: Not run in a min step.
            retain: Not run in a max step.
            reference: The teacher.
            step: Optimizer steps taken so far; None adds both terms.

        Returns:
            `forget` is -KL_T(forget), `retain` the weighted sum of the two retain terms; 0 for the
            one that is not run.
        """
        teacher = required(reference, "SCRUB")
        zero = torch.zeros((), device=forget.input_ids.device)
        forget_loss, retain_loss = zero, zero
        if step is None or self.maximises(step):
            forget_loss = -self._divergence(teacher, next_token_logits(model, forget), forget)
        if step is None or not self.maximises(step):
            logits = next_token_logits(model, retain)
            divergence = self._divergence(teacher, logits, retain)
            retain_loss = self.alpha * divergence + self.gamma * mean_nll(logits, retain)
        return Loss(self.beta * forget_loss + retain_loss, forget_loss, retain_loss)

    def _divergence(
        self, teacher: Reference, logits: Float[Tensor, "batch seq vocab"], batch: TokenBatch
    ) -> Float[Tensor, ""]:
        divergence = mean_kl(teacher.logits(batch), logits, batch, self.temperature)
        # Squared, so that the gradient keeps its size whatever the temperature (Hinton et al.).
        return self.temperature**2 * divergence
