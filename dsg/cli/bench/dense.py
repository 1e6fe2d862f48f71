"""The clamp with the whole SAE, as the method's released code computes it: a reference.

A guard computes the same from a few features (`dsg.guard.edit`); this is what it is measured
against.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

if TYPE_CHECKING:
    from sae_lens import SAE


@torch.no_grad()
def dense_clamp(
    sae: "SAE[Any]",
    h: Float[Tensor, "batch seq d_in"],
    token_mask: Bool[Tensor, "batch seq"],
    feature_ids: Sequence[int],
    threshold: float,
    clamp_value: float,
) -> Float[Tensor, "batch seq d_in"]:
    """Encodes all features, decodes them with and without the clamp, and adds the difference.

    h' = decode(z') + (h - decode(z)), where z' holds `clamp_value` for all selected features at
    counted tokens of triggered sequences on which any of them is active.

    Args:
        sae: The whole SAE, in the dtype to compute in.
        h: Hook-point activations in that dtype.
        token_mask: True for counted tokens; the features of others are set to 0.
        feature_ids: The selected features.
        threshold: Density strictly above which a sequence is triggered (tau).
        clamp_value: Value written to the selected features, sign included (-c).

    Returns:
        Edited activations; an untriggered sequence equals its input up to rounding only.
    """
    feature_acts = sae.encode(h)
    feature_acts[~token_mask] = 0.0
    ids = torch.tensor(list(feature_ids), device=h.device)
    selected = feature_acts[..., ids]
    fired = (selected > 0).any(-1)
    triggered = fired.sum(1) / token_mask.sum(1).clamp(min=1) > threshold
    written = fired & triggered[:, None]
    modified = feature_acts.clone()
    modified[..., ids] = selected.masked_fill(written[..., None], clamp_value)
    error = h - sae.decode(feature_acts)
    return sae.decode(modified) + error
