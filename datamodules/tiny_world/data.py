"""The embedded benchmark as Lightning data: evaluation, unlearning, relearning and sequences."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import lightning
from torch.utils.data import DataLoader

from datamodules.parts.guard_texts import selection_loader
from datamodules.parts.loading import batch_loader, load_tokenizer
from datamodules.tiny_world.attacks import OVERLAPPING, Attack, AttackText
from datamodules.tiny_world.loaders import (
    chunks,
    evaluation_loaders,
    token_collate,
    unlearning_loader,
)
from datamodules.tiny_world.texts import TinyWorldTexts
from datamodules.tiny_world.words import FORGET_DOMAINS
from datamodules.tiny_world.world import Split
from dsg.errors import UserError
from dsg.evaluation import Passage, Question
from dsg.lm import encode_texts
from dsg.selection import describe_texts

Task = Literal["evaluate", "select", "unlearn", "relearn"]


class TinyWorldData(lightning.LightningDataModule):
    """One forget domain of the tiny world.

    Validation facts are for choosing settings, test facts for reports. A run that chooses nothing
    may evaluate on test facts during `fit` already (`val_split`).

    Args:
        model_name: Folder of the benchmark's model, for its tokenizer.
        seed: The world's seed.
        forget_domain: `pathogen`, `malware` or `toxin`.
        task: What the run is for: `evaluate` questions and passages; `select` features, where
            `validate` reads the guard's own texts instead; or what `fit` trains on: pairs of forget
            and retain batches (`unlearn`), or the attacker's text (`relearn`).
        val_split: Facts that `val_dataloader` asks about.
        batch_size: Questions or passages of an evaluation batch.
        train_batch_size: Texts of a training batch; of each kind for `unlearn`.
        num_train_texts: Forget texts of the training data, or examples of the attacker's kind of
            text; there are as many retain texts.
        attack_text: What the attacker has: `forget` documents or evaluation `questions` about half
            of the forget entities, benign `related` documents of the near domain, `unrelated`
            sentences about no entity, or only `retain` documents.
        allow_overlap: The attacker's text states evaluated facts; for `forget` and `questions` this
            must be said. Of the others no example may be an evaluated text.

    Raises:
        UserError: An overlap that nobody allowed, no text or no batch, or an unknown forget domain.
    """

    def __init__(
        self,
        model_name: str,
        seed: int = 0,
        forget_domain: str = "pathogen",
        task: Task = "evaluate",
        val_split: Split = "validation",
        batch_size: int = 64,
        train_batch_size: int = 8,
        num_train_texts: int = 120,
        attack_text: AttackText = "forget",
        allow_overlap: bool = False,
    ) -> None:
        super().__init__()
        if task == "relearn" and attack_text in OVERLAPPING and not allow_overlap:
            raise UserError(
                f"`allow_overlap` must be true for the attack text {attack_text!r}, because it "
                "states facts that are evaluated (rows of shown and unshown facts are kept apart); "
                "set it."
            )
        if train_batch_size < 1:
            raise UserError(f"`train_batch_size` must be at least 1, got {train_batch_size}.")
        self.name = f"tiny_world/{forget_domain}"
        self.model_name = model_name
        self.seed = seed
        self.texts = TinyWorldTexts(seed, forget_domain)
        self.task = task
        self.attack_text: AttackText = attack_text
        self.attack = Attack(self.texts, attack_text, num_train_texts, val_split)
        self.val_split: Split = val_split
        self.batch_size = batch_size
        self.train_batch_size = train_batch_size
        self.num_train_texts = num_train_texts
        self.tokenizer: Any = None

    def setup(self, stage: str) -> None:
        """Load the tokenizer, once, and look at the attacker's text before anybody trains on it."""
        del stage
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(self.model_name)
        if self.task == "relearn":
            self.attack.check_overlap()
            ranks = self.trainer.world_size if self.trainer else 1
            num_batches = len(chunks(self.attack.examples, self.train_batch_size))
            if num_batches < ranks:
                raise UserError(
                    f"`num_train_texts` must give each of {ranks} devices a batch of "
                    f"{self.train_batch_size}, got {self.num_train_texts}; raise it."
                )

    def state_dict(self) -> dict[str, Any]:
        """What decides the batches of a run, for its checkpoints."""
        return self.facts()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse the checkpoint of a run on other data.

        Raises:
            UserError: It is one.
        """
        if state_dict != self.facts():
            raise UserError(
                f"the checkpoint must be of a run on the same data, {self.facts()}, got "
                f"{state_dict}; give the same data or start again with --overwrite."
            )

    def facts(self) -> dict[str, Any]:
        """The data of the run in a few plain values; texts as their number and digest."""
        facts: dict[str, Any] = {"name": self.name, "seed": self.seed, "val_split": self.val_split}
        if self.task == "unlearn":
            for kind, texts in (("forget", self.forget_texts()), ("retain", self.retain_texts())):
                facts[f"train_{kind}_texts"] = describe_texts(texts[: self.num_train_texts])
        if self.task == "relearn":
            facts["attack_text"] = self.attack_text
            facts["train_texts"] = describe_texts(self.attack.examples)
        return facts

    def questions(self, split: Split) -> list[Question]:
        """All questions of a half of the facts."""
        shown = self.attack.shown_facts if self.task == "relearn" else None
        return self.texts.questions(split, shown)

    def passages(self, split: Split) -> list[Passage]:
        """Documents whose perplexity is measured."""
        return self.texts.passages(split)

    def forget_texts(self) -> list[str]:
        """Documents of the forget domain."""
        return self.texts.forget_texts()

    def retain_texts(self) -> list[str]:
        """Documents of the distant domains."""
        return self.texts.retain_texts()

    def calibration_texts(self, near: bool) -> list[str]:
        """Short retain texts that set the threshold."""
        return self.texts.calibration_texts(near)

    def heldout_texts(self) -> list[str]:
        """Short retain texts for the false-positive rate."""
        return self.texts.heldout_texts()

    def train_dataloader(self) -> DataLoader:
        """Batches of the attacker's or the unlearner's text, in an order that the seed decides.

        Raises:
            UserError: The task is `evaluate` or `select`.
        """
        if self.task in ("evaluate", "select"):
            raise UserError(
                f"`task` must be 'unlearn' or 'relearn' for fit, got {self.task!r}; change it."
            )
        if self.task == "unlearn":
            # Dampening sums up every batch; gradient steps need equally many on each rank.
            module: Any = self.trainer.lightning_module if self.trainer else None
            keep_rest = module is not None and not module.automatic_optimization
            return unlearning_loader(
                self.tokenizer,
                self.forget_texts()[: self.num_train_texts],
                self.retain_texts()[: self.num_train_texts],
                self.train_batch_size,
                self.trainer,
                keep_rest=keep_rest,
            )
        rows = encode_texts(self.tokenizer, self.attack.examples, None)
        rng = random.Random(f"attack order {self.seed}")
        order = rng.sample(range(len(rows)), len(rows))
        return batch_loader(
            rows,
            chunks(order, self.train_batch_size),
            self.trainer,
            token_collate(self.tokenizer),
            keep_rest=False,
        )

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Questions and passages of `val_split`, or the guard's texts."""
        if self.task == "select":
            return selection_loader(self)
        return evaluation_loaders(self, self.val_split)

    def test_dataloader(self) -> list[DataLoader]:
        """Questions and passages of the test half."""
        return evaluation_loaders(self, "test")


