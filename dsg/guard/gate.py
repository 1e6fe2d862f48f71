"""The gate: which sequences, and from which position on, are forget-related.

A gate turns the tokens on which a selected feature fired into one number per sequence, its
statistic; the sequence is triggered where that number exceeds a threshold. Every statistic is a
ratio of integer counts, so no way of cutting a sequence into chunks changes a bit of it.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dsg.errors import UserError

# `token` is no rule of its own: every sequence with a counted token is triggered.
GateKind = Literal["density", "window", "cusum", "token"]
State = tuple[Tensor, ...]

# The leak is a multiple of this fraction of a token, so that sums are exact in integers.
_UNITS_PER_TOKEN = 65536


@dataclass(frozen=True)
class Evidence:
    """What the tokens seen so far say about each sequence.

    Attributes:
        num_fired: Counted tokens on which any selected feature was active.
        num_counted: Counted tokens.
        statistic: The gate's statistic after the last of them, float64.
        triggered: The gate's decision after the last of them.
        state: What the gate needs to go on, batch first.
    """

    num_fired: Int[Tensor, " batch"]
    num_counted: Int[Tensor, " batch"]
    statistic: Float[Tensor, " batch"]
    triggered: Bool[Tensor, " batch"]
    state: State

    @property
    def density(self) -> Float[Tensor, " batch"]:
        """Fraction of counted tokens on which any selected feature was active (rho), float64."""
        return density(self.num_fired, self.num_counted)

    def repeat_interleave(self, repeats: int) -> "Evidence":
        """The same about each sequence `repeats` times, copies in adjacent rows."""
        return Evidence(
            self.num_fired.repeat_interleave(repeats),
            self.num_counted.repeat_interleave(repeats),
            self.statistic.repeat_interleave(repeats),
            self.triggered.repeat_interleave(repeats),
            tuple(tensor.repeat_interleave(repeats, dim=0) for tensor in self.state),
        )


class Gate(Protocol):
    """How the tokens of a sequence become its statistic."""

    def start(self, batch: int, device: torch.device) -> State:
        """The state before any token."""
        ...

    def follow(
        self, fired: Bool[Tensor, "batch seq"], counted: Bool[Tensor, "batch seq"], state: State
    ) -> tuple[Float[Tensor, "batch seq"], State]:
        """The statistic after each position, float64, and the state after the last one.

        Uncounted positions leave the statistic as it was; before any counted one it is 0.

        Args:
            fired: Counted tokens on which any selected feature is active.
            counted: Counted tokens.
            state: What the tokens before these left behind.
        """
        ...


@dataclass(frozen=True)
class DensityGate:
    """The paper's statistic: the fraction of all counted tokens that fired (rho), in [0, 1]."""

    def start(self, batch: int, device: torch.device) -> State:
        """No token fired, none counted."""
        zeros = torch.zeros(batch, dtype=torch.long, device=device)
        return zeros, zeros

    def follow(
        self, fired: Bool[Tensor, "batch seq"], counted: Bool[Tensor, "batch seq"], state: State
    ) -> tuple[Float[Tensor, "batch seq"], State]:
        """See `Gate`."""
        num_fired = state[0][:, None] + fired.cumsum(1)
        num_counted = state[1][:, None] + counted.cumsum(1)
        return density(num_fired, num_counted), (num_fired[:, -1], num_counted[:, -1])


