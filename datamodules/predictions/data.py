"""Texts to predict about, as Lightning data: from a file, or those of another data module."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning
from torch.utils.data import DataLoader

from datamodules.parts.batches import batch_loader
from datamodules.parts.corpora import Corpora, CorpusSettings, FromCorpora
from datamodules.parts.loading import BatchSize, load_tokenizer
from datamodules.predictions.texts import read_texts, texts_of_items
from dsg.errors import UserError
from dsg.evaluation import PromptBatch, Text
from dsg.io import dataset_revision, short_name
from dsg.lm import (
    encode_texts,
    length_batches,
    load_config,
    pad_sequences,
    padding_id,
    uncounted_token_ids,
)
from dsg.selection import describe_texts

_GUARD_TEXTS = ("forget_texts", "retain_texts", "calibration_texts", "heldout_texts")

_log = logging.getLogger(__name__)


class PredictionData(lightning.LightningDataModule):
    """What all texts to predict about have in common: how they are cut, batched and dealt.

    Args:
        model_name: The model's folder or hub name, for its tokenizer and configuration.
        max_length: Tokens of a text that are read; None reads what the model's context holds, less
            the continuation.
        batch_size: Texts of a batch; `auto` fills batches up to a number of tokens.
    """

    name: str
    texts: list[Text]

    def __init__(self, model_name: str, max_length: int | None, batch_size: BatchSize) -> None:
        super().__init__()
        self.model_name = model_name
        self.max_length = max_length
        self.batch_size: BatchSize = batch_size
        self.tokenizer: Any = None

    def setup(self, stage: str) -> None:
        """Load the tokenizer, read all texts and cut those that are too long, once.

        Raises:
            UserError: A text cannot be used, or a conversation is too long.
        """
        if self.tokenizer is not None:
            return
        tokenizer = load_tokenizer(self.model_name)
        texts = self._read(tokenizer, stage)
        length = self._length()
        self._rows = encode_texts(tokenizer, [text.text for text in texts], None)
        for text, row in zip(texts, self._rows, strict=True):
            if not row or (text.is_chat and length is not None and len(row) > length):
                wanted = "at least one token" if not row else f"at most {length}, to stay whole"
                raise UserError(
                    f"the text {text.key!r} must have {wanted}, got {len(row)} tokens; change it."
                )
        self.texts = [
            replace(text, num_tokens=len(row[:length]), truncated=len(row[:length]) < len(row))
            for text, row in zip(texts, self._rows, strict=True)
        ]
        self._rows = [row[:length] for row in self._rows]
        self.tokenizer = tokenizer
        num_cut = sum(text.truncated for text in self.texts)
        if num_cut:
            _log.warning(
                "%d of %d texts have more than %d tokens; only their beginnings are read "
                "(`truncated` in the rows).",
                num_cut,
                len(texts),
                length,
            )

    def predict_dataloader(self) -> "WholeBatches":
        """Each text exactly once, those of similar length together."""
        pad_id, uncounted_ids = padding_id(self.tokenizer), uncounted_token_ids(self.tokenizer)
        num_new = self._num_new_tokens()

        def collate(ids: Sequence[int]) -> PromptBatch:
            import torch

            rows = [self._rows[id] for id in ids]
            return PromptBatch(
                tokens=pad_sequences(rows, pad_id, uncounted_ids, side="left"),
                ids=torch.tensor(ids),
                references=[""] * len(ids),
                max_new_tokens=num_new,
                stop=(),
                tokenizer=self.tokenizer,
            )

        batches = length_batches([len(row) + num_new for row in self._rows], self.batch_size)
        places = range(len(self._rows))
        return WholeBatches(batch_loader(places, batches, self.trainer, collate, keep_rest=True))

    def facts(self) -> dict[str, Any]:
        """How many texts there are, the hash of all of them, and how many were cut."""
        return {
            **describe_texts([text.text for text in self.texts]),
            "truncated": sum(text.truncated for text in self.texts),
        }

    def _read(self, tokenizer: Any, stage: str) -> list[Text]:
        raise NotImplementedError

    def _num_new_tokens(self) -> int:
        module = getattr(self.trainer, "lightning_module", None)
        return getattr(module, "num_new_tokens", 0)

    def _length(self) -> int | None:
        """Tokens to read of a text, so that its continuation fits in the model's context."""
        config = load_config(self.model_name).get_text_config()
        context = getattr(config, "max_position_embeddings", None)
        if context is None:
            return self.max_length
        room = context - self._num_new_tokens()
        wanted = room if self.max_length is None else self.max_length
        if not 1 <= wanted <= room:
            raise UserError(
                f"`max_length` must be from 1 to {max(room, 1)}, because text and continuation "
                f"share {context} positions, got {wanted}; change it or `max_new_tokens`."
            )
        return wanted


