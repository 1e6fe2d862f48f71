"""The edit: writing features by adding a delta to the residual stream."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dsg.sae import Features

ClampScope = Literal["all", "active"]
# `clamp` writes the selected features; `refusal` leaves them and writes another one.
ClampUnit = Literal["activation", "residual_norm"]
Edit = Literal["clamp", "refusal"]


@dataclass(frozen=True)
class Write:
    """What one guard writes in one forward pass.

    Attributes:
        features: The guard's features.
        feature_acts: Their activations in the unedited stream.
        entries: Which feature is to be written at which token.
        value: What to write.
        output_scale: Residual units per unit of decoder output; None where they are the same.
        in_residual_units: Whether `value` is what the decoder row is to be multiplied by in the
            residual stream, else an activation.
    """

    features: Features
    feature_acts: Float[Tensor, "batch seq k"]
    entries: Bool[Tensor, "batch seq k"]
    value: float
    output_scale: Float[Tensor, "batch seq 1"] | None = None
    in_residual_units: bool = False


def clamp_entries(
    feature_acts: Float[Tensor, "batch seq k"],
    positions: Bool[Tensor, "batch seq"],
    clamp_scope: ClampScope,
    limit: float = 0.0,
) -> Bool[Tensor, "batch seq k"]:
    """Which features are written: at the given positions, where any selected feature is active.

    Args:
        feature_acts: Activations of the selected features.
        positions: Counted positions of triggered sequences.
        clamp_scope: `all` writes every selected feature there, `active` only the active ones.
        limit: Activation above which a feature is active, at least 0.
    """
    active = (feature_acts > limit) & positions[..., None]
    return active if clamp_scope == "active" else active.any(-1, keepdim=True).expand_as(active)


def refusal_entries(
    feature_acts: Float[Tensor, "batch seq k"],
    positions: Bool[Tensor, "batch seq"],
    limit: float = 0.0,
) -> Bool[Tensor, "batch seq k"]:
    """Refusal Clamp: the last feature alone is written, where any of the others is active.

    Args:
        feature_acts: Activations of the selected features, and last those of the one to write.
        positions: Counted positions of triggered sequences.
        limit: Activation above which a feature is active, at least 0.
    """
    active = (feature_acts[..., :-1] > limit).any(-1, keepdim=True) & positions[..., None]
    return torch.cat([torch.zeros_like(feature_acts[..., :-1], dtype=torch.bool), active], -1)


def apply_clamps(
    h: Float[Tensor, "batch seq d_in"], clamps: Sequence[Write]
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
        z, value, scale = clamp.feature_acts, clamp.value, clamp.output_scale
        with torch.autocast(h.device.type, enabled=False):
            if scale is not None:
                z, value = z * scale, value if clamp.in_residual_units else value * scale
            delta = torch.where(entries, value - z, 0.0) @ clamp.features.W_dec.to(z.dtype)
        total = total.to(torch.promote_types(total.dtype, delta.dtype)) + delta
        here = entries.any(-1, keepdim=True)
        edited = here if edited is None else edited | here
    return h if edited is None else torch.where(edited, total.to(h.dtype), h)


def _written(clamp: Write, older: Sequence[Write]) -> Bool[Tensor, "batch seq k"]:
    """Entries of `clamp` that an older clamp writes."""
    taken = torch.zeros_like(clamp.entries)
    for other in older:
        same = other.features.feature_ids[:, None] == clamp.features.feature_ids[None, :]
        taken = taken | ((other.entries.float() @ same.float()) > 0)
    return taken
