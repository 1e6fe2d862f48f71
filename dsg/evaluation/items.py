"""What is evaluated: questions with options, passages to be read, prompts to be continued.

An item's `id` is its place among the items that are scored together; its `key` stays the same from
one run to another, so that runs can be compared item by item.
"""

import hashlib
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
        id: As for `Question`, like all that is not listed.
        text: What is scored.
        context: Text right before it that is read but not scored; a guard takes it as the prompt.
            Without it the whole passage decides.
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
        id: As for `Question`, like all that is not listed.
        text: The prompt, without the tokenizer's own special tokens.
        reference: What the continuation is compared with.
        max_new_tokens: Longest continuation, in tokens.
        stop: The continuation is cut before the first of these strings.
        max_reference_tokens: The reference is cut to as many tokens, those that the tokenizer adds
            among them; None keeps all.
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
    """An item's identity in every run: 16 hex digits of the SHA-256 of its texts."""
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Batch:
    """Items of one batch.

    Attributes:
        ids: Ids of the items, `[b]`.
    """

    ids: Int[Tensor, " b"]

    def to(self, device: torch.device | str) -> Self:
        """The same batch on `device`."""
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, Tensor | TokenBatch)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})

    def __getitem__(self, rows: slice) -> Self:
        """Some of the items, with step 1."""
        columns = {k: v for k, v in vars(self).items() if isinstance(v, Tensor | TokenBatch | list)}
        return replace(self, **{name: column[rows] for name, column in columns.items()})


@dataclass(frozen=True)
class QuestionBatch(_Batch):
    """Questions of one batch; the options of a question lie in adjacent rows.

    Attributes:
        prompts: One row per question, padded on the left, `[b, seq]`.
        options: One row per option, padded on the right, `[b * num_options, tokens]`; its token
            mask tells what is scored.
        answers: Index of the right answer, `[b]`.
        num_options: Options per question.
        option_chars: Characters of each option without its separator, `[b * num_options]`.
        protocol: That of all questions.
    """

    prompts: TokenBatch
    options: TokenBatch
    answers: Int[Tensor, " b"]
    num_options: int
    option_chars: Int[Tensor, " rows"]
    protocol: Protocol = "cloze"

    def __getitem__(self, rows: slice) -> Self:
        """Some of the questions, with step 1."""
        start, stop, _ = rows.indices(len(self.ids))
        options = slice(start * self.num_options, stop * self.num_options)
        return replace(
            super().__getitem__(rows),
            options=self.options[options],
            option_chars=self.option_chars[options],
        )


@dataclass(frozen=True)
class PassageBatch(_Batch):
    """Passages of one batch, padded on the right.

    Attributes:
        tokens: Context and passage, `[b, seq]`.
        context_lengths: Tokens of each context, `[b]`; all zero or none of them.
        closed: Whether the last token of each is scored even if it does not count, `[b]`.
    """

    tokens: TokenBatch
    context_lengths: Int[Tensor, " b"]
    closed: Bool[Tensor, " b"]


@dataclass(frozen=True)
class PromptBatch(_Batch):
    """Prompts of one batch, which share their limits.

    Attributes:
        tokens: One row per prompt, padded on the left, `[b, seq]`.
        references: What the continuations are compared with, cut as the prompts say.
        max_new_tokens: Longest continuation, in tokens.
        stop: Strings before which a continuation is cut.
        tokenizer: Turns what was generated into text.
    """

    tokens: TokenBatch
    references: list[str]
    max_new_tokens: int
    stop: tuple[str, ...]
    tokenizer: Any


AnyBatch = QuestionBatch | PassageBatch | PromptBatch
