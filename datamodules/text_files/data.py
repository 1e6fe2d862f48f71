"""The user's own files as Lightning data: pretraining text, evaluation and relearning attack."""

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import lightning
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from datamodules.parts.benchmark import BenchmarkData, Split
from datamodules.parts.loading import Rows
from datamodules.parts.pretraining import pack, train_tokenizer
from datamodules.parts.training_text import whole_rows
from datamodules.text_files.files import read_uses
from dsg.evaluation import Passage

Part = Literal["memorised", "unseen"]
VALIDATION_SHARE = 1 / 3
Files = Sequence[str | Path]


class TextFilesCorpus(lightning.LightningDataModule):
    """Training text: running text once, passages to be memorised many times.

    Unseen, calibration and held-out passages are no part of it.

    Args:
        forget_files: Plain text or JSONL.
        retain_files: Plain text or JSONL.
        seed: Decides the order.
        repetitions: How often a memorised passage comes in an epoch.
        max_running: Passages of running text of each kind at most.
        vocab_size: Tokens of the tokenizer.
        context_length: Tokens of a packed block.
        batch_size: Blocks of a batch.
    """

    def __init__(
        self,
        forget_files: Files,
        retain_files: Files,
        seed: int = 0,
        repetitions: int = 40,
        max_running: int = 3000,
        vocab_size: int = 2048,
        context_length: int = 128,
        batch_size: int = 8,
    ) -> None:
        super().__init__()
        self.files = (list(forget_files), list(retain_files))
        self.seed = seed
        self.repetitions = repetitions
        self.max_running = max_running
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.batch_size = batch_size
        self.tokenizer: PreTrainedTokenizerFast | None = None

    def setup(self, stage: str) -> None:
        """Read the files, train the tokenizer and pack the blocks, once."""
        del stage
        if self.tokenizer is not None:
            return
        uses = read_uses(*self.files)
        running = [text for use in uses for text in spread(use.running, self.max_running)]
        running += [text for use in uses for text in use.attack]
        memorised = [text for use in uses for text in use.memorised]
        rng = random.Random(f"order of repetitions {self.seed}")
        repeated = [
            text for _ in range(self.repetitions) for text in rng.sample(memorised, len(memorised))
        ]
        self.tokenizer = train_tokenizer(running + memorised, self.vocab_size)
        self.blocks = pack(self.tokenizer, running + repeated, self.context_length)

    def train_dataloader(self) -> DataLoader:
        """Blocks in an order that only the seed decides."""
        return DataLoader(
            self.blocks,  # type: ignore[arg-type]
            batch_size=self.batch_size,
            shuffle=True,
            generator=torch.Generator().manual_seed(self.seed),
        )


class TextFilesData(BenchmarkData):
    """Passages of forget and retain files; there are no questions.

    A third of the passages of a part is the validation split, for choosing settings; reports come
    from the others. The attacker has half of the memorised forget passages and as many retain
    passages.

    Args:
        model_name: The model's folder or hub name, for its tokenizer.
        forget_files: Plain text or JSONL.
        retain_files: Plain text or JSONL.
        part: Which passages are evaluated: those trained on many times, or those never trained on.
        val_split: Passages of `val_dataloader`.
        seed: Decides the order of the attacker's text.
        batch_size: Passages of an evaluation batch.
        train_batch_size: Passages of a training batch.
        max_length: Tokens of a passage that are read.
        max_texts: Forget texts, and retain texts, to select features with.
        allow_overlap: The attacker's text holds evaluated passages; an attack needs this said.
    """

    overlap = "holds evaluated passages (rows of shown and unshown ones are kept apart)"
    trains = ("relearn",)

    def __init__(
        self,
        model_name: str,
        forget_files: Files,
        retain_files: Files,
        part: Part = "memorised",
        val_split: Split = "validation",
        seed: int = 0,
        batch_size: int = 32,
        train_batch_size: int = 8,
        max_length: int = 128,
        max_texts: int = 1000,
        allow_overlap: bool = False,
    ) -> None:
        super().__init__(model_name, val_split, batch_size, train_batch_size, seed, allow_overlap)
        self.name = f"text/{part}"
        self.files = (list(forget_files), list(retain_files))
        self.part: Part = part
        self.max_length = max_length
        self.passage_length = max_length
        self.max_texts = max_texts

    def setup(self, stage: str) -> None:
        """Read the files and load the tokenizer, once."""
        if self.tokenizer is None:
            self.forget, self.retain = read_uses(*self.files)
        super().setup(stage)

    def passages(self, split: Split) -> list[Passage]:
        """Forget and retain passages of a split."""
        shown = set(self._shown()) if self.reads == "relearn" else None
        passages = []
        for domain, uses in (("forget", self.forget), ("retain", self.retain)):
            texts = uses.memorised if self.part == "memorised" else uses.unseen
            # They come in the order of their hash: as good as drawn by lot.
            cut = round(VALIDATION_SHARE * len(texts))
            for text in texts[:cut] if split == "validation" else texts[cut:]:
                is_shown = text in shown if shown is not None and domain == "forget" else None
                passages.append(Passage(len(passages), domain, text, is_shown))
        return passages

    def forget_texts(self) -> list[str]:
        """Running forget text, which is neither memorised nor evaluated."""
        return spread(self.forget.running, self.max_texts)

    def retain_texts(self) -> list[str]:
        """Running retain text."""
        return spread(self.retain.running, self.max_texts)

    def calibration_texts(self, near: bool) -> list[str]:
        """Retain passages that set the threshold; the files do not say which are near."""
        del near
        return self.retain.calibration

    def heldout_texts(self) -> list[str]:
        """Retain passages for the false-positive rate."""
        return self.retain.heldout

    def training(self) -> Rows:
        """The attacker's text."""
        shown = self._shown()
        retain = itertools.islice(itertools.cycle(self.retain.attack), len(shown))
        rows = whole_rows(self.tokenizer, [*shown, *retain], self.max_length)
        return Rows(rows, "attack")

    def _shown(self) -> list[str]:
        return self.forget.memorised[::2]


def spread(texts: Sequence[str], count: int) -> list[str]:
    """At most `count` of the texts, taken evenly from all over them."""
    return list(texts[:: max(1, -(-len(texts) // count))])