class TinyWorldRequests(lightning.LightningDataModule):
    """A curriculum of forget requests; every evaluation asks about all of them.

    Args:
        model_name: Folder of the benchmark's model, for its tokenizer.
        seed: The world's seed.
        request_domains: Forget domains in the order in which they are requested.
        val_split: Facts that `val_dataloader` asks about.
        batch_size: Questions or passages of an evaluation batch.
        train_batch_size: Forget texts, and retain texts, of a training batch.
        num_train_texts: Forget texts, and retain texts, of a request.
        passes: How often an epoch goes through them.
    """

    name = "tiny_world"

    def __init__(
        self,
        model_name: str,
        seed: int = 0,
        request_domains: Sequence[str] = FORGET_DOMAINS,
        val_split: Split = "test",
        batch_size: int = 64,
        train_batch_size: int = 8,
        num_train_texts: int = 400,
        passes: int = 1,
    ) -> None:
        super().__init__()
        self.model_name = model_name
        self.seed = seed
        self.request_domains = list(request_domains)
        self.requests = [TinyWorldTexts(seed, domain) for domain in self.request_domains]
        self.val_split: Split = val_split
        self.batch_size = batch_size
        self.train_batch_size = train_batch_size
        self.num_train_texts = num_train_texts
        self.passes = passes
        self.tokenizer: Any = None

    def setup(self, stage: str) -> None:
        """Load the tokenizer, once."""
        del stage
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(self.model_name)

    def questions(self, split: Split) -> list[Question]:
        """Questions of every request's domain under its own name, and near and retain questions."""
        found = [
            replace(question, domain=texts.forget_domain)
            for texts in self.requests
            for question in texts.questions(split)
            if question.domain == "forget"
        ]
        found += [q for q in self.requests[0].questions(split) if q.domain in ("near", "retain")]
        return [replace(question, id=id) for id, question in enumerate(found)]

    def passages(self, split: Split) -> list[Passage]:
        """Retain documents whose perplexity is measured."""
        found = [p for p in self.requests[0].passages(split) if p.domain == "retain"]
        return [replace(passage, id=id) for id, passage in enumerate(found)]

    def retain_texts(self) -> list[str]:
        """Documents of the distant domains."""
        return self.requests[0].retain_texts()

    def calibration_texts(self, near: bool) -> list[str]:
        """Short retain texts that set the threshold; `near` adds the current request's others."""
        return self.requests[self._request()].calibration_texts(near)

    def heldout_texts(self) -> list[str]:
        """Short retain texts for the false-positive rate."""
        return self.requests[0].heldout_texts()

    def forget_texts(self) -> list[str]:
        """Documents of the current request's domain."""
        return self.requests[self._request()].forget_texts()

    def train_dataloader(self) -> DataLoader:
        """Forget and retain batches of the current request."""
        # Statistics need every batch; gradient steps need equally many on each rank.
        keep_rest = not self.trainer.lightning_module.automatic_optimization  # type: ignore
        return unlearning_loader(
            self.tokenizer,
            self.forget_texts()[: self.num_train_texts],
            self.retain_texts()[: self.num_train_texts],
            self.train_batch_size,
            self.trainer,
            passes=self.passes,
            keep_rest=keep_rest,
        )

    def val_dataloader(self) -> list[DataLoader]:
        """Questions and passages of `val_split`."""
        return evaluation_loaders(self, self.val_split)

    def _request(self) -> int:
        epoch = self.trainer.current_epoch if self.trainer else 0
        return min(epoch, len(self.requests) - 1)
