"""The gate: which sequences, and from which position on, are forget-related.

A gate turns the activity of the selected features into one number per sequence, its statistic; the
sequence is triggered where that number exceeds the gate's threshold. Every statistic is a ratio of
integer counts, so no way of cutting a sequence into chunks changes a bit of it.

A new gate is one frozen dataclass here: a threshold and further fields that it checks itself,
`start`, `follow`, and `calibrated` where more than the threshold is measured.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dsg.errors import check_number

GateKind = Literal["density", "window", "cusum", "token"]
State = tuple[Tensor, ...]
# A gate's statistic of each retain text, float64, and the threshold that such statistics lead to.
Measure = Callable[["Gate"], Float[Tensor, " texts"]]
ThresholdOf = Callable[[Float[Tensor, " texts"]], float]

# The leak is a multiple of this fraction of a token, so that sums are exact in integers.
_UNITS_PER_TOKEN = 65536
# A sum must leak on text that never fires, and rise on text that always does.
_LEAK_RANGE = (0.01, 0.99)


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
        counts = (self.num_fired, self.num_counted, self.statistic, self.triggered)
        num_fired, num_counted, statistic, triggered, *state = (
            tensor.repeat_interleave(repeats, dim=0) for tensor in (*counts, *self.state)
        )
        return Evidence(num_fired, num_counted, statistic, triggered, tuple(state))


@dataclass(frozen=True)
class Gate(ABC):
    """How the tokens of a sequence become its statistic, and when that is too high.

    Args:
        threshold: Statistic strictly above which a sequence is triggered (tau).

    Raises:
        UserError: If a field is out of range.
    """

    kind: ClassVar[GateKind]
    threshold: float

    def __post_init__(self) -> None:
        check_number(
            "threshold",
            self.threshold,
            lambda value: 0.0 <= value <= 1.0,
            f"a density in [0, 1] for the gate {self.kind!r}",
            "calibrate it on retain text",
        )

    @abstractmethod
    def start(self, batch: int, device: torch.device) -> State:
        """The state before any token."""

    @abstractmethod
    def follow(
        self, active: Bool[Tensor, "batch seq k"], counted: Bool[Tensor, "batch seq"], state: State
    ) -> tuple[Float[Tensor, "batch seq"], State]:
        """The statistic after each position, float64, and the state after the last one.

        Uncounted positions leave the statistic as it was; before any counted one it is 0.

        Args:
            active: Whether each selected feature is active, most important first; at counted tokens
                only.
            counted: Counted tokens.
            state: What the tokens before these left behind.
        """

    def calibrated(self, measure: Measure, threshold_of: ThresholdOf) -> "Gate":
        """The gate with the threshold that retain text gives it."""
        return replace(self, threshold=threshold_of(measure(self)))


@dataclass(frozen=True)
class DensityGate(Gate):
    """The paper's statistic: the fraction of all counted tokens that fired (rho), in [0, 1]."""

    kind = "density"

    def start(self, batch: int, device: torch.device) -> State:
        """No token fired, none counted."""
        zeros = torch.zeros(batch, dtype=torch.long, device=device)
        return zeros, zeros

    def follow(
        self, active: Bool[Tensor, "batch seq k"], counted: Bool[Tensor, "batch seq"], state: State
    ) -> tuple[Float[Tensor, "batch seq"], State]:
        """See `Gate`."""
        num_fired = state[0][:, None] + active.any(-1).cumsum(1)
        num_counted = state[1][:, None] + counted.cumsum(1)
        return density(num_fired, num_counted), (num_fired[:, -1], num_counted[:, -1])


@dataclass(frozen=True)
class OpenGate(DensityGate):
    """No gate: every sequence with a counted token is triggered (static clamping)."""

    kind = "token"
    # Below every density; there is nothing to calibrate.
    threshold: float = field(default=-1.0, init=False, repr=False)

    def __post_init__(self) -> None:
        """There is nothing to check."""


@dataclass(frozen=True)
class WindowGate(Gate):
    """The highest density in any run of `size` counted tokens, in [0, 1].

    Text around a forget-related passage cannot dilute it. Of fewer counted tokens it is the density
    of all of them.

    Args:
        threshold: See `Gate`.
        size: Counted tokens of a window, at least 1.
    """

    kind = "window"
    size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = isinstance(self.size, int)
        check_number("size", self.size, lambda size: whole and size >= 1, "at least 1", "try 32")

    def start(self, batch: int, device: torch.device) -> State:
        """No token counted, and a window of tokens that did not fire."""
        zeros = torch.zeros(batch, dtype=torch.long, device=device)
        return torch.zeros(batch, self.size, dtype=torch.bool, device=device), zeros, zeros

    def follow(
        self, active: Bool[Tensor, "batch seq k"], counted: Bool[Tensor, "batch seq"], state: State
    ) -> tuple[Float[Tensor, "batch seq"], State]:
        """See `Gate`."""
        recent, earlier, peak = state  # [batch, size], [batch], [batch]
        seen = counted.cumsum(1)  # [batch, seq]
        # Counted tokens moved to the front: a stable sort of a mask keeps their order.
        order = (~counted).to(torch.uint8).argsort(dim=1, stable=True)  # [batch, seq]
        fired = torch.cat([recent, active.any(-1).gather(1, order)], 1)  # [batch, size + seq]
        sums = F.pad(fired.cumsum(1), (1, 0))  # [batch, 1 + size + seq]
        # Column n: fired tokens among the last `size` counted ones, once n new ones are counted.
        in_window = sums[:, self.size :] - sums[:, : -self.size]  # [batch, 1 + seq]
        num_counted = earlier[:, None] + seen
        now = in_window.gather(1, seen)  # [batch, seq]
        full = num_counted >= self.size
        # Windows before the first full one hold all tokens so far and compete with none.
        best = torch.where(full, now, 0).cummax(1).values
        best = torch.maximum(best, peak[:, None])
        statistic = torch.where(full, best.double() / self.size, density(now, num_counted))
        last = seen[:, -1:] + torch.arange(self.size, device=fired.device)  # [batch, size]
        return statistic, (fired.gather(1, last), num_counted[:, -1], best[:, -1])


