"""Per-sample values of a whole evaluation, and the measurements made from them."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torchmetrics
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchmetrics.utilities import dim_zero_cat

from dsg import metrics
from dsg.calibration import wilson
from dsg.guard import Guard
from dsg.scoring import (
    PASSAGE_COLUMNS,
    QUESTION_COLUMNS,
    ClozeBatch,
    Passage,
    PassageBatch,
    Question,
    score_cloze,
    score_passages,
)
from dsg.stack import GuardStack

TIE_MARGIN = 1e-5  # float32 logits of one text differ by as much between paddings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measurement:
    """One number of the report with its 95 % interval (`None` where there is none).

    Attributes:
        domain: What it was measured on.
        metric: Such as `accuracy`; the names are those of the results file.
        protocol: `cloze`, `cloze_statement`, `cloze_question` or `passages`.
        value: The number.
        n: Items behind it.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    domain: str
    metric: str
    protocol: str
    value: float
    n: int
    low: float | None = None
    high: float | None = None


class PerSample(torchmetrics.Metric):
    """Keeps every sample's values, so that ranks, batches and order cannot change a result.

    Args:
        columns: Names of the values that each sample has.
        expected: Number of samples in all, over all ranks.
    """

    full_state_update = False
    ids: list[Tensor]
    values: list[Tensor]

    def __init__(self, columns: Sequence[str], expected: int) -> None:
        super().__init__(dist_sync_fn=gather_unequal)
        self.columns = tuple(columns)
        self.expected = expected
        self.add_state("ids", default=[], dist_reduce_fx="cat")
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def update(self, ids: Int[Tensor, " n"], values: Mapping[str, Float[Tensor, " n"]]) -> None:
        """Add samples that this rank has scored."""
        self.ids.append(ids.cpu())
        self.values.append(torch.stack([values[name].double().cpu() for name in self.columns], 1))

    def by_id(self) -> dict[str, Float[Tensor, " n"]]:
        """The values of all samples of all ranks in the order of their ids, in float64.

        Raises:
            RuntimeError: A sample was scored twice, or not at all.
        """
        if self.expected == 0 and not self.ids:
            return {name: torch.zeros(0, dtype=torch.float64) for name in self.columns}
        # torchmetrics makes a scalar of whatever `compute` returns for a single sample.
        return {name: values.reshape(-1) for name, values in self.compute().items()}

    def compute(self) -> dict[str, Tensor]:
        """What `by_id` returns, under the name that torchmetrics gathers for."""
        ids = dim_zero_cat(self.ids) if len(self.ids) else torch.zeros(0)
        if len(ids) != self.expected or len(ids.unique()) != self.expected:
            raise RuntimeError(
                f"{self.expected} samples must be scored exactly once, got {len(ids)} values of "
                f"{len(ids.unique())} samples; deal whole batches to the ranks and let the "
                "trainer leave the samplers alone (use_distributed_sampler: false)."
            )
        values = dim_zero_cat(self.values)[ids.argsort()]
        return {name: values[:, index] for index, name in enumerate(self.columns)}


def score_all(
    model: nn.Module,
    batches: Iterable[ClozeBatch] | Iterable[PassageBatch],
    guard: Guard | GuardStack | None = None,
) -> dict[str, Float[Tensor, " n"]]:
    """Score all batches of one kind on this process; values in the order of the sample ids."""
    metric: PerSample | None = None
    for batch in batches:
        if metric is None:
            metric = PerSample(columns_of(batch), expected=0)
        metric.update(batch.ids, score(model, batch, guard))
        metric.expected += len(batch.ids)
    return {} if metric is None else metric.by_id()


def score(
    model: nn.Module, batch: ClozeBatch | PassageBatch, guard: Guard | GuardStack | None = None
) -> dict[str, Float[Tensor, " n"]]:
    """Score a batch of either kind."""
    if isinstance(batch, ClozeBatch):
        return score_cloze(model, batch, guard)
    return score_passages(model, batch, guard)


def columns_of(batch: ClozeBatch | PassageBatch) -> tuple[str, ...]:
    """Names of the values that `score` returns for a batch."""
    return QUESTION_COLUMNS if isinstance(batch, ClozeBatch) else PASSAGE_COLUMNS


