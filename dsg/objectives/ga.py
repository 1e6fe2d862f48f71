"""Gradient ascent (GA): make the forget text unlikely, and nothing else.

Jang et al., "Knowledge Unlearning for Mitigating Privacy Risks in Language Models", 2023.
"""

from typing import ClassVar

import torch
from torch import nn

from dsg.lm import Reference, TokenBatch, mean_nll, next_token_logits
from dsg.objectives.objective import Objective
from dsg.objectives.terms import Loss


class GradientAscent(Objective):
    """-NLL(forget) per target: GA has nothing to set.

    Unbounded below: it ruins the model unless it is stopped early or its gradients are clipped. The
    row "GA" of the DSG paper's Tables 1 and 8 has a retain weight and is `GradDiff` here.
    """

    name: ClassVar[str] = "ga"

    def __call__(
        self,
        model: nn.Module,
        forget: TokenBatch,
        retain: TokenBatch,
        *,
        reference: Reference | None = None,
        step: int | None = None,
    ) -> Loss:
        """The loss on a forget batch; the retain batch is not run."""
        del reference, step
        loss = -mean_nll(next_token_logits(model, forget), forget)
        return Loss(loss, loss, torch.zeros((), device=retain.input_ids.device))
