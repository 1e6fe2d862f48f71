"""MUSE News and Books: evaluation, fine-tuning, unlearning and relearning data."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from datamodules.parts.benchmark import BenchmarkData, Split
from datamodules.parts.loading import BatchSize, Pairs, Rows
from datamodules.parts.rows import Items, half, numbered, read_texts, retain_parts
from datamodules.parts.training_text import running_rows, word_pieces
from dsg.errors import UserError
from dsg.evaluation import Measurement, Passage, Prompt, item_key
from dsg.evaluation.benchmarks import muse
from dsg.io import dataset_revision, short_name
from dsg.selection import describe_texts, evenly

ForgetSet = Literal[
    "raw", "scal_1", "scal_2", "scal_3", "scal_4", "sust_1", "sust_2", "sust_3", "sust_4"
]

_DATASETS = {"news": "muse-bench/MUSE-News", "books": "muse-bench/MUSE-Books"}
_PRIVLEAK = ("forget", "retain", "holdout")


class MuseData(BenchmarkData):
    """One corpus of MUSE.

    Evaluations continue passages (VerbMem), answer questions after examples (KnowMem) and compare
    forget with holdout texts (PrivLeak). The benchmark measures forgetting on the forget texts
    themselves, so those of a guard or an unlearning run are evaluated by design; of the retain
    texts, `retain1` trains and `retain2` is evaluated. An attacker has half of the forget text and
    as much retain text.

    Args:
        model_name: The model's folder or hub name, for its tokenizer.
        corpus: `news` or `books`.
        dataset: Hub name (`name@revision` pins it) or folder in the hub's layout; None takes the
            published one of the corpus.
        retrained: Where PrivLeak's reference comes from: the run directory of an evaluation of the
            retrained model; `official`, the published number; or `self`, because this evaluation is
            that of the retrained model and measures only the AUC.
        forget_set: Which text is to be forgotten: `raw`, or a fold of the growing (`scal`) or the
            successive (`sust`) ones, which only News has.
        items: `all` evaluates every item, as published, on the split `test`; `halves` keeps half of
            them (by hash) as `validation` for choosing settings.
        finetune_on: `target`: the forget and all retain text; `retrained`: the retain text alone.
        seed: Decides the order of training text.
        batch_size: Items of an evaluation batch, or `auto`.
        train_batch_size: Rows of a training batch.
        max_length: Tokens of a training row, and of a PrivLeak text that are read.
        num_words: Words of a guard's text; longer ones are cut into pieces.
        max_texts: Forget texts, and retain texts, to select features with.
        allow_overlap: The attacker's text holds evaluated passages; an attack needs this said.

    Raises:
        UserError: A fold of Books.
    """

    overlap = "holds evaluated passages"
    trains = ("finetune", "unlearn", "relearn")

    def __init__(
        self,
        model_name: str,
        corpus: Literal["news", "books"] = "news",
        dataset: str | None = None,
        retrained: str | None = None,
        forget_set: ForgetSet = "raw",
        items: Items = "all",
        finetune_on: Literal["target", "retrained"] = "target",
        seed: int = 0,
        batch_size: BatchSize = 8,
        train_batch_size: int = 4,
        max_length: int = 2048,
        num_words: int = 700,
        max_texts: int = 1024,
        allow_overlap: bool = False,
    ) -> None:
        val_split: Split = "validation" if items == "halves" else "test"
        super().__init__(model_name, val_split, batch_size, train_batch_size, seed, allow_overlap)
        if corpus == "books" and forget_set != "raw":
            raise UserError(
                f"`forget_set` of books must be 'raw', got {forget_set!r}: only news has folds; "
                "change one of them."
            )
        self.name = f"muse_{corpus}"
        self.dataset = dataset or _DATASETS[corpus]
        self.retrained = retrained
        self.forget_set: ForgetSet = forget_set
        self.items: Items = items
        self.finetune_on = finetune_on
        self.max_length = max_length
        self.passage_length = max_length
        self.num_words = num_words
        self.max_texts = max_texts
        self._texts: dict[tuple[str, str], list[tuple[str, ...]]] = {}

    def setup(self, stage: str) -> None:
        """Load the tokenizer, and find the retrained model's AUC before anything is computed.

        Raises:
            UserError: An evaluation without `retrained`, or an overlap that nobody allowed.
        """
        evaluates = self.reads not in ("select", "finetune")
        if evaluates:
            muse.check_retrained(self.name, self.retrained)
        super().setup(stage)
        if evaluates:
            self._retrained_auc("test" if stage == "test" else self.val_split)

    def passages(self, split: Split) -> list[Passage]:
        """The texts of PrivLeak."""
        pairs = [
            (domain, text)
            for domain in _PRIVLEAK
            for (text,) in self._half("privleak", domain, split, "text")
        ]
        keys = numbered(item_key(domain, text) for domain, text in pairs)
        return [
            Passage(number, domain, text, key=key)
            for number, ((domain, text), key) in enumerate(zip(pairs, keys, strict=True))
        ]

    def prompts(self, split: Split) -> list[Prompt]:
        """The passages of VerbMem and the questions of KnowMem."""
        verbatim = [
            (muse.VERBMEM, text, end, muse.VERBMEM_TOKENS, (), muse.VERBMEM_TOKENS)
            for text, end in self._half("verbmem", "forget", split, "prompt", "gt")
        ]
        answered = []
        for domain, kind in ((muse.KNOWMEM_FORGET, "forget"), (muse.KNOWMEM_RETAIN, "retain")):
            columns = ("question", "answer")
            examples = self._read("knowmem", f"{kind}_qa_icl", *columns)
            answered += [
                (
                    domain,
                    muse.knowmem_prompt([(q, a) for q, a in examples], question),
                    answer,
                    muse.KNOWMEM_TOKENS,
                    muse.KNOWMEM_STOP,
                    None,
                )
                for question, answer in self._half("knowmem", f"{kind}_qa", split, *columns)
            ]
        rows = [*verbatim, *answered]
        keys = numbered(item_key(domain, text, reference) for domain, text, reference, *_ in rows)
        return [
            Prompt(number, *row, key=key)
            for number, (row, key) in enumerate(zip(rows, keys, strict=True))
        ]

    def measure(
        self, split: Split, samples: Mapping[str, Mapping[str, Tensor]]
    ) -> list[Measurement]:
        """VerbMem, KnowMem, the AUC of Min-K % Prob and PrivLeak."""
        return muse.measure(
            [prompt.domain for prompt in self.prompts(split)],
            samples["prompts"]["rouge_l"],
            [passage.domain for passage in self.passages(split)],
            samples["passages"]["min_k"],
            self._retrained_auc(split),
        )

    def forget_texts(self) -> list[str]:
        """Pieces of the text to be forgotten."""
        return evenly(self._forget_pieces(), self.max_texts)

    def retain_texts(self) -> list[str]:
        """Pieces of the retain text that trains."""
        return evenly(self._retain_parts()[0], self.max_texts)

    def calibration_texts(self, near: bool) -> list[str]:
        """Pieces of retain text that set the threshold; MUSE names no near domain."""
        del near
        return self._retain_parts()[1]

    def heldout_texts(self) -> list[str]:
        """Pieces of retain text for the false-positive rate."""
        return self._retain_parts()[2]

    def facts(self) -> dict[str, Any]:
        """Which texts the run is about."""
        facts: dict[str, Any] = {
            "dataset": short_name(self.dataset),
            "revision": dataset_revision(self.dataset, "raw"),
            "forget_set": self.forget_set,
            "items": self.items,
        }
        if self.reads == "finetune":
            return facts | {"training": describe_texts(self._finetuning_texts())}
        return facts | {"forget": describe_texts(self._forget())}

    def training(self) -> Rows | Pairs:
        """Text to learn, pairs of forget and retain text, or the attacker's mixture of both."""
        length = self.max_length
        if self.reads == "finetune":
            return Rows(running_rows(self.tokenizer, self._finetuning_texts(), length))
        forget = running_rows(self.tokenizer, self._forget(), length)
        retain = running_rows(self.tokenizer, self._column("raw", "retain1"), length)
        if self.reads == "unlearn":
            return Pairs(forget, retain)
        shown = forget[::2]
        return Rows([*shown, *evenly(retain, len(shown))])

    def _retrained_auc(self, split: Split) -> float | None:
        assert self.retrained is not None
        if self.retrained == muse.SELF:
            return None
        compared = [p for p in self.passages(split) if p.domain in ("forget", "holdout")]
        return muse.retrained_auc(str(self.name), self.retrained, split, len(compared))

    def _forget(self) -> list[str]:
        config, _, number = self.forget_set.partition("_")
        return self._column(config, f"forget_{number}" if number else "forget")

    def _forget_pieces(self) -> list[str]:
        return word_pieces(self._forget(), self.num_words)

    def _retain_parts(self) -> list[list[str]]:
        pieces = word_pieces(self._column("raw", "retain1"), self.num_words)
        return retain_parts(pieces, self._forget_pieces())

    def _finetuning_texts(self) -> list[str]:
        splits = ("forget", "retain1", "retain2")
        used = splits if self.finetune_on == "target" else splits[1:]
        return [text for split in used for text in self._column("train", split)]

    def _column(self, config: str, split: str) -> list[str]:
        return [text for (text,) in self._read(config, split, "text")]

    def _half(self, config: str, name: str, split: Split, *columns: str) -> list[tuple[str, ...]]:
        rows = self._read(config, name, *columns)
        return half(rows, [row[0] for row in rows], self.items, split)

    def _read(self, config: str, split: str, *columns: str) -> Sequence[tuple[str, ...]]:
        if (config, split) not in self._texts:
            self._texts[config, split] = read_texts(self.dataset, config, split, *columns)
        return self._texts[config, split]
