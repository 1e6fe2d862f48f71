"""The ordinary attack: fine-tuning on text."""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from dsg.attacks.attacker import Attacker, AttackLoss
from dsg.guard import Forward, Guard
from dsg.lm import TokenBatch


class Task(Attacker):
    """Next-token cross-entropy."""

    name: ClassVar[str] = ""

    def __call__(self, forward: Forward, batch: TokenBatch, guard: Guard | None) -> AttackLoss:
        """See `Attacker`."""
        del guard
        return AttackLoss(next_token_loss(forward, batch), {})


def next_token_loss(forward: Forward, batch: TokenBatch) -> Float[Tensor, ""]:
    """Mean cross-entropy over the real tokens of a batch, in nats."""
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    return forward(batch, labels=labels, use_cache=False).loss
