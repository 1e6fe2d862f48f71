"""What every attacker's objective has in common."""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from jaxtyping import Float
from torch import Tensor

from dsg.guard import Forward, Guard
from dsg.lm import TokenBatch


class AttackLoss(NamedTuple):
    """The loss that is minimised, and what it consists of."""

    total: Float[Tensor, ""]
    parts: dict[str, Float[Tensor, ""]]
    """Terms before weighting, by the name under which they are logged."""


class Attacker(ABC):
    """An objective of fine-tuning; constructors take hyper-parameters only."""

    name: ClassVar[str]
    """What is appended to the `attack` column; empty for the ordinary attack."""
    needs_guard: ClassVar[bool] = False
    """Whether it has to know the guard, be that in the forward pass or not."""

    @abstractmethod
    def __call__(self, forward: Forward, batch: TokenBatch, guard: Guard | None) -> AttackLoss:
        """The loss of one batch.

        Args:
            forward: Runs the attacked model, under the guard where the attacker trains through it.
            batch: The attacker's text.
            guard: What the attacker knows of the defence; not None if `needs_guard`.
        """
