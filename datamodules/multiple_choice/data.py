"""Questions with four choices as Lightning data: WMDP, MMLU and files of the same fields."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from datamodules.multiple_choice.pools import (
    Pool,
    check_names,
    check_pools,
    check_unused,
    repeated_in_pool,
)
from datamodules.multiple_choice.rows import MMLU, WMDP, read_sets, set_revisions
from datamodules.multiple_choice.training import (
    AttackText,
    check_unasked,
    corpus_texts,
    mixed,
    question_texts,
)
from datamodules.parts.batches import batch_loader
from datamodules.parts.benchmark import BenchmarkData, Split
from datamodules.parts.corpora import Corpora, CorpusSettings, FromCorpora
from datamodules.parts.loading import BatchSize, Pairs, Rows
from datamodules.parts.training_text import running_rows
from dsg.errors import UserError
from dsg.evaluation import Protocol, Question, encode_question, question_collate
from dsg.evaluation.benchmarks.multiple_choice.fitting import fit_question
from dsg.evaluation.benchmarks.multiple_choice.permutations import (
    ORDERS,
    VARIANTS,
    Rule,
    variant,
)
from dsg.evaluation.benchmarks.multiple_choice.prompts import ChoiceRow, make_question, rows_digest
from dsg.evaluation.benchmarks.multiple_choice.question_filter import (
    FilteredModel,
    QuestionFilter,
)
from dsg.evaluation.benchmarks.multiple_choice.subjects import expand_sets
from dsg.lm import length_batches, load_config
from dsg.selection import describe_texts, split_by_hash, texts_digest

_HALVES = (0.5, 0.5)


class MultipleChoiceData(FromCorpora, BenchmarkData):
    """Multiple-choice questions by one protocol, each set apart and pooled as forget and retain.

    Half of each set's questions (by the hash of their text) is the validation split, for choosing
    settings; reports come from the other half. A module that reads `filter` is given all orders of
    the choices of all questions by `val_dataloader`.

    Args:
        model_name: The model's folder or hub name, for its tokenizer and configuration.
        forget: Sets of WMDP (`wmdp-bio`, `wmdp-chem`, `wmdp-cyber`), subjects of MMLU, or files
            (JSONL, JSON, CSV, Parquet) with `question`, `choices`, `answer`, maybe `subject`.
        retain: Likewise; also `utility_bio` and `utility_cyber`, the papers' subjects for the two
            WMDP sets, and `all` of MMLU.
        protocol: How questions are asked, see `dsg.evaluation.benchmarks.multiple_choice.prompts`.
        keep: A question filter's `questions.json` or run directory; None asks all questions.
        keep_rule: Which of its questions to keep.
        base_model_name: The model that the filter was made with, where `model_name` is a changed
            copy of it.
        val_split: Questions of `val_dataloader`.
        batch_size: Questions of a batch; `auto` fills batches up to a number of tokens.
        max_length: Tokens that a prompt with its answer may have; None takes the model's context.
        allow_truncation: Cut longer prompts on the left, and count them, rather than refuse them.
        corpora: Texts from which guards are made, and which train; None where none are needed.
        train_batch_size: Rows of a training batch; of each kind where a model unlearns.
        train_length: Tokens of a training row; longer texts become several.
        attack_text: The attacker's: `forget` text mixed 1:1 with retain text; or all `questions` of
            `forget`, also those that are not kept, with their right answers.
        allow_overlap: The attacker's text states evaluated facts; `questions` need this said.
        seed: Decides the order of training text.
        wmdp: Hub name (`@revision` pins it) or folder of WMDP.
        mmlu: Hub name or folder of MMLU.

    Raises:
        UserError: A set is unknown, in both pools, or there is none; or a number is too small.
    """

    def __init__(
        self,
        model_name: str,
        forget: list[str],
        retain: list[str],
        protocol: Protocol = "lm_eval",
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
        super().__init__(model_name, val_split, batch_size, train_batch_size, seed, allow_overlap)
        self.names: dict[Pool, list[str]] = {
            "forget": expand_sets("forget", forget),
            "retain": expand_sets("retain", retain),
        }
        check_names(self.names)
        for option, number, least in (
            ("train_batch_size", train_batch_size, 1),
            ("train_length", train_length, 2),
        ):
            if number < least:
                raise UserError(f"`{option}` must be at least {least}, got {number}; raise it.")
        self.name = "+".join(Path(name).stem for name in (*forget, *retain))
        self.protocol: Protocol = protocol
        self.keep = keep
        self.keep_rule: Rule = keep_rule
        self.base_model_name = base_model_name
        self.max_length = max_length
        self.allow_truncation = allow_truncation
        self.sources = {"wmdp": wmdp, "mmlu": mmlu}
        self.corpora = None if corpora is None else Corpora(corpora)
        self.attack_text = attack_text
        if attack_text == "questions":
            self.overlap = "states the right answers of evaluated questions"
        self.train_length = train_length

    def setup(self, stage: str) -> None:
        """Load the tokenizer, read and check the questions, and make the prompts, once.

        Raises:
            UserError: A set comes twice; a question is in both pools; an overlap that nobody
                allowed; or the protocol shows no choices to a filter.
        """
        if self.tokenizer is not None:
            return
        if self.reads == "filter" and self.protocol == "cloze":
            raise UserError(
                "`protocol` must be 'lm_eval' or 'dsg' for a question filter, got 'cloze', which "
                "shows no choices whose order could change; choose one."
            )
        super().setup(stage)
        self.sets: dict[str, list[ChoiceRow]] = {}
        self.pools: dict[str, Pool] = {}
        self.num_truncated = 0
        self._filter_facts: dict[str, Any] | None = None
        self._revisions: dict[str, str | None] = {}
        self._questions: dict[Split, list[Question]] = {"validation": [], "test": []}
        self._train_texts: dict[str, list[str]] = {}
        if self.reads == "select":
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
        self._train_texts = self._read_train_texts(forget)
        if self.keep is not None:
            self._filter_facts = self._filter(self.keep)
        if self.reads != "filter":
            self._make_questions()

    def questions(self, split: Split) -> list[Question]:
        """All questions of a half; their domain is their set, their pool `forget` or `retain`."""
        return self._questions[split]

    def training(self) -> Rows | Pairs:
        """The questions with their answers, or text of `corpora` mixed, or in pairs."""
        rows = {
            kind: running_rows(self.tokenizer, texts, self.train_length)
            for kind, texts in self._train_texts.items()
        }
        if self._shows_answers:
            return Rows(rows["questions"])
        forget, retain = rows["forget"], rows["retain"]
        return Pairs(forget, retain) if self.reads == "unlearn" else Rows(mixed(forget, retain))

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Questions of `val_split`, the guard's texts, or all orders of all questions."""
        return self._variant_loader() if self.reads == "filter" else super().val_dataloader()

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
        facts = {
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
            "training": {kind: describe_texts(texts) for kind, texts in self._train_texts.items()},
        }
        if questions and self.protocol != "cloze":
            facts["letter_ids"] = self._letter_ids(questions[0])
        return facts

    def _filter(self, path: str) -> dict[str, Any]:
        question_filter = QuestionFilter(path, self.keep_rule)
        model_name = self.base_model_name or self.model_name
        question_filter.check_model(FilteredModel.of(model_name, load_config(model_name)))
        self.sets = {name: question_filter.kept(name, rows) for name, rows in self.sets.items()}
        return question_filter.facts

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
                if self._shows_answers and self.pools[subject] == "forget":
                    question = replace(question, shown=True)
                fitting = self.fit(question)
                self.num_truncated += fitting is not question
                half.append(fitting)

    @property
    def _shows_answers(self) -> bool:
        """Whether training states the right answers of the forget questions."""
        return self.reads == "relearn" and self.attack_text == "questions"

    def _read_train_texts(self, questions: list[ChoiceRow]) -> dict[str, list[str]]:
        if self._shows_answers:
            return {"questions": question_texts(questions)}
        if self.reads not in self.trains:
            return {}
        texts = corpus_texts(self)
        if self.reads == "relearn" and not self.allow_overlap:
            check_unasked(texts["forget"] + texts["retain"], questions)
        return texts

    def _variant_loader(self) -> DataLoader:
        """Variants of about the same length in batches; those of a question stand together."""
        variants = self._variants()
        # The order of the choices hardly changes a length, so that the first one stands for all:
        # once with the question and once without it.
        lengths = [
            max(map(len, encode_question(self.tokenizer, question)[1]))
            for question in variants[:: len(ORDERS)]
        ]
        batches = length_batches(
            [lengths[question.id // len(ORDERS)] for question in variants], self.batch_size
        )
        collate = question_collate(self.tokenizer)
        return batch_loader(variants, batches, self.trainer, collate, keep_rest=True)

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