@dataclass(frozen=True)
class CusumGate(Gate):
    """A running sum that rises by one with a token that fired and leaks with every counted token.

    The sum never falls below 0, and the statistic is the highest value it has had (Page's CUSUM
    test, Biometrika 1954), in tokens. Text around a passage cannot dilute it either, and a passage
    need not fit a window.

    Args:
        threshold: See `Gate`; in tokens, at least 0.
        leak: Tokens that leak per counted token, in (0, 1).
    """

    kind = "cusum"
    leak: float

    def __post_init__(self) -> None:
        check_number(
            "threshold",
            self.threshold,
            lambda value: 0.0 <= value < float("inf"),
            "finite and at least 0 for the gate 'cusum'",
            "calibrate it on retain text",
        )
        check_number("leak", self.leak, lambda leak: 0.0 < leak < 1.0, "in (0, 1)", "calibrate it")

    def start(self, batch: int, device: torch.device) -> State:
        """Sum and highest sum are 0."""
        zeros = torch.zeros(batch, dtype=torch.long, device=device)
        return zeros, zeros

    def follow(
        self, active: Bool[Tensor, "batch seq k"], counted: Bool[Tensor, "batch seq"], state: State
    ) -> tuple[Float[Tensor, "batch seq"], State]:
        """See `Gate`."""
        level, peak = state
        leak = max(1, round(self.leak * _UNITS_PER_TOKEN))
        steps = active.any(-1).long() * _UNITS_PER_TOKEN - counted.long() * leak  # [batch, seq]
        # A sum held at 0 from below is the free sum minus its lowest value so far below 0.
        free = level[:, None] + steps.cumsum(1)
        levels = free - free.cummin(1).values.clamp(max=0)
        peaks = torch.maximum(levels.cummax(1).values, peak[:, None])
        return peaks.double() / _UNITS_PER_TOKEN, (levels[:, -1], peaks[:, -1])

    def calibrated(self, measure: Measure, threshold_of: ThresholdOf) -> Gate:
        """The leak is the threshold of the density, the threshold that of the sum with this leak.

        The sum so rises where text fires more often than the retain texts that a gate lets pass.
        """
        low, high = _LEAK_RANGE
        leak = min(max(threshold_of(measure(DensityGate(1.0))), low), high)
        leaking = replace(self, leak=leak)
        return replace(leaking, threshold=threshold_of(measure(leaking)))


def density(
    num_fired: Int[Tensor, "*axes"], num_counted: Int[Tensor, "*axes"]
) -> Float[Tensor, "*axes"]:
    """Fired over counted tokens in float64; 0 where nothing is counted."""
    return num_fired.double() / num_counted.clamp(min=1)


def decide(
    gate: Gate,
    active: Bool[Tensor, "batch seq k"],
    counted: Bool[Tensor, "batch seq"],
    prompt: Bool[Tensor, "batch seq"] | None = None,
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
        active: Whether each selected feature is active, most important first.
        counted: Counted tokens.
        prompt: Positions of the prompt; None for all. Ignored after `earlier`: a continuation has
            none.
        earlier: What the sequences' earlier tokens said; None if these are the first.
        running: False keeps the prompt's decision whatever follows.

    Returns:
        The decision at each position, and the evidence after the last position. Without
        `running`, the evidence stays that of the prompt.
    """
    rest = torch.ones_like(counted)
    if earlier is None:
        earlier = _of_prompt(gate, active, counted if prompt is None else counted & prompt)
        # Nothing stands behind a prompt that is everything.
        running, rest = running and prompt is not None, rest if prompt is None else ~prompt
    if not running:
        return earlier.triggered[:, None].expand_as(counted), earlier
    counted = counted & rest
    active = active & counted[..., None]
    statistic, state = gate.follow(active, counted, earlier.state)  # [batch, seq]
    num_fired = earlier.num_fired + active.any(-1).sum(1)
    num_counted = earlier.num_counted[:, None] + counted.cumsum(1)
    exceeded = (statistic > gate.threshold) & (num_counted > 0) & rest
    triggered = earlier.triggered[:, None] | ((exceeded.cumsum(1) > 0) & rest)
    last, total = statistic[:, -1], num_counted[:, -1]
    return triggered, Evidence(num_fired, total, last, triggered.any(1), state)


def _of_prompt(
    gate: Gate, active: Bool[Tensor, "batch seq k"], counted: Bool[Tensor, "batch seq"]
) -> Evidence:
    active = active & counted[..., None]
    num_fired, num_counted = active.any(-1).sum(1), counted.sum(1)
    statistic, state = gate.follow(active, counted, gate.start(len(counted), counted.device))
    # Uncounted positions leave the statistic as it was: the last column is the prompt's.
    last = statistic[:, -1]
    triggered = (last > gate.threshold) & (num_counted > 0)
    return Evidence(num_fired, num_counted, last, triggered, state)
