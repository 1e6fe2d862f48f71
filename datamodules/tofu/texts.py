"""The rows of TOFU, written as prompts and answers, and the items made from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from datamodules.parts.rows import numbered, read_texts, text_of
from dsg.errors import UserError
from dsg.evaluation import Passage, Prompt, Question, item_key
from dsg.evaluation.benchmarks import tofu
from dsg.io import load_rows
from dsg.lm import chat_text, check_chat_template

Template = Literal["plain", "chat"]

MAX_NEW_TOKENS = 200
_SPLIT = "train"  # the only one of each configuration


@dataclass(frozen=True)
class Asked:
    """A question that is evaluated.

    Attributes:
        domain: `forget`, `retain`, `real_authors` or `world_facts`.
        question: As a user would ask it.
        answer: As the model was taught it.
        right: The answer beside the wrong ones: a paraphrase where there is one.
        wrong: Perturbed answers.
    """

    domain: str
    question: str
    answer: str
    right: str
    wrong: tuple[str, ...]


class TofuTexts:
    """One copy of TOFU, whose texts are read once.

    Args:
        dataset: Hub name or folder in the hub's layout.
        tokenizer: Of the model.
        template: How questions are written.

    Raises:
        UserError: The template is `chat` and the tokenizer has none.
    """

    def __init__(self, dataset: str, tokenizer: Any, template: Template) -> None:
        if template == "chat":
            remedy = "use 'plain' or an instruction-tuned model"
            check_chat_template(tokenizer, "`template` 'chat'", remedy)
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.template: Template = template
        self._asked: dict[str, list[Asked]] = {}
        self._pairs: dict[str, list[tuple[str, str]]] = {}

    def asked(self, domain: str, config: str) -> list[Asked]:
        """The questions of a configuration with perturbed answers.

        Raises:
            UserError: A text is missing, or there is no wrong answer.
        """
        if config not in self._asked:
            rows = load_rows(self.dataset, config, _SPLIT)
            self._asked[config] = [
                _asked_row(domain, row, f"{self.dataset}, {config}/{_SPLIT}, row {number}")
                for number, row in enumerate(rows)
            ]
        return self._asked[config]

    def pairs(self, config: str) -> list[tuple[str, str]]:
        """Questions and answers of a configuration."""
        if config not in self._pairs:
            rows = read_texts(self.dataset, config, _SPLIT, "question", "answer")
            self._pairs[config] = [(question, answer) for question, answer in rows]
        return self._pairs[config]

    def written(self, config: str) -> list[tuple[str, str]]:
        """The same as prompts and what follows them."""
        return [(self.prompt(q), self.separated(a)) for q, a in self.pairs(config)]

    def whole(self, config: str) -> list[str]:
        """The same as one text each."""
        return [prompt + answer for prompt, answer in self.written(config)]

    def prompt(self, question: str) -> str:
        """A question as the template writes it, without what the tokenizer adds by itself."""
        if self.template == "plain":
            return f"Question: {question}\nAnswer:"
        return chat_text(self.tokenizer, [question])

    def separated(self, answer: str) -> str:
        """An answer as it follows its prompt."""
        return f" {answer}" if self.template == "plain" else answer

    def questions(self, rows: Sequence[Asked]) -> list[Question]:
        """The right answer before the wrong ones."""
        choices = [tuple(map(self.separated, (row.right, *row.wrong))) for row in rows]
        keys = numbered(
            item_key(row.domain, row.question, *options)
            for row, options in zip(rows, choices, strict=True)
        )
        return [
            Question(
                number,
                row.domain,
                None,
                self.prompt(row.question),
                options,
                0,
                key=key,
                closed=True,
            )
            for number, (row, options, key) in enumerate(zip(rows, choices, keys, strict=True))
        ]

    def passages(self, rows: Sequence[Asked]) -> list[Passage]:
        """The answers that the model was taught, after their questions."""
        return [
            Passage(
                number,
                row.domain,
                self.separated(row.answer),
                context=self.prompt(row.question),
                key=key,
                closed=True,
            )
            for number, (row, key) in enumerate(zip(rows, _keys(rows), strict=True))
        ]

    def prompts(self, rows: Sequence[Asked]) -> list[Prompt]:
        """The questions, to be answered freely."""
        return [
            Prompt(
                number, row.domain, self.prompt(row.question), row.answer, MAX_NEW_TOKENS, key=key
            )
            for number, (row, key) in enumerate(zip(rows, _keys(rows), strict=True))
        ]


def _asked_row(domain: str, row: dict[str, Any], place: str) -> Asked:
    wrong = row.get("perturbed_answer")
    if not isinstance(wrong, list) or not wrong:
        raise UserError(
            f"{place} must hold a list of wrong answers under 'perturbed_answer', got {wrong!r}; "
            "mend the data set or name another."
        )
    return Asked(
        domain=domain,
        question=text_of(row, "question", place),
        answer=text_of(row, "answer", place),
        right=text_of(
            row, "answer" if domain in tofu.WITH_OPTIONS else "paraphrased_answer", place
        ),
        wrong=tuple(
            text_of({"perturbed_answer": text}, "perturbed_answer", place) for text in wrong
        ),
    )


def _keys(rows: Sequence[Asked]) -> list[str]:
    return numbered(item_key(row.domain, row.question, row.answer) for row in rows)
