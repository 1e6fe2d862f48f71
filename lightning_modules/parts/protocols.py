"""What a data module must offer to the modules of this package.

The two packages never import each other: these protocols are their whole contract. A data module
implements those that its runs need; a missing attribute is reported when the run starts.

All loaders use batches that were formed globally and are dealt whole to the ranks; they run with
`Trainer(use_distributed_sampler=False)`. Lightning needs the same number of steps on all ranks: in
evaluation, and in training where the module's `keeps_rest` is true, a rank without a batch in the
last round yields None; where it is false, the batches that do not go round are left out.
"""

from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypedDict, cast

from jaxtyping import Int
from torch import Tensor

from dsg.errors import UserError
from dsg.evaluation import AnyBatch, Passage, Question
from dsg.lm import TokenBatch
from dsg.selection import TextSource

Split = Literal["validation", "test"]
Reads = Literal["evaluate", "select", "filter", "finetune", "unlearn", "relearn"]
"""What a module reads, by its attribute `reads`: a data module that serves several kinds of run
looks it up (`trainer.lightning_module.reads`)."""

EVALUATION_DATA = ("name", "tokenizer", "val_split", "questions", "passages")
REQUEST_DATA = (*EVALUATION_DATA, "request_domains")
GUARD_DATA = ("tokenizer", "forget_texts", "retain_texts", "calibration_texts", "heldout_texts")


class EvaluationData(Protocol):
    """Questions and passages, and the batches that hold each of them exactly once.

    It may also offer `prompts(split) -> Sequence[Prompt]`, texts to be continued, with batches of
    their own, and `measure(split, samples) -> list[Measurement]`, numbers of a benchmark's own:
    `samples` holds under `questions`, `passages` and `prompts` the values of one state of the
    guard, in the order of the ids.

    `val_dataloader()` yields the batches of `val_split`, `test_dataloader()` those of
    the `test` split, in any order, from one loader or a list of them.
    """

    name: str
    """The `dataset` column of the results."""
    tokenizer: Any
    """The model's tokenizer, present after `setup`."""
    val_split: Split
    """`validation` where settings are chosen; a run that chooses nothing may say `test`."""

    def questions(self, split: Split) -> Sequence[Question]:
        """All questions of a split; their domain is the name to report them under."""
        ...

    def passages(self, split: Split) -> Sequence[Passage]:
        """All passages of a split; may be empty."""
        ...

    def val_dataloader(self) -> Sequence[Sequence[AnyBatch | None]]:
        """Batches of the validation split."""
        ...

    def test_dataloader(self) -> Sequence[Sequence[AnyBatch | None]]:
        """Batches of the test split."""
        ...


class GuardData(TextSource, Protocol):
    """Texts from which a guard is built, on every rank; no two kinds share a text."""

    tokenizer: Any


class RequestData(GuardData, EvaluationData, Protocol):
    """A curriculum of forget requests.

    `forget_texts()` are those of request number `trainer.current_epoch` (from 0), and so are the
    `UnlearningBatch`es of `train_dataloader()`, which is asked again every epoch
    (`Trainer(reload_dataloaders_every_n_epochs=1)`). All ranks need equally many steps: a batch
    that does not go round is left out, or a rank without a batch in the last round yields None.
    A request's guard is made of the texts, a change of weights by the batches.
    """

    request_domains: Sequence[str]
    """The questions' domain of each request, in the order of the requests."""


class UnlearningBatch(TypedDict):
    """One training batch of `UnlearningModule` and `SequentialModule`."""

    id: int
    """Number of the batch in the whole epoch, over all ranks, from 0."""
    forget: TokenBatch
    retain: TokenBatch


class SelectionBatch(TypedDict):
    """Texts of one purpose."""

    purpose: str
    """One of the purposes of `dsg.selection.splits.guard_texts`."""
    ids: Int[Tensor, " batch"]
    """Number of each text among those of its purpose."""
    tokens: TokenBatch | None
    """None for a rank that has no batch in the last round of a purpose."""


class SelectionData(Protocol):
    """Texts from which a guard is selected, on which it is calibrated and checked."""

    name: str
    tokenizer: Any

    def val_dataloader(self) -> "Sequence[SelectionBatch]":
        """All texts, purpose after purpose; all ranks have the same purpose in each step.

        Batch b of a purpose belongs to rank b modulo the number of ranks. Texts are cut and batched
        as `trainer.lightning_module.guard_settings` say; for the method `dsg_near` the near domain
        calibrates as well.
        """
        ...


def data_of(trainer: Any, *names: str) -> Any:
    """The trainer's data module, which must have the attributes `names`.

    Raises:
        UserError: There is none, or it lacks one of them.
    """
    data = getattr(trainer, "datamodule", None)
    missing = [name for name in names if not hasattr(data, name)]
    if missing:
        raise UserError(
            f"`data` must offer {', '.join(missing)} for this kind of run, but "
            f"{type(data).__name__} does not; choose a data module made for it."
        )
    return cast(Any, data)


def val_loaders(data: Any) -> list[Any]:
    """A data module's validation loaders, however many it has."""
    loaders = data.val_dataloader()
    return loaders if isinstance(loaders, list) else [loaders]
