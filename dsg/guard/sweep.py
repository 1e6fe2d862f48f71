"""The gate's view of every number of selected features, from one pass over the text."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from dsg.errors import UserError
from dsg.guard.gate import DensityGate, Gate
from dsg.intervals import Estimate
from dsg.selection import calibrate_threshold, false_positive_rate

# Its threshold plays no part in a statistic.
_DENSITY = DensityGate(1.0)
# Bounds the padded copy that gates other than the density need.
_TEXTS_AT_ONCE = 256


class FirstFiring:
    """For each counted token of each text, the rank of the first selected feature that fires.

    The first n features fire on a token exactly if that rank is below n, so one small integer per
    token tells the density of a text for every n, and with it the threshold of every guard whose
    features are a beginning of this selection.

    Args:
        num_features: Number of selected features (k), at least 1; a token on which none of them
            fires has rank k. Up to 255 features take one byte per token.

    Raises:
        UserError: If `num_features` is below 1.
    """

    def __init__(self, num_features: int) -> None:
        if num_features < 1:
            raise UserError(f"`num_features` must be at least 1, got {num_features}; raise it.")
        self.num_features = num_features
        self._dtype = np.min_scalar_type(num_features)
        # Id and number of counted tokens of each text, shape [texts, 2], and the ranks of their
        # tokens one after the other.
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []

    def update(
        self,
        ids: Int[Tensor, " batch"],
        active: Bool[Tensor, "batch seq k"],
        token_mask: Bool[Tensor, "batch seq"],
    ) -> None:
        """Adds a batch of whole texts.

        Args:
            ids: Number of each text in the data set.
            active: Whether each selected feature is active, most important one first.
            token_mask: Counted tokens.
        """
        order = torch.arange(self.num_features, dtype=torch.int32, device=active.device)
        ranks = torch.where(active, order, self.num_features).amin(-1)  # [batch, seq]
        token_mask = token_mask.to(active.device)
        texts = torch.stack([ids.long().cpu(), token_mask.sum(1).cpu()], dim=1)
        self._parts.append((texts.numpy(), ranks[token_mask].cpu().numpy().astype(self._dtype)))

    def densities(self, num_features: int | None = None) -> Float[Tensor, " texts"]:
        """Density (rho) of each text, float64; see `statistics`."""
        return self.statistics(_DENSITY, num_features)

    def statistics(self, gate: Gate, num_features: int | None = None) -> Float[Tensor, " texts"]:
        """The gate's statistic of each text in the order of the ids, float64.

        Args:
            gate: Makes the statistic.
            num_features: Only the first so many features count, in [1, k]; None takes all.

        Raises:
            UserError: `num_features` is out of range.
            RuntimeError: A text came twice.
        """
        n = self.num_features if num_features is None else num_features
        if not 1 <= n <= self.num_features:
            raise UserError(
                f"`num_features` must be in [1, {self.num_features}], the number of selected "
                f"features, got {n}; select more features."
            )
        ids = np.concatenate([texts[:, 0] for texts, _ in self._parts] or [np.zeros(0, np.int64)])
        if len(np.unique(ids)) != len(ids):
            raise RuntimeError(
                f"every text must come exactly once, got {len(ids)} values of "
                f"{len(np.unique(ids))} texts; deal whole batches to the ranks and let the trainer "
                "leave the samplers alone (use_distributed_sampler: false)."
            )
        densities_only = isinstance(gate, DensityGate)
        statistics = self._densities(n) if densities_only else self._statistics(n, gate)
        return torch.from_numpy(np.concatenate([*statistics, np.zeros(0)])[ids.argsort()])

    def packed(self) -> tuple[Int[Tensor, "texts 2"], UInt8[Tensor, " bytes"]]:
        """Everything as tensors that every communication backend can carry."""
        texts = [texts for texts, _ in self._parts] or [np.zeros((0, 2), np.int64)]
        ranks = [ranks for _, ranks in self._parts] or [np.zeros(0, self._dtype)]
        raw = np.concatenate(ranks).view(np.uint8)
        return torch.from_numpy(np.concatenate(texts)), torch.from_numpy(raw)

    def add_packed(self, texts: Int[Tensor, "texts 2"], ranks: UInt8[Tensor, " bytes"]) -> None:
        """Adds the texts of another process, as its `packed` returned them."""
        raw = np.ascontiguousarray(ranks.cpu().numpy())
        self._parts.append((texts.cpu().numpy(), raw.view(self._dtype)))

    def _densities(self, n: int) -> Iterator[np.ndarray]:
        """Without padding: a sweep over hundreds of features asks for this again and again."""
        for texts, ranks in self._parts:
            num_counted = texts[:, 1]
            ends = num_counted.cumsum()
            fired = np.concatenate([[0], (ranks < n).cumsum()])
            yield (fired[ends] - fired[ends - num_counted]) / np.maximum(num_counted, 1)  # [texts]

    def _statistics(self, n: int, gate: Gate) -> Iterator[np.ndarray]:
        for texts, ranks in self._parts:
            ends = texts[:, 1].cumsum()
            for first in range(0, len(texts), _TEXTS_AT_ONCE):
                num_counted = texts[first : first + _TEXTS_AT_ONCE, 1]
                start = ends[first] - num_counted[0]
                counted = (
                    np.arange(max(1, num_counted.max())) < num_counted[:, None]
                )  # [texts, seq]
                fired = np.zeros_like(counted)  # [texts, seq]
                # Row by row, as the ranks lie.
                fired[counted] = ranks[start : start + num_counted.sum()] < n
                # That any of the n fired is all that is known: they stand for one feature.
                active = torch.from_numpy(fired)[..., None]  # [texts, seq, 1]
                state = gate.start(len(fired), torch.device("cpu"))
                statistic, _ = gate.follow(active, torch.from_numpy(counted), state)
                yield statistic[:, -1].numpy()


@dataclass(frozen=True)
class SweepPoint:
    """What the gate does with the first `num_features` features of a selection.

    Attributes:
        num_features: How many.
        threshold: Calibrated for them (tau).
        false_positive_rate: Share of held-out retain texts that the gate triggers on.
        forget_trigger_rate: Share of held-out forget texts that it triggers on.
    """

    num_features: int
    threshold: float
    false_positive_rate: Estimate
    forget_trigger_rate: Estimate


def sweep(
    calibration: FirstFiring,
    heldout: FirstFiring,
    forget: FirstFiring,
    percentile: float = 95.0,
    gate: Gate = _DENSITY,
) -> list[SweepPoint]:
    """Calibrate and check a gate for every number of features up to the selected ones.

    Args:
        calibration: Retain texts that set the threshold.
        heldout: Retain texts that measure the false-positive rate.
        forget: Forget texts that took no part in the selection.
        percentile: See `calibrate_threshold`.
        gate: Makes the statistic; its own threshold plays no part.

    Raises:
        UserError: There is no calibration text, or `percentile` is out of range.
    """
    points = []
    for n in range(1, calibration.num_features + 1):
        threshold = calibrate_threshold(calibration.statistics(gate, n), percentile)
        rates = (
            false_positive_rate(texts.statistics(gate, n), threshold) for texts in (heldout, forget)
        )
        points.append(SweepPoint(n, threshold, *rates))
    return points
