"""How far training has moved the activations at a hook point."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsg.evaluation import Measurement, Passage, PassageBatch
from dsg.intervals import bootstrap
from dsg.lm import read_activations

DRIFT_COLUMNS = ("cosine_sum", "norm_ratio_sum", "num_tokens")


class Drift:
    """Compares a model's activations with those it had when `remember` was called.

    They are kept on the CPU in float32, counted tokens only: 4 bytes times the width for each token
    of the evaluation passages that this rank is dealt. That is little beside a second model, and
    unlike one it costs no forward pass per epoch. The model is read unedited: drift is a matter of
    the weights alone.

    Args:
        hook_point: Where to read.
    """

    def __init__(self, hook_point: str) -> None:
        self.hook_point = hook_point
        self._before: dict[int, Tensor] = {}

    def remember(self, model: nn.Module, batch: PassageBatch) -> None:
        """Take the model as it is now for the passages of a batch."""
        for passage_id, acts in self._read(model, batch).items():
            self._before[passage_id] = acts

    def values(self, model: nn.Module, batch: PassageBatch) -> dict[str, Float[Tensor, " b"]]:
        """What `measure_drift` needs of each passage of a batch that was remembered, in float64.

        Returns:
            `cosine_sum` and `norm_ratio_sum` (new norm over old one) over the counted tokens, and
            their number `num_tokens`.
        """
        rows = []
        for passage_id, acts in self._read(model, batch).items():
            now, before = acts.double(), self._before[passage_id].double()
            cosine = torch.cosine_similarity(now, before, dim=-1)
            norms = before.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
            ratio = now.norm(dim=-1) / norms
            rows.append(torch.stack([cosine.sum(), ratio.sum(), cosine.new_tensor(len(acts))]))
        return dict(zip(DRIFT_COLUMNS, torch.stack(rows).unbind(1), strict=True))

    def _read(self, model: nn.Module, batch: PassageBatch) -> dict[int, Tensor]:
        acts = read_activations(model, self.hook_point, batch.tokens).float().cpu()
        masks = batch.tokens.token_mask.cpu()
        ids = batch.ids.tolist()
        return {id: row[mask] for id, row, mask in zip(ids, acts, masks, strict=True)}


def measure_drift(
    passages: Sequence[Passage], values: Mapping[str, Float[Tensor, " n"]]
) -> list[Measurement]:
    """Mean cosine and mean norm ratio over the counted tokens of each domain.

    Args:
        passages: All passages, in any order.
        values: Their values in the order of the passage ids.

    Returns:
        `drift_cosine` and `drift_norm_ratio` per domain, with a percentile-bootstrap interval over
        whole passages; both are 1 for a model that did not move.
    """
    members: dict[str, list[int]] = {}
    for position, passage in enumerate(sorted(passages, key=lambda passage: passage.id)):
        members.setdefault(passage.domain, []).append(position)
    measured = []
    for domain, rows in sorted(members.items()):
        cosine, ratio, tokens = (values[name][rows].double().numpy() for name in DRIFT_COLUMNS)
        if not tokens.sum():
            continue
        for metric, sums in (("drift_cosine", cosine), ("drift_norm_ratio", ratio)):
            low, high = bootstrap(_mean_over_tokens, np.stack([sums, tokens], axis=1))
            value = float(sums.sum() / tokens.sum())
            measured.append(Measurement(domain, metric, "passages", value, len(rows), low, high))
    return measured


def _mean_over_tokens(passages: np.ndarray) -> float:
    total, tokens = passages.sum(axis=0)
    return total / tokens if tokens > 0 else math.nan
