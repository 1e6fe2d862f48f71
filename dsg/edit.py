"""The edit: clamping features by adding a delta to the residual stream."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dsg.sae import FeatureSlice

ClampScope = Literal["all", "active"]


@dataclass(frozen=True)
class Clamp:
    """One guard's wish for one forward pass.

    Attributes:
        features: The guard's features.
        feature_acts: Their activations in the unedited stream.
        entries: Which feature is to be written at which token.
        value: What to write, in activation units.
    """

    features: FeatureSlice
    feature_acts: Float[Tensor, "batch seq k"]
    entries: Bool[Tensor, "batch seq k"]
    value: float


def clamp_entries(
    feature_acts: Float[Tensor, "batch seq k"],
    positions: Bool[Tensor, "batch seq"],
    clamp_scope: ClampScope,
) -> Bool[Tensor, "batch seq k"]:
    """Which features are written: at the given positions, where any selected feature is active.

    Args:
        feature_acts: Activations of the selected features.
        positions: Counted positions of triggered sequences.
        clamp_scope: `all` writes every selected feature there, `active` only the active ones.
    """
    active = (feature_acts > 0) & positions[..., None]
    return active if clamp_scope == "active" else active.any(-1, keepdim=True).expand_as(active)


def apply_clamps(
    h: Float[Tensor, "batch seq d_in"], clamps: Sequence[Clamp]
) -> Float[Tensor, "batch seq d_in"]:
    """Adds (z' - z)[S] @ W_dec[S] of every clamp, oldest first, to the unedited stream.

    Where several clamps write the same feature of the same token, the oldest writes it. The SAE's
    error term and every unedited position stay bit-identical; the very tensor `h` is returned
    where nothing is written. Gradients flow through `h` and `z`; the entries are constants.

    Args:
        h: Unedited hook-point activations.
        clamps: What to write.

    Returns:
        Edited activations in the dtype of `h`; the sum is formed at least in float32.
    """
    total, edited = h, None
    for index, clamp in enumerate(clamps):
        entries = clamp.entries & ~_written(clamp, clamps[:index])
        if not entries.any():
            continue
        z = clamp.feature_acts
        with torch.autocast(h.device.type, enabled=False):
            delta = torch.where(entries, clamp.value - z, 0.0) @ clamp.features.W_dec.to(z.dtype)
        total = total.to(torch.promote_types(total.dtype, delta.dtype)) + delta
        here = entries.any(-1, keepdim=True)
        edited = here if edited is None else edited | here
    return h if edited is None else torch.where(edited, total.to(h.dtype), h)


def _written(clamp: Clamp, older: Sequence[Clamp]) -> Bool[Tensor, "batch seq k"]:
    """Entries of `clamp` that an older clamp writes."""
    taken = torch.zeros_like(clamp.entries)
    for other in older:
        same = other.features.feature_ids[:, None] == clamp.features.feature_ids[None, :]
        taken = taken | ((other.entries.float() @ same.float()) > 0)
    return taken
