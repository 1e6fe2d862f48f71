"""Several guards at one hook point, one per forget request."""

from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import nn

from dsg.attachment import Attachment, Continuation, DecisionRule, attach
from dsg.errors import UserError
from dsg.guard import Guard


class GuardStack(nn.Module):
    """Guards that read the same unedited stream and decide independently of each other.

    Each triggered guard makes its own edit. Where several would write the same feature of the same
    token, the oldest of those that write there does, once.

    Args:
        guards: Oldest first.

    Raises:
        UserError: If guards differ in hook point or come from different SAEs.
    """

    def __init__(self, guards: Iterable[Guard] = ()) -> None:
        super().__init__()
        self._guards = nn.ModuleList()
        for guard in guards:
            self.append(guard)

    @property
    def guards(self) -> list[Guard]:
        """The guards, oldest first."""
        return [guard for guard in self._guards if isinstance(guard, Guard)]

    def __len__(self) -> int:
        return len(self._guards)

    def append(self, guard: Guard) -> None:
        """Adds a guard, as the youngest.

        Raises:
            UserError: If it does not fit the others.
        """
        for other in self.guards:
            if other.hook_point != guard.hook_point:
                raise UserError(
                    f"guards of a stack must share one hook point, got {other.hook_point!r} and "
                    f"{guard.hook_point!r}; build both at the same one."
                )
            _check_same_sae(other, guard)
        self._guards.append(guard)

    def attached(
        self,
        model: nn.Module,
        decision: DecisionRule = "sequence",
        continuation: Continuation = "running",
    ) -> AbstractContextManager[Attachment]:
        """Guards the model inside a `with` block; see `dsg.attachment.attach`."""
        return attach(self.guards, model, decision, continuation)


def _check_same_sae(older: Guard, younger: Guard) -> None:
    # Equal ids mean equal features only within one SAE.
    for column, feature_id in enumerate(younger.feature_ids):
        if feature_id in older.feature_ids:
            mine = younger.features.W_dec[column]
            theirs = older.features.W_dec[older.feature_ids.index(feature_id)]
            if not torch.equal(mine.cpu(), theirs.cpu()):
                raise UserError(
                    "guards of a stack must come from one SAE, but feature "
                    f"{feature_id} has different decoder rows; rebuild them with the same SAE."
                )
