"""What is evaluated: questions with options, passages to be read, prompts to be continued.

An item's `id` is its place among the items that are scored together; its `key` stays the same from
one run to another, so that runs can be compared item by item.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dsg.lm import TokenBatch

Protocol = Literal["cloze", "lm_eval", "dsg"]


@dataclass(frozen=True)
class Question:
    """A multiple-choice question.

    Attributes:
        id: Unique among the questions that are scored together.
        domain: Name under which it is reported, such as `forget` or `retain`.
        form: `statement` or `question`, where the questions of a set differ in it.
        prompt: Text before the option, without the tokenizer's own special tokens.
        options: Continuations, each beginning with the separator it needs (`" Vexin"`).
        answer: Index of the right answer.
        shown: Whether an attacker's data states the fact; `None` where there is no attacker.
        protocol: How options become an answer. `cloze`: the highest mean log-probability of an
            option's tokens. `lm_eval`: the highest log-probability of an option. `dsg`: each answer
            has two options, the letter without and with a space before it, of which the more
            probable one counts.
        pool: A second name under which it is reported together with others.
        key: The same in every run, see `item_key`; empty where runs are not compared.
        fact: What it asks for, where the same is asked in several wordings: their answers depend on
            each other, so that together they count once in `n` and in intervals.
        closed: Whether the eos token that closes an option is scored with it.
    """

    id: int
    domain: str
    form: str | None
    prompt: str
    options: tuple[str, ...]
    answer: int
    shown: bool | None = None
    protocol: Protocol = "cloze"
    pool: str | None = None
    key: str = ""
    fact: int | None = None
    closed: bool = False

    @property
    def num_answers(self) -> int:
        """Answers to choose from."""
        return len(self.options) // 2 if self.protocol == "dsg" else len(self.options)


@dataclass(frozen=True)
class Passage:
    """A text whose loss is measured.

    Attributes:
        id: As for `Question`.
        domain: As for `Question`.
        text: What is scored.
        shown: As for `Question`.
        context: Text right before it that is read but not scored; a guard takes it as the prompt.
            Without it the whole passage decides.
        pool: As for `Question`.
        key: As for `Question`.
        closed: Whether the eos token that closes the text is scored with it.
    """

    id: int
    domain: str
    text: str
    shown: bool | None = None
    context: str = ""
    pool: str | None = None
    key: str = ""
    closed: bool = False


@dataclass(frozen=True)
class Prompt:
    """A text that the model continues, greedily.

    Attributes:
        id: As for `Question`.
        domain: As for `Question`.
        text: The prompt, without the tokenizer's own special tokens.
        reference: What the continuation is compared with.
        max_new_tokens: Longest continuation, in tokens.
        stop: The continuation is cut before the first of these strings.
        max_reference_tokens: The reference is cut to as many tokens, those that the tokenizer adds
            among them; None keeps all.
        shown: As for `Question`.
        pool: As for `Question`.
        key: As for `Question`.
    """

    id: int
    domain: str
    text: str
    reference: str = ""
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()
    max_reference_tokens: int | None = None
    shown: bool | None = None
    pool: str | None = None
    key: str = ""


Item = Question | Passage | Prompt


def item_key(*parts: str) -> str:
    """What an item is known by in every run: 16 hex digits of the SHA-256 of its texts."""
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class QuestionBatch:
    """Questions of one batch; the options of a question lie in adjacent rows.

    Attributes:
        prompts: One row per question, padded on the left, `[b, seq]`.
        options: One row per option, padded on the right, `[b * num_options, tokens]`; its token
            mask tells what is scored.
        ids: Question ids, `[b]`.
        answers: Index of the right answer, `[b]`.
        num_options: Options per question.
        option_chars: Characters of each option without its separator, `[b * num_options]`.
        protocol: That of all questions.
    """

    prompts: TokenBatch
    options: TokenBatch
    ids: Int[Tensor, " b"]
    answers: Int[Tensor, " b"]
    num_options: int
    option_chars: Int[Tensor, " rows"]
    protocol: Protocol = "cloze"

    def to(self, device: torch.device | str) -> Self:
        """The same batch on `device`."""
        moved = ("prompts", "options", "ids", "answers", "option_chars")
        return replace(self, **{name: getattr(self, name).to(device) for name in moved})

    def __getitem__(self, rows: slice) -> Self:
        """Some of the questions, with step 1."""
        start, stop, _ = rows.indices(len(self.ids))
        options = slice(start * self.num_options, stop * self.num_options)
        return replace(
            self,
            prompts=self.prompts[rows],
            options=self.options[options],
            ids=self.ids[rows],
            answers=self.answers[rows],
            option_chars=self.option_chars[options],
        )


@dataclass(frozen=True)
class PassageBatch:
    """Passages of one batch, padded on the right.

    Attributes:
        tokens: Context and passage, `[b, seq]`.
        ids: Passage ids, `[b]`.
        context_lengths: Tokens of each context, `[b]`; all zero or none of them.
        closed: Whether the last token of each is scored even if it does not count, `[b]`.
    """

    tokens: TokenBatch
    ids: Int[Tensor, " b"]
    context_lengths: Int[Tensor, " b"]
    closed: Bool[Tensor, " b"]

    def to(self, device: torch.device | str) -> Self:
        """The same batch on `device`."""
        moved = ("tokens", "ids", "context_lengths", "closed")
        return replace(self, **{name: getattr(self, name).to(device) for name in moved})

    def __getitem__(self, rows: slice) -> Self:
        """Some of the passages."""
        return replace(
            self,
            tokens=self.tokens[rows],
            ids=self.ids[rows],
            context_lengths=self.context_lengths[rows],
            closed=self.closed[rows],
        )


@dataclass(frozen=True)
class PromptBatch:
    """Prompts of one batch, which share their limits.

    Attributes:
        tokens: One row per prompt, padded on the left, `[b, seq]`.
        ids: Prompt ids, `[b]`.
        references: What the continuations are compared with, cut as the prompts say.
        max_new_tokens: Longest continuation, in tokens.
        stop: Strings before which a continuation is cut.
        tokenizer: Turns what was generated into text.
    """

    tokens: TokenBatch
    ids: Int[Tensor, " b"]
    references: Sequence[str]
    max_new_tokens: int
    stop: tuple[str, ...]
    tokenizer: Any

    def to(self, device: torch.device | str) -> Self:
        """The same batch on `device`."""
        return replace(self, tokens=self.tokens.to(device), ids=self.ids.to(device))

    def __getitem__(self, rows: slice) -> Self:
        """Some of the prompts."""
        return replace(
            self, tokens=self.tokens[rows], ids=self.ids[rows], references=self.references[rows]
        )


AnyBatch = QuestionBatch | PassageBatch | PromptBatch
