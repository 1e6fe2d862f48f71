"""Cuts prompts that are longer than a model's context."""

from dataclasses import replace
from typing import Any

from dsg.errors import UserError
from dsg.evaluation.collate import encode_question
from dsg.evaluation.items import Question


def fit_question(
    tokenizer: Any, question: Question, max_length: int | None, *, allow_truncation: bool
) -> Question:
    """The question, if need be with the beginning of its prompt cut off.

    Args:
        tokenizer: A fast tokenizer of Transformers.
        question: The question.
        max_length: Tokens that prompt and longest option may have together, with the tokenizer's
            own special tokens, which are never cut; None for no limit.
        allow_truncation: Whether to cut.

    Returns:
        `question` itself where it fits.

    Raises:
        UserError: It does not fit and may not be cut, or its options alone do not fit.
    """
    if max_length is None:
        return question
    fitting = question
    while (length := _length(tokenizer, fitting)) > max_length:
        if not allow_truncation:
            raise UserError(
                f"every prompt with its options must fit into {max_length} tokens, but question "
                f"{question.key or question.id} of {question.domain!r} has {length}; set "
                "`allow_truncation: true` to cut such prompts on the left, or raise `max_length`."
            )
        fitting = replace(fitting, prompt=_cut(tokenizer, fitting, length - max_length))
    return fitting


def _length(tokenizer: Any, question: Question) -> int:
    return max(map(len, encode_question(tokenizer, question)[1]))


def _cut(tokenizer: Any, question: Question, count: int) -> str:
    """The prompt without its first `count` tokens; a few more may go where tokens merge."""
    encoded = tokenizer(question.prompt, add_special_tokens=False, return_offsets_mapping=True)
    ends = [end for _, end in encoded["offset_mapping"]]
    if count >= len(ends):
        raise UserError(
            f"the options of question {question.key or question.id} of {question.domain!r} leave "
            f"no room for its prompt, which would have to lose {count} of {len(ends)} tokens; "
            "raise `max_length`."
        )
    # An end of zero (of a prefix space, say) would cut nothing, for ever.
    return question.prompt[max(ends[count - 1], 1) :]
