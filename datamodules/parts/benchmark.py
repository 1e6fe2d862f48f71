"""What the data modules of benchmarks share: they hold texts and items, this makes the loaders."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import lightning
from torch.utils.data import DataLoader

from datamodules.parts.loading import (
    BatchSize,
    Pairs,
    Rows,
    load_tokenizer,
    passage_loader,
    prompt_loader,
    question_loader,
    selection_loader,
    training_loader,
)
from dsg.errors import UserError
from dsg.evaluation import Passage, Prompt, Question

Split = Literal["validation", "test"]


class BenchmarkData(lightning.LightningDataModule):
    """Texts and items of one benchmark, batched as the run needs them.

    What is read follows from the lightning module of the run, by its attribute `reads`: `evaluate`
    the items; `select` features from the texts of the guard; or let `fit` train (`finetune`,
    `unlearn`, `relearn`). Without a trainer, or with a module that says nothing, it is `evaluate`.

    A benchmark overrides what it has: items (`questions`, `passages`, `prompts`), `training`, and
    the texts of a guard (`dsg.selection.TextSource`).

    Args:
        model_name: The model's folder or hub name, for its tokenizer.
        val_split: Items of `val_dataloader`.
        batch_size: Items of an evaluation batch; `auto` fills batches up to a number of tokens.
        train_batch_size: Rows of a training batch; of each kind where a model unlearns.
        seed: Decides the order of training text.
        allow_overlap: The attacker's text may state what is evaluated.
    """

    name: str
    """The `dataset` column of the results."""
    attack_text: str = "forget"
    """What the attacker trains on."""
    overlap: str | None = None
    """How the attacker's text overlaps with what is evaluated, which `allow_overlap` must allow."""
    passage_length: int | None = None
    """Tokens of a passage that are read; None reads all."""
    trains: ClassVar[Sequence[str]] = ("unlearn", "relearn")
    """What a module may read from this data in `fit`."""

    def __init__(
        self,
        model_name: str,
        val_split: Split,
        batch_size: BatchSize,
        train_batch_size: int = 1,
        seed: int = 0,
        allow_overlap: bool = False,
    ) -> None:
        super().__init__()
        self.model_name = model_name
        self.val_split: Split = val_split
        self.batch_size: BatchSize = batch_size
        self.train_batch_size = train_batch_size
        self.seed = seed
        self.allow_overlap = allow_overlap
        self.tokenizer: Any = None

    @property
    def reads(self) -> str:
        """What the module of the run reads."""
        module = self.trainer.lightning_module if self.trainer else None
        return getattr(module, "reads", "evaluate")

    def setup(self, stage: str) -> None:
        """Load the tokenizer, once.

        Raises:
            UserError: The attacker's text overlaps with what is evaluated, and nobody allowed that.
        """
        del stage
        if self.reads == "relearn" and self.overlap is not None and not self.allow_overlap:
            raise UserError(
                f"`allow_overlap` must be true for the attack text {self.attack_text!r}, because "
                f"it {self.overlap}; set it."
            )
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(self.model_name)

    def questions(self, split: Split) -> list[Question]:
        """All questions of a split; none unless overridden."""
        del split
        return []

    def passages(self, split: Split) -> list[Passage]:
        """All texts of a split whose likelihood is measured; none unless overridden."""
        del split
        return []

    def prompts(self, split: Split) -> list[Prompt]:
        """All texts of a split to be continued; none unless overridden."""
        del split
        return []

    def training(self) -> Rows | Pairs:
        """What a module trains on that reads one of `trains`."""
        raise NotImplementedError

    def train_dataloader(self) -> DataLoader:
        """Batches of what the module trains on.

        Raises:
            UserError: It reads nothing that this data can train, or some device gets no batch.
        """
        if self.reads not in self.trains:
            raise UserError(
                f"`model` must be a module that reads {' or '.join(map(repr, self.trains))} for "
                f"fit on {self.name!r}, got one that reads {self.reads!r}; change it."
            )
        size, trainer = self.train_batch_size, self.trainer
        loader = training_loader(self.tokenizer, self.training(), size, self.seed, trainer)
        if not len(loader):  # Lightning would skip the training and call it done
            devices = trainer.world_size if trainer else 1
            raise UserError(
                f"`train_batch_size` must leave a batch for each of {devices} devices, got {size}; "
                "lower it or give more text."
            )
        return loader

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Items of `val_split`, or the texts of the guard."""
        return selection_loader(self) if self.reads == "select" else self._items(self.val_split)

    def test_dataloader(self) -> list[DataLoader]:
        """Items of the test split."""
        return self._items("test")

    def _items(self, split: Split) -> list[DataLoader]:
        """Each item exactly once, those of a kind in one loader."""
        tokenizer, size, trainer = self.tokenizer, self.batch_size, self.trainer
        loaders = []
        if questions := self.questions(split):
            loaders.append(question_loader(tokenizer, questions, size, trainer))
        if passages := self.passages(split):
            length = self.passage_length
            loaders.append(passage_loader(tokenizer, passages, size, trainer, length))
        if prompts := self.prompts(split):
            loaders.append(prompt_loader(tokenizer, prompts, size, trainer))
        return loaders
