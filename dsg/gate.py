"""The gate: which sequences, and from which position on, are forget-related."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Evidence:
    """What the tokens seen so far say about each sequence.

    Attributes:
        num_fired: Counted tokens on which any selected feature was active.
        num_counted: Counted tokens.
        triggered: The gate's decision after the last of them.
    """

    num_fired: Int[Tensor, " batch"]
    num_counted: Int[Tensor, " batch"]
    triggered: Bool[Tensor, " batch"]

    @property
    def density(self) -> Float[Tensor, " batch"]:
        """Fraction of counted tokens on which any selected feature was active (rho), float64."""
        return density(self.num_fired, self.num_counted)

    def repeat_interleave(self, repeats: int) -> "Evidence":
        """The same about each sequence `repeats` times, copies in adjacent rows."""
        return Evidence(
            self.num_fired.repeat_interleave(repeats),
            self.num_counted.repeat_interleave(repeats),
            self.triggered.repeat_interleave(repeats),
        )


def density(
    num_fired: Int[Tensor, "*axes"], num_counted: Int[Tensor, "*axes"]
) -> Float[Tensor, "*axes"]:
    """Fired over counted tokens in float64; 0 where nothing is counted.

    Args:
        num_fired: Counted tokens on which any selected feature was active.
        num_counted: Counted tokens, at least `num_fired`.
    """
    return num_fired.double() / num_counted.clamp(min=1)


def fired_tokens(
    feature_acts: Float[Tensor, "batch seq k"], token_mask: Bool[Tensor, "batch seq"]
) -> Bool[Tensor, "batch seq"]:
    """Counted tokens on which any selected feature is active."""
    return (feature_acts > 0).any(-1) & token_mask


def decide(
    fired: Bool[Tensor, "batch seq"],
    counted: Bool[Tensor, "batch seq"],
    prompt: Bool[Tensor, "batch seq"],
    threshold: float,
    earlier: Evidence | None = None,
    *,
    running: bool = True,
) -> tuple[Bool[Tensor, "batch seq"], Evidence]:
    """Decides per position whether its sequence is triggered there.

    All prompt positions share the decision that the prompt's density is strictly above the
    threshold. From then on each position, itself included, extends the counts; once the density of
    what has been seen exceeds the threshold, the sequence stays triggered.

    Args:
        fired: Counted tokens on which any selected feature is active.
        counted: Counted tokens.
        prompt: Positions of the prompt. Ignored after `earlier`: a continuation has none.
        threshold: Density above which a sequence is triggered (tau).
        earlier: What the sequences' earlier tokens said; None if these are the first.
        running: False keeps the prompt's decision whatever follows.

    Returns:
        The decision at each position, and the evidence after the last position. Without
        `running`, the evidence stays that of the prompt.
    """
    if earlier is None:
        num_fired, num_counted = (fired & prompt).sum(1), (counted & prompt).sum(1)
        triggered = density(num_fired, num_counted) > threshold
        earlier = Evidence(num_fired, num_counted, triggered)
        continuation = ~prompt
    else:
        continuation = torch.ones_like(prompt)
    if not running:
        return earlier.triggered[:, None].expand_as(fired), earlier
    num_fired = earlier.num_fired[:, None] + (fired & continuation).cumsum(1)
    num_counted = earlier.num_counted[:, None] + (counted & continuation).cumsum(1)
    exceeded = (density(num_fired, num_counted) > threshold) & continuation
    triggered = earlier.triggered[:, None] | ((exceeded.cumsum(1) > 0) & continuation)
    return triggered, Evidence(num_fired[:, -1], num_counted[:, -1], triggered.any(1))
