"""Several guards in one forward pass: what each reads, how they decide, what is written."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dsg.errors import UserError
from dsg.guard.edit import Edit, Write, apply_writes
from dsg.guard.gate import Evidence, Gate, decide
from dsg.lm import ModelIdentity
from dsg.sae import Features, check_finite

Policy = Literal["own", "any", "majority"]


class GuardLike(Protocol):
    """A guard as its hooks and its files see it; see `dsg.guard.guard.Guard`."""

    features: Features
    gate: Gate
    edit: Edit
    hook_point: str
    uncounted_ids: list[int]
    pad_id: int | None
    model: ModelIdentity | None
    facts: dict[str, Any]

    @property
    def num_selected(self) -> int:
        """Number of selected features, on which the gate looks."""
        ...


@dataclass
class ForwardPass:
    """One forward pass between its first and its last hook; lists are by guard.

    What the layers add is assigned, not accumulated: activation checkpointing may run one twice.

    Attributes:
        counted: Counted tokens.
        prompt: Prompt positions; None where a whole new input decides.
        earlier: What the tokens in the KV cache said; None for a new input.
        num_positions: Positions that the cache holds afterwards, padding included.
        order: Layers with guards, as they ran.
        evidence: What the tokens said, by index of the guard.
        votes: Each guard's own decision at each position.
        acted: Whether the guard was to edit the sequence.
        seen: What each layer put out before any edit; kept for recomputing gradients only.
        finished: Whether the decoder has returned.
    """

    counted: list[Tensor]
    prompt: Bool[Tensor, "batch seq"] | None
    earlier: list[Evidence] | None
    num_positions: int
    order: list[nn.Module] = field(default_factory=list)
    evidence: dict[int, Evidence] = field(default_factory=dict)
    votes: dict[int, Tensor] = field(default_factory=dict)
    acted: dict[int, Tensor] = field(default_factory=dict)
    seen: dict[nn.Module, Tensor] = field(default_factory=dict)
    finished: bool = False


class GuardGroup:
    """Guards at their layers.

    Args:
        guards: Guards, oldest first.
        layers: The hook point of each.
        policy: Who edits a sequence; see `dsg.guard.attachment.Attachment`.
        running: Whether tokens after the prompt extend the evidence.

    Raises:
        UserError: If guards of one layer come from different SAEs.
    """

    def __init__(
        self,
        guards: Sequence[GuardLike],
        layers: Sequence[nn.Module],
        policy: Policy,
        *,
        running: bool,
    ) -> None:
        self.guards = list(guards)
        self._policy, self._running = policy, running
        self._at: dict[nn.Module, list[int]] = {layer: [] for layer in layers}
        for index, layer in enumerate(layers):
            for other in self._at[layer]:
                check_same_sae(self.guards[other], self.guards[index])
            self._at[layer].append(index)
        self._features = [guard.features for guard in guards]

    @property
    def layers(self) -> list[nn.Module]:
        """Layers with guards."""
        return list(self._at)

    def edit(
        self, forward: ForwardPass, layer: nn.Module, h: Float[Tensor, "batch seq d_in"]
    ) -> Float[Tensor, "batch seq d_in"]:
        """Lets the guards of a layer decide about its output, noted in `forward`, and edit it.

        Returns:
            The edited output; the very tensor `h` where nothing is written.

        Raises:
            UserError: If activations are not finite, not as wide as the features, or those of an
                earlier pass than this one.
        """
        # Recomputing repeats the very operations, give or take rounding on an accelerator.
        if forward.finished and not torch.allclose(h, forward.seen[layer], 1e-2, 1e-2):
            raise UserError(
                "gradient checkpointing must recompute a guarded module for the latest forward "
                "pass, got activations of an earlier one; call `backward` before the next pass."
            )
        forward.seen[layer] = h.detach()
        if layer not in forward.order:
            forward.order.append(layer)
        # All guards of the layer look before the first one writes.
        acts = {index: self._look(forward, index, h) for index in self._at[layer]}
        writes = [self._write(forward, layer, index, h, z) for index, z in acts.items()]
        return apply_writes(h, writes)

    def _look(self, forward: ForwardPass, index: int, h: Tensor) -> Tensor:
        """Activations of a guard's features; `forward` takes down its decision."""
        guard = self.guards[index]
        features = self._features[index] = self._features[index].on(h.device)
        counted = forward.counted[index].to(h.device)
        check_finite(h, counted, guard.hook_point)
        feature_acts = features.encode(h)  # [batch, seq, k]
        forward.votes[index], forward.evidence[index] = decide(
            guard.gate,
            feature_acts[..., : guard.num_selected] > 0,
            counted,
            forward.prompt.to(h.device) if forward.prompt is not None else None,
            forward.earlier[index] if forward.earlier is not None else None,
            running=self._running,
        )
        return feature_acts

    def _write(
        self, forward: ForwardPass, layer: nn.Module, index: int, h: Tensor, feature_acts: Tensor
    ) -> Write:
        positions = self._positions(forward, layer, index)  # [batch, seq]
        forward.acted[index] = positions.any(1)
        positions = positions & forward.counted[index].to(h.device)
        return self.guards[index].edit.write(self._features[index], h, feature_acts, positions)

    def _positions(
        self, forward: ForwardPass, layer: nn.Module, index: int
    ) -> Bool[Tensor, "batch seq"]:
        """Where a guard may edit."""
        own = forward.votes[index]
        if self._policy == "own":
            return own
        # A layer that checkpointing runs again must not hear those that ran after it.
        heard = forward.order[: forward.order.index(layer) + 1]
        voters = [voter for earlier in heard for voter in self._at[earlier]]
        votes = [forward.votes[voter].to(own.device) for voter in voters]
        num_open = torch.stack(votes).sum(0)  # [batch, seq]
        return num_open > (0 if self._policy == "any" else len(votes) / 2)


def check_same_sae(older: GuardLike, younger: GuardLike) -> None:
    """Refuses two guards of one hook point that come from different SAEs.

    Raises:
        UserError: If a feature of both has different decoder rows.
    """
    # Equal ids mean equal features only within one SAE.
    older_ids = older.features.feature_ids.tolist()
    for column, feature_id in enumerate(younger.features.feature_ids.tolist()):
        if feature_id in older_ids:
            mine = younger.features.W_dec[column]
            theirs = older.features.W_dec[older_ids.index(feature_id)]
            if not torch.equal(mine.cpu(), theirs.cpu()):
                raise UserError(
                    "guards of one hook point must come from one SAE, but feature "
                    f"{feature_id} has different decoder rows; rebuild them with the same SAE."
                )