class TextRowsData(FromCorpora, PredictionData):
    """Texts or conversations of a file or data set.

    Args:
        model_name: The model's folder or hub name, for its tokenizer and configuration.
        source: A plain text (`.txt`), whose paragraphs are the texts; a JSONL, JSON, CSV or Parquet
            file; a hub name (`@revision` pins it); or a folder in the hub's layout. Rows may have
            an `id` and a `domain`.
        column: Column of the text; or of a conversation, a list of messages by user and assistant
            in turn (strings, or objects with `role` and `content`).
        config: Configuration of a data set; None where there is only one.
        split: Split of a data set.
        max_length: Tokens of a text that are read, its first ones; None reads what the model's
            context holds, less the continuation. Conversations are never cut.
        batch_size: Texts of a batch; `auto` fills batches up to a number of tokens.
        corpora: Texts to make a guard from; None where it is loaded.
    """

    def __init__(
        self,
        model_name: str,
        source: str,
        column: str = "text",
        config: str | None = None,
        split: str = "train",
        max_length: int | None = None,
        batch_size: BatchSize = "auto",
        corpora: CorpusSettings | None = None,
    ) -> None:
        super().__init__(model_name, max_length, batch_size)
        self.name = Path(source).stem
        self.source = source
        self.column = column
        self.config = config
        self.split = split
        self.corpora = None if corpora is None else Corpora(corpora)

    def facts(self) -> dict[str, Any]:
        """Where the texts came from, how many they are, and the texts of the guard."""
        return {
            "source": short_name(self.source),
            "revision": self._revision,
            **super().facts(),
            "corpora": self.corpora.facts() if self.corpora else {},
        }

    def _read(self, tokenizer: Any, stage: str) -> list[Text]:
        del stage
        texts = read_texts(self.source, self.config, self.split, self.column, tokenizer)
        is_text = Path(self.source).is_file()
        self._revision = None if is_text else dataset_revision(self.source, self.config)
        return texts


class ItemTextsData(PredictionData):
    """What another data module evaluates, from whose texts a guard is made as well.

    Of questions the prompts, passages, prompts to be continued, first messages of conversations.

    Args:
        of: The other data module.
        split: Which of its halves.
        max_length: Tokens of a text that are read, its first ones; None reads what the model's
            context holds, less the continuation.
        batch_size: Texts of a batch; `auto` fills batches up to a number of tokens.
    """

    def __init__(
        self,
        of: lightning.LightningDataModule,
        split: Literal["validation", "test"] = "test",
        max_length: int | None = None,
        batch_size: BatchSize = "auto",
    ) -> None:
        given: Any = of
        if not hasattr(given, "model_name"):
            raise UserError(
                f"`of` must be a data module of an evaluation, got {type(of).__name__}; name one "
                "that `dsg test` takes."
            )
        super().__init__(given.model_name, max_length, batch_size)
        self.of = given
        self.split = split
        self.name = getattr(given, "name", type(given).__name__)
        for name in _GUARD_TEXTS:
            if hasattr(given, name):
                setattr(self, name, getattr(given, name))

    def _read(self, tokenizer: Any, stage: str) -> list[Text]:
        del tokenizer, stage
        self.of.setup("test")
        return texts_of_items(self.of, self.split)


class WholeBatches:
    """The batches of a loader, each as it was dealt.

    For `predict` Lightning makes data loaders anew, to wrap their batch samplers; of other
    iterables it keeps its hands off.

    Args:
        loader: Yields the batches.
    """

    def __init__(self, loader: DataLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader)

    def __len__(self) -> int:
        return len(self._loader)
