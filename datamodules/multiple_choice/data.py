"""Questions with four choices as Lightning data: WMDP, MMLU and files of the same fields."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning
from torch.utils.data import DataLoader

from datamodules.multiple_choice.pools import Pool, check_names, check_unused
from datamodules.multiple_choice.repeats import check_pools, repeated_in_pool
from datamodules.multiple_choice.rows import MMLU, WMDP, read_sets, set_revisions
from datamodules.multiple_choice.training import AttackText, ChoiceTraining
from datamodules.multiple_choice.variants import variant_loader
from datamodules.parts.corpora import Corpora, CorpusSettings
from datamodules.parts.guard_texts import selection_loader
from datamodules.parts.loading import BatchSize, load_tokenizer, question_loader
from dsg.errors import UserError
from dsg.evaluation import Passage, Protocol, Question, encode_question
from dsg.evaluation.benchmarks.multiple_choice.fitting import fit_question
from dsg.evaluation.benchmarks.multiple_choice.permutations import VARIANTS, Rule, variant
from dsg.evaluation.benchmarks.multiple_choice.prompts import ChoiceRow, make_question, rows_digest
from dsg.evaluation.benchmarks.multiple_choice.question_filter import (
    FilteredModel,
    QuestionFilter,
    load_config,
)
from dsg.evaluation.benchmarks.multiple_choice.subjects import expand_sets
from dsg.selection import describe_texts, split_by_hash, texts_digest

Split = Literal["validation", "test"]
_HALVES = (0.5, 0.5)


class MultipleChoiceData(lightning.LightningDataModule):
    """Multiple-choice questions by one protocol, each set apart and pooled as forget and retain.

    Half of each set's questions (by the hash of their text) is the validation split, for choosing
    settings; reports come from the other half.

    Args:
        model_name: The model's folder or hub name, for its tokenizer and configuration.
        forget: Sets of WMDP (`wmdp-bio`, `wmdp-chem`, `wmdp-cyber`), subjects of MMLU, or files
            (JSONL, JSON, CSV, Parquet) with `question`, `choices`, `answer`, maybe `subject`.
        retain: Likewise; also `utility_bio` and `utility_cyber`, the papers' subjects for the two
            WMDP sets, and `all` of MMLU.
        protocol: How questions are asked, see `dsg.evaluation.benchmarks.multiple_choice.prompts`.
        task: What the run is for: `evaluate`; `select` features from `corpora`; `filter`, where
            `validate` reads all orders of the choices of all questions; or what `fit` trains on:
            pairs of forget and retain text of `corpora` (`unlearn`) or the attacker's (`relearn`).
        keep: A question filter's `questions.json` or run directory; None asks all questions.
        keep_rule: Which of its questions to keep.
        base_model_name: The model that the filter was made with, where `model_name` is a changed
            copy of it.
        val_split: Questions of `val_dataloader`.
        batch_size: Questions of a batch; `auto` fills batches up to a number of tokens.
        max_length: Tokens that a prompt with its answer may have; None takes the model's context.
        allow_truncation: Cut longer prompts on the left, and count them, rather than refuse them.
        corpora: Texts from which guards are made, and which train; None where none are needed.
        train_batch_size: Rows of a training batch; of each kind for `unlearn`.
        train_length: Tokens of a training row; longer texts become several.
        attack_text: The attacker's: `forget` text mixed 1:1 with retain text; or all `questions` of
            `forget`, also those that are not kept, with their right answers.
        allow_overlap: The attacker's text states evaluated facts; `questions` need this said.
        seed: Decides the order of training text.
        wmdp: Hub name (`@revision` pins it) or folder of WMDP.
        mmlu: Hub name or folder of MMLU.

    Raises:
        UserError: A set is unknown, comes twice, or there is none; a question is in both pools; or
            an overlap that nobody allowed.
    """

    def __init__(
        self,
        model_name: str,
        forget: list[str],
        retain: list[str],
        protocol: Protocol = "lm_eval",
        task: Literal["evaluate", "select", "filter", "unlearn", "relearn"] = "evaluate",
        keep: str | None = None,
        keep_rule: Rule = "correct",
        base_model_name: str | None = None,
        val_split: Split = "validation",
        batch_size: BatchSize = "auto",
        max_length: int | None = None,
        allow_truncation: bool = False,
        corpora: CorpusSettings | None = None,
        train_batch_size: int = 8,
        train_length: int = 512,
        attack_text: AttackText = "forget",
        allow_overlap: bool = False,
        seed: int = 0,
        wmdp: str = WMDP,
        mmlu: str = MMLU,
    ) -> None:
        super().__init__()
        self.names: dict[Pool, list[str]] = {
            "forget": expand_sets("forget", forget),
            "retain": expand_sets("retain", retain),
        }
        check_names(self.names)
        if task == "filter" and protocol == "cloze":
            raise UserError(
                "`protocol` must be 'lm_eval' or 'dsg' for the task 'filter', got 'cloze', which "
                "shows no choices whose order could change; choose one."
            )
        self.name = "+".join(Path(name).stem for name in (*forget, *retain))
        self.model_name = model_name
        self.protocol: Protocol = protocol
        self.task = task
        self.keep = keep
        self.keep_rule: Rule = keep_rule
        self.base_model_name = base_model_name
        self.val_split: Split = val_split
        self.batch_size: BatchSize = batch_size
        self.max_length = max_length
        self.allow_truncation = allow_truncation
        self.sources = {"wmdp": wmdp, "mmlu": mmlu}
        self.corpora = None if corpora is None else Corpora(corpora)
        self.attack_text: AttackText = attack_text
        self.training = ChoiceTraining(
            task,
            attack_text,
            allow_overlap=allow_overlap,
            batch_size=train_batch_size,
            max_length=train_length,
            seed=seed,
        )
        self.tokenizer: Any = None

    def setup(self, stage: str) -> None:
        """Load the tokenizer, read and check the questions, and make the prompts, once."""
        del stage
        if self.tokenizer is not None:
            return
        self.tokenizer = load_tokenizer(self.model_name)
        self.sets: dict[str, list[ChoiceRow]] = {}
        self.pools: dict[str, Pool] = {}
        self.num_truncated = 0
        self._filter_facts: dict[str, Any] | None = None
        self._revisions: dict[str, str | None] = {}
        self._questions: dict[Split, list[Question]] = {"validation": [], "test": []}
        self._train_texts: dict[str, list[str]] = {}
        if self.task == "select":
            return
        if self.max_length is None:
            text = load_config(self.model_name).get_text_config()
            self.max_length = getattr(text, "max_position_embeddings", None)
        for pool, names in self.names.items():
            for subject, rows in read_sets(names, **self.sources).items():
                check_unused(subject, pool, self.pools)
                self.sets[subject], self.pools[subject] = rows, pool
        check_pools(self.sets, self.pools)
        # Now, because the network may be gone when the run ends.
        self._revisions = set_revisions(self.sets, **self.sources)
        forget = [row for n, rows in self.sets.items() if self.pools[n] == "forget" for row in rows]
        self._train_texts = self.training.texts(forget, self)
        if self.keep is not None:
            self._filter_facts = self._filter(self.keep)
        if self.task != "filter":
            self._make_questions()

    def questions(self, split: Split) -> list[Question]:
        """All questions of a half; their domain is their set, their pool `forget` or `retain`."""
        return self._questions[split]

    def passages(self, split: Split) -> list[Passage]:
        """None: there are only questions."""
        del split
        return []

    def forget_texts(self) -> Sequence[str]:
        """Forget texts of `corpora`."""
        return self._given_corpora().forget_texts()

    def retain_texts(self) -> Sequence[str]:
        """Retain texts of `corpora`."""
        return self._given_corpora().retain_texts()

    def calibration_texts(self, near: bool) -> Sequence[str]:
        """Calibration texts of `corpora`."""
        return self._given_corpora().calibration_texts(near)

    def heldout_texts(self) -> Sequence[str]:
        """Held-out texts of `corpora`."""
        return self._given_corpora().heldout_texts()

    def train_dataloader(self) -> DataLoader:
        """Batches of what `task` trains on."""
        return self.training.loader(self.tokenizer, self._train_texts, self.trainer)

    def val_dataloader(self) -> DataLoader:
        """Questions of `val_split`, the guard's texts, or all orders of all questions."""
        if self.task == "select":
            return selection_loader(self)
        if self.task == "filter":
            variants = self._variants()
            return variant_loader(self.tokenizer, variants, self.batch_size, self.trainer)
        return self._evaluation(self.val_split)

    def test_dataloader(self) -> DataLoader:
        """Questions of the test half."""
        return self._evaluation("test")

    def fit(self, question: Question) -> Question:
        """The question, cut if it is too long and may be cut; see `fit_question`."""
        return fit_question(
            self.tokenizer, question, self.max_length, allow_truncation=self.allow_truncation
        )

    def facts(self) -> dict[str, Any]:
        """What was asked: data, prompts, the tokens of the letters, and how much was cut."""
        questions = [question for half in self._questions.values() for question in half]
        prompts: dict[str, list[str]] = {name: [] for name in self.sets}
        for question in questions:
            prompts[question.domain].append(question.prompt)
        found = {
            "protocol": self.protocol,
            "sets": {
                name: {
                    "pool": self.pools[name],
                    "n": len(rows),
                    "sha256": rows_digest(rows),
                    "prompts_sha256": texts_digest(prompts[name]),
                }
                for name, rows in self.sets.items()
            },
            "revisions": self._revisions,
            "max_length": self.max_length,
            "truncated_prompts": self.num_truncated,
            "filter": self._filter_facts,
            "corpora": self.corpora.facts() if self.corpora else {},
            "training": {kind: describe_texts(of) for kind, of in self._train_texts.items()},
        }
        if questions and self.protocol != "cloze":
            found["letter_ids"] = self._letter_ids(questions[0])
        return found

    def _filter(self, path: str) -> dict[str, Any]:
        known = QuestionFilter(path, self.keep_rule)
        model_name = self.base_model_name or self.model_name
        known.check_model(FilteredModel.of(model_name, load_config(model_name)))
        self.sets = {name: known.kept(name, rows) for name, rows in self.sets.items()}
        return known.facts

    def _make_questions(self) -> None:
        keys = {row.key for rows in self.sets.values() for row in rows}
        validation = set(split_by_hash(keys, _HALVES)[0])
        repeated = repeated_in_pool(self.sets, self.pools)
        for subject, rows in self.sets.items():
            for row in rows:
                half = self._questions["validation" if row.key in validation else "test"]
                pool = None if (subject, row.key) in repeated else self.pools[subject]
                question = make_question(
                    self.protocol, row, self.tokenizer, id=len(half), pool=pool
                )
                if self.training.shows_answers and self.pools[subject] == "forget":
                    question = replace(question, shown=True)
                fitting = self.fit(question)
                self.num_truncated += fitting is not question
                half.append(fitting)

    def _evaluation(self, split: Split) -> DataLoader:
        return question_loader(self.tokenizer, self.questions(split), self.batch_size, self.trainer)

    def _variants(self) -> list[Question]:
        """All variants of all questions: variant v of question i has the id `VARIANTS * i + v`."""
        return [
            self.fit(
                variant(row, number, self.protocol, self.tokenizer, id=VARIANTS * place + number)
            )
            for place, row in enumerate(row for rows in self.sets.values() for row in rows)
            for number in range(VARIANTS)
        ]

    def _letter_ids(self, question: Question) -> dict[str, list[int]]:
        num_prompt, rows = encode_question(self.tokenizer, question)
        return {
            option: ids[num_prompt:] for option, ids in zip(question.options, rows, strict=True)
        }

    def _given_corpora(self) -> Corpora:
        if self.corpora is None:
            raise UserError(
                "`corpora` must name the texts to make a guard from, got none; give `forget` and "
                "`retain` there, or load a saved guard (`artifact`)."
            )
        return self.corpora
