"""Per-sample values of a whole evaluation, kept until all ranks have scored theirs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torchmetrics
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchmetrics.utilities import dim_zero_cat

from dsg.evaluation.generation import PROMPT_COLUMNS, score_prompts
from dsg.evaluation.items import (
    AnyBatch,
    Item,
    Passage,
    PassageBatch,
    Prompt,
    PromptBatch,
    Question,
    QuestionBatch,
)
from dsg.evaluation.scoring import (
    PASSAGE_COLUMNS,
    AnyGuard,
    Values,
    halving,
    question_columns,
    score_passages,
    score_questions,
)

_SCORING = {
    QuestionBatch: halving(score_questions),
    PassageBatch: halving(score_passages),
    PromptBatch: halving(score_prompts),
}


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
        # Questions of few answers have no column for the further answers of others.
        unknown = torch.full(ids.shape, torch.nan)
        columns = [values.get(name, unknown) for name in self.columns]
        self.values.append(torch.stack([column.double().cpu() for column in columns], 1))

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
    model: nn.Module, batches: Iterable[AnyBatch], guard: AnyGuard | None = None
) -> Values:
    """Score all batches of one kind of item on this process; values in the order of the ids."""
    scored = [(batch.ids, score(model, batch, guard)) for batch in batches]
    # A dict, because it keeps the order of what it saw first.
    columns = {name: None for _, values in scored for name in values if values[name].dim() == 1}
    metric = PerSample(tuple(columns), sum(len(ids) for ids, _ in scored))
    for ids, values in scored:
        metric.update(ids, values)
    return metric.by_id()


def score(model: nn.Module, batch: AnyBatch, guard: AnyGuard | None = None) -> Values:
    """Score a batch of any kind, in smaller pieces if memory runs out."""
    return _SCORING[type(batch)](model, batch, guard)


def columns_of(items: Sequence[Item]) -> tuple[str, ...]:
    """Names of the values of items of one kind; none for no items."""
    questions = [item for item in items if isinstance(item, Question)]
    if questions:
        return question_columns(max(question.num_answers for question in questions))
    kinds: dict[type, tuple[str, ...]] = {Passage: PASSAGE_COLUMNS, Prompt: PROMPT_COLUMNS}
    return kinds[type(items[0])] if items else ()


def gather_unequal(tensor: Tensor, group: Any = None) -> list[Tensor]:
    """Gather tensors of any shape from all ranks, leaving out the empty ones.

    torchmetrics' own gather assumes equal ranks and element types, which a rank that was dealt no
    batch does not have.
    """
    return [part for part in gather_objects(tensor, group) if part.numel()] or [tensor]


def gather_objects(mine: Any, group: Any = None) -> list[Any]:
    """Every rank's object, in the order of the ranks; every rank must call this."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [mine]
    parts: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(parts, mine, group=group)
    return parts