@dataclass(frozen=True)
class WindowGate:
    """The highest density in any run of `size` counted tokens, in [0, 1].

    Text around a forget-related passage cannot dilute it. Of fewer counted tokens it is the density
    of all of them.

    Args:
        size: Counted tokens of a window, at least 1.

    Raises:
        UserError: If `size` is below 1.
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"`window_size` must be at least 1 token, got {self.size}; try 32.")

    def start(self, batch: int, device: torch.device) -> State:
        """No token counted, and a window of tokens that did not fire."""
        zeros = torch.zeros(batch, dtype=torch.long, device=device)
        return torch.zeros(batch, self.size, dtype=torch.bool, device=device), zeros, zeros

    def follow(
        self, fired: Bool[Tensor, "batch seq"], counted: Bool[Tensor, "batch seq"], state: State
    ) -> tuple[Float[Tensor, "batch seq"], State]:
        """See `Gate`."""
        recent, earlier, peak = state
        seen = counted.cumsum(1)
        # Counted tokens moved to the front: a stable sort of a mask keeps their order.
        order = (~counted).to(torch.uint8).argsort(dim=1, stable=True)
        fired_in_order = torch.cat([recent, fired.gather(1, order)], 1)
        sums = torch.nn.functional.pad(fired_in_order.cumsum(1), (1, 0))
        # Column n: fired tokens among the last `size` counted ones, once n new ones are counted.
        in_window = sums[:, self.size :] - sums[:, : -self.size]
        num_counted = earlier[:, None] + seen
        # Windows before the first full one hold all tokens so far and compete with none.
        now = in_window.gather(1, seen)
        best = torch.where(num_counted >= self.size, now, 0).cummax(1).values
        best = torch.maximum(best, peak[:, None])
        full = num_counted >= self.size
        statistic = torch.where(full, best.double() / self.size, density(now, num_counted))
        last = seen[:, -1:] + torch.arange(self.size, device=fired.device)
        return statistic, (fired_in_order.gather(1, last), num_counted[:, -1], best[:, -1])


@dataclass(frozen=True)
class CusumGate:
    """A running sum that rises by one with a token that fired and leaks with every counted token.

    The sum never falls below 0, and the statistic is the highest value it has had (Page's CUSUM
    test, Biometrika 1954), in tokens. Text around a passage cannot dilute it either, and a passage
    need not fit a window.

    Args:
        leak: Tokens that leak per counted token, in (0, 1).

    Raises:
        UserError: If `leak` is not in (0, 1).
    """

    leak: float

    def __post_init__(self) -> None:
        if not 0.0 < self.leak < 1.0:
            raise UserError(f"`leak` must be in (0, 1), got {self.leak}; calibrate the gate.")

    def start(self, batch: int, device: torch.device) -> State:
        """Sum and highest sum are 0."""
        zeros = torch.zeros(batch, dtype=torch.long, device=device)
        return zeros, zeros

    def follow(
        self, fired: Bool[Tensor, "batch seq"], counted: Bool[Tensor, "batch seq"], state: State
    ) -> tuple[Float[Tensor, "batch seq"], State]:
        """See `Gate`."""
        level, peak = state
        leak = max(1, round(self.leak * _UNITS_PER_TOKEN))
        steps = fired.long() * _UNITS_PER_TOKEN - counted.long() * leak
        # A sum held at 0 from below is the free sum minus its lowest value so far below 0.
        free = level[:, None] + steps.cumsum(1)
        levels = free - free.cummin(1).values.clamp(max=0)
        peaks = torch.maximum(levels.cummax(1).values, peak[:, None])
        return peaks.double() / _UNITS_PER_TOKEN, (levels[:, -1], peaks[:, -1])


def make_gate(kind: GateKind, window_size: int | None, leak: float | None) -> Gate:
    """The gate of a kind.

    Args:
        kind: `density`, `window`, `cusum` or `token`, whose statistic is the density.
        window_size: Counted tokens of a window; for `window` only.
        leak: Tokens that leak per counted token; for `cusum` only.

    Raises:
        UserError: If an argument that the kind needs is missing, or out of range.
    """
    if kind == "window":
        if window_size is None:
            raise UserError("`window_size` must be given for the gate 'window', got None; try 32.")
        return WindowGate(window_size)
    if kind == "cusum":
        if leak is None:
            raise UserError("`leak` must be given for the gate 'cusum', got None; calibrate it.")
        return CusumGate(leak)
    return DensityGate()


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
    gate: Gate,
    fired: Bool[Tensor, "batch seq"],
    counted: Bool[Tensor, "batch seq"],
    prompt: Bool[Tensor, "batch seq"],
    threshold: float,
    earlier: Evidence | None = None,
    *,
    running: bool = True,
) -> tuple[Bool[Tensor, "batch seq"], Evidence]:
    """Decides per position whether its sequence is triggered there.

    All prompt positions share the decision that the prompt's statistic is strictly above the
    threshold. From then on each position, itself included, extends it; once the statistic of what
    has been seen exceeds the threshold, the sequence stays triggered. A sequence without a counted
    token is never triggered.

    Args:
        gate: Makes the statistic.
        fired: Counted tokens on which any selected feature is active.
        counted: Counted tokens.
        prompt: Positions of the prompt. Ignored after `earlier`: a continuation has none.
        threshold: Statistic above which a sequence is triggered (tau).
        earlier: What the sequences' earlier tokens said; None if these are the first.
        running: False keeps the prompt's decision whatever follows.

    Returns:
        The decision at each position, and the evidence after the last position. Without
        `running`, the evidence stays that of the prompt.
    """
    continuation = torch.ones_like(prompt)
    if earlier is None:
        earlier, continuation = (
            _of_prompt(gate, fired & prompt, counted & prompt, threshold),
            ~prompt,
        )
    if not running:
        return earlier.triggered[:, None].expand_as(fired), earlier
    fired, counted = fired & continuation, counted & continuation
    num_fired = earlier.num_fired[:, None] + fired.cumsum(1)
    num_counted = earlier.num_counted[:, None] + counted.cumsum(1)
    statistic, state = gate.follow(fired, counted, earlier.state)
    exceeded = (statistic > threshold) & (num_counted > 0) & continuation
    triggered = earlier.triggered[:, None] | ((exceeded.cumsum(1) > 0) & continuation)
    evidence = Evidence(
        num_fired[:, -1], num_counted[:, -1], statistic[:, -1], triggered.any(1), state
    )
    return triggered, evidence


def _of_prompt(
    gate: Gate,
    fired: Bool[Tensor, "batch seq"],
    counted: Bool[Tensor, "batch seq"],
    threshold: float,
) -> Evidence:
    num_fired, num_counted = fired.sum(1), counted.sum(1)
    statistic, state = gate.follow(fired, counted, gate.start(len(fired), fired.device))
    # Uncounted positions leave the statistic as it was: the last column is the prompt's.
    last = statistic[:, -1]
    return Evidence(num_fired, num_counted, last, (last > threshold) & (num_counted > 0), state)
