"""Conversations as the text that a tokenizer's chat template makes of them."""

from collections.abc import Sequence
from typing import Any

from dsg.errors import UserError

_ROLES = ("user", "assistant")
# Some templates tell the model today's date, and a prompt must be the same on any day.
_DATE = "26 Jul 2024"


_REMEDY = "take an instruction-tuned model"


def check_chat_template(tokenizer: Any, needed_by: str, remedy: str = _REMEDY) -> None:
    """Refuse a tokenizer without a chat template.

    Args:
        tokenizer: Of the model.
        needed_by: What needs the template, for the message.
        remedy: What to do instead, for the message.

    Raises:
        UserError: There is none.
    """
    if not tokenizer.chat_template:
        name = tokenizer.name_or_path or type(tokenizer).__name__
        raise UserError(
            f"{needed_by} needs a tokenizer with a chat template, and that of {name!r} has none; "
            f"{remedy}."
        )


def chat_text(
    tokenizer: Any,
    messages: Sequence[str],
    needed_by: str = "a conversation",
    remedy: str = _REMEDY,
) -> str:
    """The user's and the model's messages in turn, up to where the model's next one begins.

    The template's bos token is left out where the tokenizer adds one by itself.

    Raises:
        UserError: The tokenizer has no chat template; see `check_chat_template`.
    """
    check_chat_template(tokenizer, needed_by, remedy)
    text = tokenizer.apply_chat_template(
        [{"role": _ROLES[i % 2], "content": message} for i, message in enumerate(messages)],
        tokenize=False,
        add_generation_prompt=True,
        date_string=_DATE,
    )
    bos = tokenizer.bos_token
    adds_bos = bos and tokenizer("", verbose=False)["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(bos) if adds_bos else text
