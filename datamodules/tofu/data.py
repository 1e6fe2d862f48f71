"""TOFU, made-up authors to be forgotten: data of every kind of run."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from torch import Tensor

from datamodules.parts.benchmark import BenchmarkData, Split
from datamodules.parts.loading import BatchSize, Pairs, Rows
from datamodules.parts.rows import Items, half, retain_parts
from datamodules.parts.training_text import TrainingRow, answer_rows, running_rows
from datamodules.tofu.texts import Asked, Template, TofuTexts
from dsg.evaluation import Measurement, Passage, Prompt, Question
from dsg.evaluation.benchmarks import tofu
from dsg.io import dataset_revision, short_name
from dsg.selection import describe_texts, evenly, normalised

TOFU = "locuslab/TOFU@324592d84ae4f482ac7249b9285c2ecdb53e3a68"

# The configuration with perturbed answers of each domain but the forget set.
_ASKED = {
    "retain": "retain_perturbed",
    "real_authors": "real_authors_perturbed",
    "world_facts": "world_facts_perturbed",
}


class TofuData(BenchmarkData):
    """TOFU with one of its forget sets.

    Everything is reported on the forget set, on the retain set, on real authors and on world facts.
    The benchmark asks about the very pairs that are to be forgotten, so the text of a guard or an
    unlearning run is evaluated by design; retain pairs that are evaluated make no guard. An
    attacker has half of the forget pairs and as many retain pairs.

    Args:
        model_name: The model's folder or hub name, for its tokenizer.
        dataset: Hub name (`name@revision` pins it) or folder in the hub's layout.
        forget_percent: Share of the authors to be forgotten; 10 is `forget10` against `retain90`.
        retained: Where forget quality's reference comes from: the run directory of an evaluation of
            the model trained on the retain set alone, or `self`, because this is that evaluation.
        template: `plain`: `Question: ...` and `Answer: ...` in two lines; `chat`: the tokenizer's
            chat template. The same for training and evaluation.
        items: `all` evaluates every item, as published, on the split `test`; `halves` keeps half of
            them (by the hash of the question) as `validation` for choosing settings.
        finetune_on: `target`: all pairs; `retrained`: the retain pairs alone.
        seed: Decides the order of training text.
        batch_size: Items of an evaluation batch, or `auto`.
        train_batch_size: Rows of a training batch.
        max_length: Tokens of a training row.
        max_texts: Forget texts, and retain texts, to select features with.
        allow_overlap: The attacker's text holds evaluated questions; an attack needs this said.
    """

    name = "tofu"
    overlap = "holds evaluated questions"
    trains = ("finetune", "unlearn", "relearn")

    def __init__(
        self,
        model_name: str,
        dataset: str = TOFU,
        forget_percent: Literal[1, 5, 10] = 10,
        retained: str | None = None,
        template: Template = "plain",
        items: Items = "all",
        finetune_on: Literal["target", "retrained"] = "target",
        seed: int = 0,
        batch_size: BatchSize = 16,
        train_batch_size: int = 16,
        max_length: int = 512,
        max_texts: int = 1024,
        allow_overlap: bool = False,
    ) -> None:
        val_split: Split = "validation" if items == "halves" else "test"
        super().__init__(model_name, val_split, batch_size, train_batch_size, seed, allow_overlap)
        self.dataset = dataset
        self.forget_percent = forget_percent
        self.forget_config = f"forget{forget_percent:02}"
        self.retain_config = f"retain{100 - forget_percent}"
        self.retained = retained
        self.template: Template = template
        self.items: Items = items
        self.finetune_on = finetune_on
        self.max_length = max_length
        self.max_texts = max_texts

    def setup(self, stage: str) -> None:
        """Load the tokenizer, and find the retained model's scores before anything is computed.

        Raises:
            UserError: An evaluation without `retained`, an overlap that nobody allowed, or the
                template is `chat` and the tokenizer has none.
        """
        evaluates = self.reads not in ("select", "finetune")
        if evaluates:
            tofu.check_retained(self.retained, self.forget_percent)
        first = self.tokenizer is None
        super().setup(stage)
        if first:
            self.texts = TofuTexts(self.dataset, self.tokenizer, self.template)
        if evaluates:
            self._retained_ratios("test" if stage == "test" else self.val_split)

    def questions(self, split: Split) -> list[Question]:
        """The right answer (a paraphrase of it where there is one) before perturbed ones."""
        return self.texts.questions(self._asked(split))

    def passages(self, split: Split) -> list[Passage]:
        """The answers of the forget and the retain set, after their questions."""
        rows = self._asked(split)
        return self.texts.passages([row for row in rows if row.domain not in tofu.WITH_OPTIONS])

    def prompts(self, split: Split) -> list[Prompt]:
        """All questions, to be answered freely."""
        return self.texts.prompts(self._asked(split))

    def measure(
        self, split: Split, samples: Mapping[str, Mapping[str, Tensor]]
    ) -> list[Measurement]:
        """Probability, ROUGE and truth ratio per domain, model utility, forget quality."""
        domains = {
            "questions": [question.domain for question in self.questions(split)],
            "passages": [passage.domain for passage in self.passages(split)],
            "prompts": [prompt.domain for prompt in self.prompts(split)],
        }
        return tofu.measure(tofu.scores(domains, samples), self._retained_ratios(split))

    def forget_texts(self) -> list[str]:
        """The pairs to be forgotten."""
        return evenly(self.texts.whole(self.forget_config), self.max_texts)

    def retain_texts(self) -> list[str]:
        """Retain pairs that are not evaluated."""
        return evenly(self._retain_parts()[0], self.max_texts)

    def calibration_texts(self, near: bool) -> list[str]:
        """Retain pairs that set the threshold: all authors are as near as each other."""
        del near
        return self._retain_parts()[1]

    def heldout_texts(self) -> list[str]:
        """Retain pairs for the false-positive rate."""
        return self._retain_parts()[2]

    def facts(self) -> dict[str, Any]:
        """Which texts the run is about."""
        trained = self._finetuning_config() if self.reads == "finetune" else self.forget_config
        return {
            "dataset": short_name(self.dataset),
            "revision": dataset_revision(self.dataset, self.forget_config),
            "forget_percent": self.forget_percent,
            "template": self.template,
            "items": self.items,
            "training" if self.reads == "finetune" else "forget": describe_texts(
                self.texts.whole(trained)
            ),
        }

    def training(self) -> Rows | Pairs:
        """Answers to learn, pairs of forget and retain answers, or the attacker's running text."""
        if self.reads == "finetune":
            return Rows(self._answers(self._finetuning_config()))
        if self.reads == "unlearn":
            return Pairs(self._answers(self.forget_config), self._answers(self.retain_config))
        shown = self.texts.whole(self.forget_config)[::2]
        texts = [*shown, *evenly(self.texts.whole(self.retain_config), len(shown))]
        return Rows(running_rows(self.tokenizer, texts, self.max_length))

    def _answers(self, config: str) -> list[TrainingRow]:
        return answer_rows(self.tokenizer, self.texts.written(config), self.max_length)

    def _retained_ratios(self, split: Split) -> np.ndarray | None:
        assert self.retained is not None
        if self.retained == tofu.SELF:
            return None
        keys = [q.key for q in self.questions(split) if q.domain == tofu.FORGET]
        return tofu.retained_ratios(self.retained, self.forget_percent, keys)

    def _asked(self, split: Split) -> list[Asked]:
        configs = {tofu.FORGET: f"{self.forget_config}_perturbed", **_ASKED}
        asked = []
        for domain, config in configs.items():
            rows = self.texts.asked(domain, config)
            asked += half(rows, [row.question for row in rows], self.items, split)
        return asked

    def _retain_parts(self) -> list[list[str]]:
        """Retain pairs by their use; what is evaluated has none of these."""
        asked = {normalised(row.question) for row in self.texts.asked("retain", _ASKED["retain"])}
        pairs, written = self.texts.pairs(self.retain_config), self.texts.whole(self.retain_config)
        kept = [
            text
            for (question, _), text in zip(pairs, written, strict=True)
            if normalised(question) not in asked
        ]
        return retain_parts(kept, self.texts.whole(self.forget_config))

    def _finetuning_config(self) -> str:
        return "full" if self.finetune_on == "target" else self.retain_config
