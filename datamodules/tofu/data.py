"""TOFU, made-up authors to be forgotten: data of every kind of run."""

from collections.abc import Mapping
from typing import Any, Literal

import lightning
import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.parts.guard_texts import selection_loader
from datamodules.parts.loading import (
    BatchSize,
    load_tokenizer,
    passage_loader,
    prompt_loader,
    question_loader,
)
from datamodules.parts.rows import Items, Split, half, normalised, retain_parts
from datamodules.parts.training_text import (
    answer_rows,
    evenly,
    pair_loader,
    running_rows,
    training_loader,
)
from datamodules.tofu.texts import Asked, Template, TofuTexts
from dsg.errors import UserError
from dsg.evaluation import Measurement, Passage, Prompt, Question
from dsg.evaluation.benchmarks import tofu
from dsg.io import dataset_revision, short_name
from dsg.selection import describe_texts

Task = Literal["evaluate", "select", "finetune", "unlearn", "relearn"]

TOFU = "locuslab/TOFU@324592d84ae4f482ac7249b9285c2ecdb53e3a68"

# The configuration with perturbed answers of each domain but the forget set.
_ASKED = {
    "retain": "retain_perturbed",
    "real_authors": "real_authors_perturbed",
    "world_facts": "world_facts_perturbed",
}


class TofuData(lightning.LightningDataModule):
    """TOFU with one of its forget sets.

    Everything is reported on the forget set, on the retain set, on real authors and on world facts.
    The benchmark asks about the very pairs that are to be forgotten, so the text of a guard or an
    unlearning run is evaluated by design; retain pairs that are evaluated make no guard.

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
        task: What the run is for: `evaluate`; `select` features, where `validate` reads the guard's
            own texts; `finetune`, `unlearn` or `relearn`, whose `fit` trains on half of the forget
            pairs and as many retain pairs.
        finetune_on: `target`: all pairs; `retrained`: the retain pairs alone.
        seed: Decides the order of training text.
        batch_size: Items of an evaluation batch, or `auto`.
        train_batch_size: Rows of a training batch.
        max_length: Tokens of a training row.
        max_texts: Forget texts, and retain texts, to select features with.
        allow_overlap: The attacker's text holds evaluated questions; `relearn` needs this said.

    Raises:
        UserError: `relearn` without `allow_overlap`, or an evaluation without `retained`.
    """

    name = "tofu"

    def __init__(
        self,
        model_name: str,
        dataset: str = TOFU,
        forget_percent: Literal[1, 5, 10] = 10,
        retained: str | None = None,
        template: Template = "plain",
        items: Items = "all",
        task: Task = "evaluate",
        finetune_on: Literal["target", "retrained"] = "target",
        seed: int = 0,
        batch_size: BatchSize = 16,
        train_batch_size: int = 16,
        max_length: int = 512,
        max_texts: int = 1024,
        allow_overlap: bool = False,
    ) -> None:
        super().__init__()
        if task == "relearn" and not allow_overlap:
            raise UserError(
                "`allow_overlap` must be true for the task 'relearn', because the attacker's text "
                "holds evaluated questions; set it."
            )
        if task not in ("select", "finetune"):
            tofu.check_retained(retained, forget_percent)
        self.model_name = model_name
        self.dataset = dataset
        self.forget_percent = forget_percent
        self.forget_config = f"forget{forget_percent:02}"
        self.retain_config = f"retain{100 - forget_percent}"
        self.retained = retained
        self.template: Template = template
        self.items: Items = items
        self.val_split: Split = "validation" if items == "halves" else "test"
        self.task: Task = task
        self.finetune_on = finetune_on
        self.seed = seed
        self.batch_size: BatchSize = batch_size
        self.train_batch_size = train_batch_size
        self.max_length = max_length
        self.max_texts = max_texts
        self.tokenizer: Any = None

    def setup(self, stage: str) -> None:
        """Load the tokenizer, and find the retained model's scores before anything is computed.

        Raises:
            UserError: The template is `chat` and the tokenizer has none.
        """
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(self.model_name)
            self.texts = TofuTexts(self.dataset, self.tokenizer, self.template)
        if self.task not in ("select", "finetune"):
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
        trained = self._finetuning_config() if self.task == "finetune" else self.forget_config
        return {
            "dataset": short_name(self.dataset),
            "revision": dataset_revision(self.dataset, self.forget_config),
            "forget_percent": self.forget_percent,
            "template": self.template,
            "items": self.items,
            "task": self.task,
            "training" if self.task == "finetune" else "forget": describe_texts(
                self.texts.whole(trained)
            ),
        }

    def train_dataloader(self) -> DataLoader:
        """What `task` trains on.

        Raises:
            UserError: It trains on nothing.
        """
        size, tokenizer = self.train_batch_size, self.tokenizer
        if self.task == "finetune":
            rows = answer_rows(
                tokenizer, self.texts.written(self._finetuning_config()), self.max_length
            )
            return training_loader(tokenizer, rows, size, self.seed, self.trainer)
        if self.task not in ("unlearn", "relearn"):
            raise UserError(
                f"`task` must be 'finetune', 'unlearn' or 'relearn' for fit, got {self.task!r}; "
                "change it."
            )
        if self.task == "unlearn":
            forget, retain = (
                answer_rows(tokenizer, self.texts.written(config), self.max_length)
                for config in (self.forget_config, self.retain_config)
            )
            return pair_loader(tokenizer, forget, retain, size, self.seed, self.trainer)
        shown = self.texts.whole(self.forget_config)[::2]
        texts = [*shown, *evenly(self.texts.whole(self.retain_config), len(shown))]
        rows = running_rows(tokenizer, texts, self.max_length)
        return training_loader(tokenizer, rows, size, self.seed, self.trainer)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Items of `val_split`, or the guard's texts."""
        return selection_loader(self) if self.task == "select" else self._loaders(self.val_split)

    def test_dataloader(self) -> list[DataLoader]:
        """Items of the test split."""
        return self._loaders("test")

    def _loaders(self, split: Split) -> list[DataLoader]:
        tokenizer, size, trainer = self.tokenizer, self.batch_size, self.trainer
        return [
            question_loader(tokenizer, self.questions(split), size, trainer),
            passage_loader(tokenizer, self.passages(split), size, trainer),
            prompt_loader(tokenizer, self.prompts(split), size, trainer),
        ]

    def _retained_ratios(self, split: Split) -> np.ndarray | None:
        assert self.retained is not None
        if self.retained == tofu.SELF:
            return None
        keys = [q.key for q in self.questions(split) if q.domain == tofu.FORGET]
        return tofu.retained_ratios(self.retained, self.forget_percent, keys)

    def _asked(self, split: Split) -> list[Asked]:
        configs = {tofu.FORGET: f"{self.forget_config}_perturbed", **_ASKED}
        found = []
        for domain, config in configs.items():
            rows = self.texts.asked(domain, config)
            found += half(rows, [row.question for row in rows], self.items, split)
        return found

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
