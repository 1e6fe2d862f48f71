"""The user's own files as Lightning data: pretraining text, evaluation and relearning attack."""

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from datamodules.parts.guard_texts import selection_loader
from datamodules.parts.loading import batch_loader, load_tokenizer, passage_loader
from datamodules.parts.pretraining import pack, train_tokenizer
from datamodules.text_files.files import read_uses
from dsg.errors import UserError
from dsg.evaluation import Passage, Question
from dsg.lm import encode_texts, pad_sequences, padding_id, uncounted_token_ids

Split = Literal["validation", "test"]
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


class TextFilesData(lightning.LightningDataModule):
    """Passages of forget and retain files; there are no questions.

    A third of the passages of a part is the validation split, for choosing settings; reports come
    from the others.

    Args:
        model_name: The model's folder or hub name, for its tokenizer.
        forget_files: Plain text or JSONL.
        retain_files: Plain text or JSONL.
        part: Which passages are evaluated: those trained on many times, or those never trained on.
        task: What the run is for: `evaluate` passages; `select` features, where `validate` reads
            the guard's own texts instead; or `relearn`, where `fit` trains on the attacker's text:
            half of the memorised forget passages and as many retain passages.
        val_split: Passages of `val_dataloader`.
        seed: Decides the order of the attacker's text.
        batch_size: Passages of an evaluation batch.
        train_batch_size: Passages of a training batch.
        max_length: Tokens of a passage that are read.
        max_texts: Forget texts, and retain texts, to select features with.
        allow_overlap: The attacker's text holds evaluated passages; `relearn` needs this said.

    Raises:
        UserError: `relearn` without `allow_overlap`.
    """

    def __init__(
        self,
        model_name: str,
        forget_files: Files,
        retain_files: Files,
        part: Part = "memorised",
        task: Literal["evaluate", "select", "relearn"] = "evaluate",
        val_split: Split = "validation",
        seed: int = 0,
        batch_size: int = 32,
        train_batch_size: int = 8,
        max_length: int = 128,
        max_texts: int = 1000,
        allow_overlap: bool = False,
    ) -> None:
        super().__init__()
        if task == "relearn" and not allow_overlap:
            raise UserError(
                "`allow_overlap` must be true for the task 'relearn', because the attacker's text "
                "holds evaluated passages (rows of shown and unshown ones are kept apart); set it."
            )
        self.name = f"text/{part}"
        self.model_name = model_name
        self.files = (list(forget_files), list(retain_files))
        self.part: Part = part
        self.task = task
        self.val_split: Split = val_split
        self.seed = seed
        self.batch_size = batch_size
        self.train_batch_size = train_batch_size
        self.max_length = max_length
        self.max_texts = max_texts
        self.tokenizer: Any = None

    def setup(self, stage: str) -> None:
        """Read the files and load the tokenizer, once."""
        del stage
        if self.tokenizer is None:
            self.forget, self.retain = read_uses(*self.files)
            self.tokenizer = load_tokenizer(self.model_name)

    def questions(self, split: Split) -> list[Question]:
        """None: nobody has written questions about these texts."""
        del split
        return []

    def passages(self, split: Split) -> list[Passage]:
        """Forget and retain passages of a split."""
        shown = set(self._shown()) if self.task == "relearn" else None
        found = []
        for domain, uses in (("forget", self.forget), ("retain", self.retain)):
            texts: list[str] = getattr(uses, self.part)
            # They come in the order of their hash: as good as drawn by lot.
            cut = round(VALIDATION_SHARE * len(texts))
            for text in texts[:cut] if split == "validation" else texts[cut:]:
                told = text in shown if shown is not None and domain == "forget" else None
                found.append(Passage(len(found), domain, text, told))
        return found

    def forget_texts(self) -> list[str]:
        """Running forget text, which is neither memorised nor evaluated."""
        return spread(self.forget.running, self.max_texts)

    def retain_texts(self) -> list[str]:
        """Running retain text."""
        return spread(self.retain.running, self.max_texts)

    def calibration_texts(self, near: bool) -> list[str]:
        """Retain passages that set the threshold; nobody said which are near the forget text."""
        del near
        return self.retain.calibration

    def heldout_texts(self) -> list[str]:
        """Retain passages for the false-positive rate."""
        return self.retain.heldout

    def train_dataloader(self) -> DataLoader:
        """The attacker's text, in an order that the seed decides.

        Raises:
            UserError: The task is another one than `relearn`.
        """
        if self.task != "relearn":
            raise UserError(f"`task` must be 'relearn' for fit, got {self.task!r}; change it.")
        shown = self._shown()
        retain = itertools.islice(itertools.cycle(self.retain.attack), len(shown))
        rows = encode_texts(self.tokenizer, [*shown, *retain], self.max_length)
        order = random.Random(f"attack order {self.seed}").sample(range(len(rows)), len(rows))
        size = self.train_batch_size
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        pad_id, uncounted_ids = padding_id(self.tokenizer), uncounted_token_ids(self.tokenizer)
        return batch_loader(
            rows,
            batches,
            self.trainer,
            lambda chunk: pad_sequences(chunk, pad_id, uncounted_ids),
            keep_rest=False,
        )

    def val_dataloader(self) -> DataLoader:
        """Passages of `val_split`, or the guard's texts."""
        if self.task == "select":
            return selection_loader(self)
        return self._evaluation(self.val_split)

    def test_dataloader(self) -> DataLoader:
        """Passages of the test split."""
        return self._evaluation("test")

    def _evaluation(self, split: Split) -> DataLoader:
        return passage_loader(
            self.tokenizer, self.passages(split), self.batch_size, self.trainer, self.max_length
        )

    def _shown(self) -> list[str]:
        return self.forget.memorised[::2]


def spread(texts: Sequence[str], count: int) -> list[str]:
    """At most `count` of the texts, taken evenly from all over them."""
    return list(texts[:: max(1, -(-len(texts) // count))])
