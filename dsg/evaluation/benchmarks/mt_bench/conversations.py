"""MT-Bench: conversations of two questions, and a guarded model's answers to them.

Answers are greedy. The published benchmark samples writing and roleplay at temperature 0.7, so that
its scores differ from run to run and are not those of this one; here a score is the same on any
number of ranks, and two states of a guard differ by the guard alone.

Each turn's prompt is the whole conversation up to it, in the model's chat template. It is read
afresh, and its counted tokens decide: both questions and the first answer stand behind the decision
about the second turn, which may be another one than the first turn's. While an answer grows, its
own tokens extend the counts (`decision: prompt`, `continuation: running`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from dsg.errors import UserError
from dsg.evaluation.collate import prompt_collate
from dsg.evaluation.gather import score
from dsg.evaluation.generation import said_text
from dsg.evaluation.items import Prompt, item_key
from dsg.evaluation.scoring import AnyGuard, Values
from dsg.lm import chat_text, encode_texts

NAME = "MT-Bench"
NUM_TURNS = 2
TURN_COLUMNS = ("num_tokens", "repetition", "nll", "triggered", "density")
COLUMNS = tuple(f"{name}_turn_{turn}" for turn in (1, 2) for name in TURN_COLUMNS)


@dataclass(frozen=True)
class Conversation:
    """Two questions, of which the second builds on the answer to the first.

    Attributes:
        id: Unique among the conversations that are evaluated together.
        question_id: Its name in the data set.
        category: Name under which it is reported, such as `writing`.
        turns: The questions.
        references: Right answers for the judge; empty where there is none.
    """

    id: int
    question_id: str
    category: str
    turns: tuple[str, str]
    references: tuple[str, str] = ("", "")

    @property
    def key(self) -> str:
        """The same in every run."""
        return item_key(*self.turns)


@dataclass(frozen=True)
class ConversationBatch:
    """Conversations that are held together; they become tokens turn by turn."""

    conversations: Sequence[Conversation]

    def to(self, device: torch.device | str) -> Self:
        """The same batch: text has no device."""
        del device
        return self


def read_conversations(
    rows: Sequence[Mapping[str, Any]], reference_answers: Sequence[Mapping[str, Any]] = ()
) -> list[Conversation]:
    """Conversations from rows in the published format or in that of the hub's copy.

    Args:
        rows: With `question_id`, `category`, `turns` and perhaps `reference`; or with `prompt_id`
            and `prompt` in place of the first and the third.
        reference_answers: Answers in FastChat's format (`question_id`, `choices`), which take
            precedence over the rows' own references.

    Raises:
        UserError: There is no row, or one lacks something.
    """
    if not rows:
        raise UserError("`questions` must hold at least one row, got none; check the file.")
    answers = {str(row["question_id"]): row["choices"][0]["turns"] for row in reference_answers}
    conversations: list[Conversation] = []
    for place, row in enumerate(rows):
        name = row.get("question_id", row.get("prompt_id"))
        turns = row.get("turns", row.get("prompt"))
        if not (
            isinstance(turns, list)
            and len(turns) == NUM_TURNS
            and all(isinstance(turn, str) and turn.strip() for turn in turns)
        ):
            raise UserError(
                f"row {place} of `questions` must have `turns` (or `prompt`), a list of "
                f"{NUM_TURNS} questions, got {turns!r}; leave it out or mend it."
            )
        if name is None or not isinstance(row.get("category"), str):
            raise UserError(
                f"row {place} of `questions` must have `question_id` (or `prompt_id`) and "
                f"`category`, got {sorted(row)}; mend it."
            )
        references = list(answers.get(str(name), row.get("reference")) or ())
        first, second = (str(text or "") for text in [*references, "", ""][:NUM_TURNS])
        conversations.append(
            Conversation(place, str(name), row["category"], (turns[0], turns[1]), (first, second))
        )
    repeated = len(conversations) - len({conversation.key for conversation in conversations})
    if repeated:
        raise UserError(f"`questions` must not repeat a row, got {repeated} twice; remove them.")
    return conversations


def check_room(
    tokenizer: Any, conversations: Sequence[Conversation], max_new_tokens: int, context: int
) -> None:
    """Refuse conversations that may outgrow the model's context, before the first is held.

    Args:
        tokenizer: The model's.
        conversations: All of them.
        max_new_tokens: Longest answer, in tokens.
        context: Positions of the model.

    Raises:
        UserError: There is such a conversation, or the tokenizer has no chat template.
    """
    texts = [chat_text(tokenizer, [c.turns[0], "", c.turns[1]], NAME) for c in conversations]
    longest = max(map(len, encode_texts(tokenizer, texts, None)))
    room = (context - longest) // NUM_TURNS
    if max_new_tokens > room:
        raise UserError(
            f"`max_new_tokens` must be at most {room}, because both answers and the longest pair "
            f"of questions ({longest} tokens) share {context} positions, got {max_new_tokens}; "
            "lower it."
        )


def hold(
    model: nn.Module,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    max_new_tokens: int,
    guard: AnyGuard | None = None,
) -> tuple[list[tuple[str, str]], Values]:
    """Answer both turns of some conversations.

    Args:
        model: The causal LM, wrapped or not.
        tokenizer: Its tokenizer, with a chat template.
        conversations: Answered together.
        max_new_tokens: Longest answer, in tokens.
        guard: Attached while generating.

    Returns:
        Both answers of each conversation, and `COLUMNS`, in the order of the conversations: for
        each turn what `dsg.evaluation.generation.score_prompts` measures.
    """
    device = next(model.parameters()).device
    answers: list[list[str]] = [[] for _ in conversations]
    values: dict[str, Tensor] = {}
    for turn in range(NUM_TURNS):
        prompts = []
        for place, conversation in enumerate(conversations):
            messages = [conversation.turns[0], *answers[place], *conversation.turns[1 : turn + 1]]
            text = chat_text(tokenizer, messages, NAME)
            prompts.append(Prompt(place, conversation.category, text, "", max_new_tokens))
        batch = prompt_collate(tokenizer)(prompts).to(device)
        scored = score(model, batch, guard)
        values |= {f"{name}_turn_{turn + 1}": scored[name] for name in TURN_COLUMNS}
        for texts, ids in zip(answers, scored["generated"].tolist(), strict=True):
            texts.append(said_text(tokenizer, (), ids).strip())
    return [(first, second) for first, second in answers], values
