"""Several guards at once: several forget requests, or several layers."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import get_args

from torch import nn

from dsg.errors import check_choice
from dsg.guard.attachment import Attachment, Continuation, DecisionRule, attach
from dsg.guard.guard import Guard
from dsg.guard.panel import Policy, check_same_sae


class GuardStack(nn.Module):
    """Guards of one or several hook points, whose decisions do not depend on each other there.

    All guards of a hook point read the same unedited stream; those of later layers read what
    earlier ones have edited. Where several would write the same feature of the same token, the
    oldest of those that write there does, once.

    Args:
        guards: Oldest first.
        policy: Who edits a sequence: each guard by its `own` decision, all of them once `any` has
            decided so, or once a `majority` has; guards of layers that are yet to run have no vote.

    Raises:
        UserError: If guards of one hook point come from different SAEs, or the policy is unknown.
    """

    def __init__(self, guards: Iterable[Guard] = (), policy: Policy = "own") -> None:
        super().__init__()
        check_choice("policy", policy, get_args(Policy))
        self.policy: Policy = policy
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
            if other.hook_point == guard.hook_point:
                check_same_sae(other, guard)
        self._guards.append(guard)

    def attached(
        self,
        model: nn.Module,
        decision: DecisionRule = "sequence",
        continuation: Continuation = "running",
    ) -> AbstractContextManager[Attachment]:
        """Guards the model inside a `with` block; see `dsg.guard.attachment.attach`."""
        return attach(self.guards, model, decision, continuation, self.policy)