def summarise(
    questions: Sequence[Question],
    question_values: Mapping[str, Float[Tensor, " n"]],
    passages: Sequence[Passage],
    passage_values: Mapping[str, Float[Tensor, " m"]],
    baseline: Mapping[str, Float[Tensor, " n"]] | None = None,
    forget_domains: Sequence[str] = ("forget",),
) -> list[Measurement]:
    """Turn per-sample values into measurements.

    Args:
        questions: The questions that were scored, in any order.
        question_values: Their values in the order of the question ids.
        passages: The passages that were scored, in any order.
        passage_values: Their values in the order of the passage ids.
        baseline: Question values of the base model, for the alignment score.
        forget_domains: The domains to be forgotten so far. If they are not named `forget`, they are
            reported together under that name as well.

    Returns:
        Accuracy per domain, in all and per form; trigger rate per domain; density AUROC of forget
        against retain; perplexity per passage domain; alignment. What was not measured is left
        out.
    """
    domains = _members(questions, forget_domains)
    passage_domains = _members(passages, forget_domains)
    found: list[Measurement] = []
    for domain, rows in domains.items():
        found += _accuracies(domain, questions_in_id_order(questions), rows, question_values)
    found += _gate(domains, question_values, "cloze")
    for domain, rows in passage_domains.items():
        losses = passage_values["nll_sum"][rows].tolist()
        counts = [int(count) for count in passage_values["num_tokens"][rows]]
        if sum(counts):
            estimate = metrics.perplexity(losses, counts)
            found.append(Measurement(domain, "perplexity", "passages", **vars(estimate)))
    found += _gate(passage_domains, passage_values, "passages")
    if baseline is not None and {"forget", "retain"} <= domains.keys():
        found.append(_alignment(questions, domains, question_values, baseline))
    return found


def _alignment(
    questions: Sequence[Question],
    domains: Mapping[str, list[int]],
    values: Mapping[str, Tensor],
    baseline: Mapping[str, Tensor],
) -> Measurement:
    options = {len(question.options) for question in questions}
    retain, forget = domains["retain"], domains["forget"]
    value = metrics.alignment(
        *(
            _mean(outcome["correct"][rows])
            for outcome in (values, baseline)
            for rows in (retain, forget)
        ),
        chance=1 / max(options),
    )
    return Measurement("forget", "alignment", "cloze", value, len(retain) + len(forget))


def questions_in_id_order(questions: Sequence[Question]) -> list[Question]:
    """The order in which per-sample values come."""
    return sorted(questions, key=lambda question: question.id)


def _members(
    items: Sequence[Question] | Sequence[Passage], forget_domains: Sequence[str]
) -> dict[str, list[int]]:
    """Positions (in id order) of the items of each reported domain."""
    members: dict[str, list[int]] = {}
    pooled: dict[str, list[int]] = {}
    for position, item in enumerate(sorted(items, key=lambda item: item.id)):
        members.setdefault(item.domain, []).append(position)
        if item.domain in forget_domains:
            pooled.setdefault("forget", []).append(position)
            if item.shown is not None:
                part = "forget_shown" if item.shown else "forget_unshown"
                pooled.setdefault(part, []).append(position)
    return dict(sorted((members | pooled).items()))


def _accuracies(
    domain: str, questions: Sequence[Question], rows: list[int], values: Mapping[str, Tensor]
) -> list[Measurement]:
    by_protocol = {"cloze": rows}
    for row in rows:
        by_protocol.setdefault(f"cloze_{questions[row].form}", []).append(row)
    num_ties = int((values["margin"][rows].abs() < TIE_MARGIN).sum())
    if num_ties:
        logger.warning(
            "%d of %d questions of %r are ties: two options differ by less than %g nats.",
            num_ties,
            len(rows),
            domain,
            TIE_MARGIN,
        )
    return [
        _proportion(domain, "accuracy", protocol, values["correct"][members])
        for protocol, members in by_protocol.items()
    ]


def _gate(
    domains: Mapping[str, list[int]], values: Mapping[str, Tensor], protocol: str
) -> list[Measurement]:
    """Trigger rates and density AUROC; nothing if no guard was attached."""
    if not domains or bool(values["density"].isnan().any()):
        return []
    found = [
        _proportion(domain, "trigger_rate", protocol, values["triggered"][rows])
        for domain, rows in domains.items()
    ]
    if {"forget", "retain"} <= domains.keys():
        estimate = metrics.auroc(
            values["density"][domains["forget"]].tolist(),
            values["density"][domains["retain"]].tolist(),
        )
        found.append(Measurement("forget", "density_auroc", protocol, **vars(estimate)))
    return found


def _proportion(domain: str, metric: str, protocol: str, outcomes: Tensor) -> Measurement:
    estimate = wilson(int(outcomes.sum()), len(outcomes))
    return Measurement(
        domain, metric, protocol, estimate.value, estimate.n, estimate.low, estimate.high
    )


def _mean(outcomes: Tensor) -> float:
    return math.fsum(outcomes.tolist()) / len(outcomes)


def gather_unequal(tensor: Tensor, group: Any = None) -> list[Tensor]:
    """Gather tensors of any shape from all ranks, leaving out the empty ones.

    torchmetrics' own gather assumes equal ranks and element types, which a rank that was dealt no
    batch does not have.
    """
    gathered: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(gathered, tensor, group=group)
    return [part for part in gathered if part.numel()] or [tensor]
