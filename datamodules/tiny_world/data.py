"""The embedded benchmark as Lightning data: evaluation, unlearning, relearning and sequences."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from datamodules.parts.benchmark import BenchmarkData
from datamodules.parts.loading import Pairs, Rows
from datamodules.parts.training_text import whole_rows
from datamodules.tiny_world.attacks import OVERLAPPING, Attack, AttackText
from datamodules.tiny_world.texts import TinyWorldTexts
from datamodules.tiny_world.words import FORGET_DOMAINS
from datamodules.tiny_world.world import Split
from dsg.errors import UserError
from dsg.evaluation import Passage, Question
from dsg.selection import describe_texts


class TinyWorldData(BenchmarkData):
    """One forget domain of the tiny world.

    Validation facts are for choosing settings, test facts for reports. A run that chooses nothing
    may evaluate on test facts during `fit` already (`val_split`).

    Args:
        model_name: Folder of the benchmark's model, for its tokenizer.
        seed: The world's seed.
        forget_domain: `pathogen`, `malware` or `toxin`.
        val_split: Facts that `val_dataloader` asks about.
        batch_size: Questions or passages of an evaluation batch.
        train_batch_size: Texts of a training batch; of each kind where a model unlearns.
        num_train_texts: Forget texts of the training data, or examples of the attacker's kind of
            text; there are as many retain texts.
        attack_text: What the attacker has: `forget` documents or evaluation `questions` about half
            of the forget entities, benign `related` documents of the near domain, `unrelated`
            sentences about no entity, or only `retain` documents.
        allow_overlap: The attacker's text states evaluated facts; for `forget` and `questions` this
            must be said. Of the others no example may be an evaluated text.
        calibration: Retain texts that set a guard's threshold: shaped like `questions`, or whole
            `documents`.

    Raises:
        UserError: No text or no batch, or an unknown forget domain.
    """

    def __init__(
        self,
        model_name: str,
        seed: int = 0,
        forget_domain: str = "pathogen",
        val_split: Split = "validation",
        batch_size: int = 64,
        train_batch_size: int = 8,
        num_train_texts: int = 120,
        attack_text: AttackText = "forget",
        allow_overlap: bool = False,
        calibration: Literal["questions", "documents"] = "questions",
    ) -> None:
        super().__init__(model_name, val_split, batch_size, train_batch_size, seed, allow_overlap)
        self.name = f"tiny_world/{forget_domain}"
        self.texts = TinyWorldTexts(seed, forget_domain)
        self.attack_text = attack_text
        self.attack = Attack(self.texts, attack_text, num_train_texts, val_split)
        if attack_text in OVERLAPPING:
            self.overlap = (
                "states facts that are evaluated (rows of shown and unshown facts are kept apart)"
            )
        self.num_train_texts = num_train_texts
        self.calibration = calibration

    def setup(self, stage: str) -> None:
        """Load the tokenizer, once, and look at the attacker's text before anybody trains on it."""
        super().setup(stage)
        if self.reads == "relearn":
            self.attack.check_overlap()

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
        if self.reads == "unlearn":
            for kind, texts in (("forget", self.forget_texts()), ("retain", self.retain_texts())):
                facts[f"train_{kind}_texts"] = describe_texts(texts[: self.num_train_texts])
        if self.reads == "relearn":
            facts["attack_text"] = self.attack_text
            facts["train_texts"] = describe_texts(self.attack.examples)
        return facts

    def questions(self, split: Split) -> list[Question]:
        """All questions of a half of the facts."""
        shown = self.attack.shown_facts if self.reads == "relearn" else None
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
        """Retain texts that set the threshold."""
        if self.calibration == "documents":
            return self.texts.calibration_documents()
        return self.texts.calibration_texts(near)

    def heldout_texts(self) -> list[str]:
        """Short retain texts for the false-positive rate."""
        return self.texts.heldout_texts()

    def training(self) -> Rows | Pairs:
        """The attacker's text, or pairs of a forget and a retain document."""
        if self.reads == "relearn":
            return Rows(whole_rows(self.tokenizer, self.attack.examples, None), "attack")
        return _pairs(self, self.num_train_texts)


class TinyWorldRequests(BenchmarkData):
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
    trains = ("unlearn",)

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
        super().__init__(model_name, val_split, batch_size, train_batch_size, seed)
        self.request_domains = list(request_domains)
        self.requests = [TinyWorldTexts(seed, domain) for domain in self.request_domains]
        self.num_train_texts = num_train_texts
        self.passes = passes

    def questions(self, split: Split) -> list[Question]:
        """Questions of every request's domain under its own name, and near and retain questions."""
        questions = [
            replace(question, domain=texts.forget_domain)
            for texts in self.requests
            for question in texts.questions(split)
            if question.domain == "forget"
        ]
        others = self.requests[0].questions(split)
        questions += [question for question in others if question.domain in ("near", "retain")]
        return [replace(question, id=id) for id, question in enumerate(questions)]

    def passages(self, split: Split) -> list[Passage]:
        """Retain documents whose perplexity is measured."""
        passages = [p for p in self.requests[0].passages(split) if p.domain == "retain"]
        return [replace(passage, id=id) for id, passage in enumerate(passages)]

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

    def training(self) -> Pairs:
        """Pairs of the current request."""
        return _pairs(self, self.num_train_texts, self.passes)

    def _request(self) -> int:
        epoch = self.trainer.current_epoch if self.trainer else 0
        return min(epoch, len(self.requests) - 1)


def _pairs(data: TinyWorldData | TinyWorldRequests, count: int, passes: int = 1) -> Pairs:
    forget, retain = (
        whole_rows(data.tokenizer, texts[:count], None)
        for texts in (data.forget_texts(), data.retain_texts())
    )
    return Pairs(forget, retain, fixed=True, passes=passes)
