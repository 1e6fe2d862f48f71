"""The edit: writing features by adding a delta to the residual stream.

A new edit is one frozen dataclass here, with fields that it checks itself and `entries`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dsg.errors import UserError, check_choice, check_number
from dsg.sae import Features

EditKind = Literal["clamp", "refusal"]
ClampScope = Literal["all", "active"]
ClampUnit = Literal["activation", "residual_norm"]


@dataclass(frozen=True)
class Write:
    """What one guard writes in one forward pass.

    Attributes:
        features: The guard's features.
        acts: Their activations in the unedited stream, in units of the residual stream.
        entries: Which feature is to be written at which token.
        value: What to write, in the same units.
    """

    features: Features
    acts: Float[Tensor, "batch seq k"]
    entries: Bool[Tensor, "batch seq k"]
    value: float | Float[Tensor, "batch seq 1"]


@dataclass(frozen=True)
class Edit(ABC):
    """What a guard writes at the counted tokens of a triggered sequence.

    Args:
        value: Value written, sign included (-c).
        unit: Unit of `value`: SAE activations, or multiples of `residual_norm`.
        residual_norm: Mean L2 norm of the residual stream at the hook point, above 0.
        trigger_limit: Activation above which a feature is taken as active, at least 0. The gate
            always counts activations above 0.

    Raises:
        UserError: If a field is out of range or a choice unknown.
    """

    kind: ClassVar[EditKind]
    # Features that stand behind the selected ones and matter to the edit alone.
    num_further: ClassVar[int] = 0

    value: float
    _: KW_ONLY
    unit: ClampUnit = "activation"
    residual_norm: float | None = None
    trigger_limit: float = 0.0

    def __post_init__(self) -> None:
        norm, limit = self.residual_norm, self.trigger_limit
        check_number("value", self.value, math.isfinite, "a finite number", "try -500.0")
        check_choice("unit", self.unit, get_args(ClampUnit))
        if norm is None and self.unit == "residual_norm":
            raise UserError(
                "`residual_norm` must be given for the unit 'residual_norm', got None; measure it "
                "or use the unit 'activation'."
            )
        if norm is not None:
            wanted, remedy = "finite and above 0", "measure it on text"
            check_number("residual_norm", norm, lambda v: 0 < v < math.inf, wanted, remedy)
        wanted, remedy = "finite and at least 0", "0 takes every active feature"
        check_number("trigger_limit", limit, lambda v: 0 <= v < math.inf, wanted, remedy)

    @property
    def written_value(self) -> float:
        """`value` as an activation, or for `residual_norm` in units of the residual stream.

        They are the same where the SAE does not rescale its input.
        """
        norm = self.residual_norm if self.unit == "residual_norm" else None
        return self.value if norm is None else self.value * norm

    @abstractmethod
    def entries(
        self, feature_acts: Float[Tensor, "batch seq k"], positions: Bool[Tensor, "batch seq"]
    ) -> Bool[Tensor, "batch seq k"]:
        """Which features are written: at the given positions, where a selected one is active."""

    def write(
        self,
        features: Features,
        h: Float[Tensor, "batch seq d_in"],
        feature_acts: Float[Tensor, "batch seq k"],
        positions: Bool[Tensor, "batch seq"],
    ) -> Write:
        """What is written into a hook point's unedited output `h` at the given positions."""
        entries, value = self.entries(feature_acts, positions), self.written_value
        scale = features.output_scale(h)
        if scale is None:
            return Write(features, feature_acts, entries, value)
        scaled = value if self.unit == "residual_norm" else value * scale
        return Write(features, feature_acts * scale, entries, scaled)


@dataclass(frozen=True)
class Clamp(Edit):
    """Writes the selected features.

    Args:
        value: See `Edit`, as for the further arguments.
        scope: Write `all` selected features where any is active, or only the `active` ones.
    """

    kind = "clamp"
    scope: ClampScope = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("scope", self.scope, get_args(ClampScope))

    def entries(
        self, feature_acts: Float[Tensor, "batch seq k"], positions: Bool[Tensor, "batch seq"]
    ) -> Bool[Tensor, "batch seq k"]:
        """See `Edit`."""
        active = (feature_acts > self.trigger_limit) & positions[..., None]  # [batch, seq, k]
        if self.scope == "active":
            return active
        return active.any(-1, keepdim=True).expand_as(active)


@dataclass(frozen=True)
class Refusal(Edit):
    """Writes another feature, the last, wherever one of the selected ones is active."""

    kind = "refusal"
    num_further = 1

    def entries(
        self, feature_acts: Float[Tensor, "batch seq k"], positions: Bool[Tensor, "batch seq"]
    ) -> Bool[Tensor, "batch seq k"]:
        """See `Edit`."""
        selected = feature_acts[..., :-1] > self.trigger_limit  # [batch, seq, k - 1]
        written = selected.any(-1, keepdim=True) & positions[..., None]  # [batch, seq, 1]
        return torch.cat([torch.zeros_like(selected), written], -1)


def apply_writes(
    h: Float[Tensor, "batch seq d_in"], writes: Sequence[Write]
) -> Float[Tensor, "batch seq d_in"]:
    """Adds (z' - z)[S] @ W_dec[S] of every write, oldest first, to the unedited stream.

    Where several writes name the same feature of the same token, the oldest counts. The SAE's error
    term and every unedited position stay bit-identical; the very tensor `h` is returned where
    nothing is written. Gradients flow through `h` and `z`; the entries are constants. The sum is
    formed at least in float32, and returned in the dtype of `h`.
    """
    total, edited = h, None
    for index, write in enumerate(writes):
        entries = write.entries & ~_taken(write, writes[:index])  # [batch, seq, k]
        if not entries.any():
            continue
        with torch.autocast(h.device.type, enabled=False):
            change = torch.where(entries, write.value - write.acts, 0.0)  # [batch, seq, k]
            delta = change @ write.features.W_dec.to(change.dtype)  # [batch, seq, d_in]
        total = total.to(torch.promote_types(total.dtype, delta.dtype)) + delta
        here = entries.any(-1, keepdim=True)  # [batch, seq, 1]
        edited = here if edited is None else edited | here
    return h if edited is None else torch.where(edited, total.to(h.dtype), h)


def _taken(write: Write, older: Sequence[Write]) -> Bool[Tensor, "batch seq k"]:
    """Entries of `write` that an older one has."""
    taken = torch.zeros_like(write.entries)
    for other in older:
        same = other.features.feature_ids[:, None] == write.features.feature_ids  # [k of other, k]
        taken = taken | ((other.entries.float() @ same.float()) > 0)
    return taken
