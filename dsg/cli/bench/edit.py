"""The guard's edit against the dense one, on random weights of a model's shapes."""

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, median
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dsg.guard import Clamp, DensityGate, apply_writes, decide
from dsg.sae import Features, slice_features

if TYPE_CHECKING:
    from sae_lens import SAE, JumpReLUSAE


@torch.no_grad()
def dense_clamp(
    sae: "SAE[Any]",
    h: Float[Tensor, "batch seq d_in"],
    token_mask: Bool[Tensor, "batch seq"],
    feature_ids: Sequence[int],
    threshold: float,
    clamp_value: float,
) -> Float[Tensor, "batch seq d_in"]:
    """The clamp with the whole SAE, as the method's released code computes it: a reference.

    Encodes all features, decodes them with and without the clamp, and adds the difference.

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


THRESHOLD = 0.5
CLAMP_VALUE = -500.0
# What triggers a sequence: tokens on which a selected feature is active.
FIRED_IN_TRIGGERED = 0.6

# Gemma Scope's SAE of layer 3 has about 100 of 16,384 features active per token.
_ACTIVE_FRACTION = 100 / 16384
_RESIDUAL_STD = 2.0


@dataclass(frozen=True)
class EditCost:
    """The dense edit against the guard's, on one triggered sequence.

    Attributes:
        num_tokens: Length of the sequence.
        num_active: Mean number of active features per token (L0).
        density: Density of the sequence (rho).
        dense_seconds: Median time of the dense edit.
        sliced_seconds: Median time of the guard's edit.
        ratio: `dense_seconds` / `sliced_seconds`.
        lowest_ratio: Lowest ratio among the repeats.
        highest_ratio: Highest ratio among the repeats.
        difference: Largest absolute difference of the two outputs.
        difference_in_eps: The same in units of float32 rounding, eps * max |output|.
        dense_error: Largest absolute difference of the dense output to the dense one in float64.
        sliced_error: Largest absolute difference of the guard's output to the same.
    """

    num_tokens: int
    num_active: float
    density: float
    dense_seconds: float
    sliced_seconds: float
    ratio: float
    lowest_ratio: float
    highest_ratio: float
    difference: float
    difference_in_eps: float
    dense_error: float
    sliced_error: float


def sliced(
    features: Features, h: Float[Tensor, "batch seq d_in"], token_mask: Bool[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq d_in"]:
    """The guard's work at its hook point: encode a few features, decide, add the delta.

    Args:
        features: The selected features.
        h: Hook-point activations.
        token_mask: Counted tokens.
    """
    feature_acts = features.encode(h)
    positions, _ = decide(DensityGate(THRESHOLD), feature_acts > 0, token_mask)
    write = Clamp(CLAMP_VALUE).write(features, h, feature_acts, positions & token_mask)
    return apply_writes(h, [write])


def random_sae(d_in: int, d_sae: int, seed: int) -> "JumpReLUSAE":
    """A JumpReLU SAE with unit decoder rows, of which about 0.6 % are active on random input.

    Args:
        d_in: Width of the hook point.
        d_sae: Number of features.
        seed: Of all weights.
    """
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae, apply_b_dec_to_input=False))
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(d_sae, d_in, generator=generator)
    W_dec /= W_dec.norm(dim=-1, keepdim=True)
    sae.W_dec.data = W_dec
    sae.W_enc.data = W_dec.T.contiguous()
    sae.b_dec.data = 0.1 * torch.randn(d_in, generator=generator)
    limit = _RESIDUAL_STD * NormalDist().inv_cdf(1 - _ACTIVE_FRACTION)
    sae.threshold.data = limit * (0.9 + 0.2 * torch.rand(d_sae, generator=generator))
    return sae


def triggered_input(
    sae: "JumpReLUSAE", feature_ids: list[int], num_tokens: int, seed: int
) -> tuple[Float[Tensor, "1 seq d_in"], Bool[Tensor, "1 seq"]]:
    """Random activations with selected features planted on 60 % of the counted tokens.

    Args:
        sae: Whose features.
        feature_ids: One of them is planted per token.
        num_tokens: Length; the first token does not count, like a bos token.
        seed: Of the activations.

    Returns:
        Activations and token mask.
    """
    generator = torch.Generator().manual_seed(seed)
    h = _RESIDUAL_STD * torch.randn(1, num_tokens, sae.cfg.d_in, generator=generator)
    num_planted = math.ceil(FIRED_IN_TRIGGERED * (num_tokens - 1))
    where = 1 + torch.randperm(num_tokens - 1, generator=generator)[:num_planted]
    which = torch.randint(len(feature_ids), (num_planted,), generator=generator)
    strength = 3 * sae.threshold.detach().max()
    h[0, where] += strength * sae.W_dec.detach()[torch.tensor(feature_ids)[which]]
    token_mask = torch.ones(1, num_tokens, dtype=torch.bool)
    token_mask[:, 0] = False
    return h, token_mask


@torch.no_grad()
def measure_edit(
    sae: "JumpReLUSAE", num_features: int, num_tokens: int, repeats: int, seed: int
) -> EditCost:
    """Times and compares the dense edit and the guard's on one triggered sequence.

    Args:
        sae: From `random_sae`.
        num_features: Selected features.
        num_tokens: Length of the sequence, at least 2.
        repeats: Timed calls of each, in turn.
        seed: Of input and selection.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(sae.cfg.d_sae, generator=generator)[:num_features].tolist()
    h, token_mask = triggered_input(sae, ids, num_tokens, seed)
    features = slice_features(sae, ids)

    def dense() -> Tensor:
        return dense_clamp(sae, h, token_mask, ids, THRESHOLD, CLAMP_VALUE)

    def ours() -> Tensor:
        return sliced(features, h, token_mask)

    dense_output, sliced_output = dense(), ours()
    pairs = [(_seconds(dense), _seconds(ours)) for _ in range(repeats)]
    exact_sae = copy.deepcopy(sae).to(dtype=torch.float64)
    exact = dense_clamp(exact_sae, h.double(), token_mask, ids, THRESHOLD, CLAMP_VALUE)
    dense_seconds, sliced_seconds = (median(times) for times in zip(*pairs, strict=True))
    ratios = [slow / fast for slow, fast in pairs]
    difference = (dense_output - sliced_output).abs().max().item()
    rounding = torch.finfo(torch.float32).eps * exact.abs().max().item()
    return EditCost(
        num_tokens=num_tokens,
        num_active=(sae.encode(h) > 0).sum(-1).double().mean().item(),
        density=(features.encode(h)[token_mask] > 0).any(-1).double().mean().item(),
        dense_seconds=dense_seconds,
        sliced_seconds=sliced_seconds,
        ratio=dense_seconds / sliced_seconds,
        lowest_ratio=min(ratios),
        highest_ratio=max(ratios),
        difference=difference,
        difference_in_eps=difference / rounding,
        dense_error=(dense_output - exact).abs().max().item(),
        sliced_error=(sliced_output - exact).abs().max().item(),
    )


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
