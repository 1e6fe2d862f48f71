"""Texts to predict about: the rows of a file or data set, or the items of a data module."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.text_files.files import read_plain_text
from dsg.errors import UserError
from dsg.evaluation import Text
from dsg.io import ROW_FILES, load_rows
from dsg.lm import chat_text

_ROLES = ("user", "assistant")


def read_texts(
    source: str, config: str | None, split: str, column: str, tokenizer: Any
) -> list[Text]:
    """The texts of a source, in its order.

    Args:
        source: A plain text, whose paragraphs are the texts; or rows, see `dsg.io.hub.load_rows`. A
            row's `id` and `domain` name the text, where it has them.
        config: Configuration of a data set.
        split: Split of a data set.
        column: Column of a text, or of a conversation: its messages in turn, the user's first and
            last, each a string or an object with `role` and `content`.
        tokenizer: The model's, whose template makes a text of a conversation.

    Raises:
        UserError: There is no such source, column or text, or two rows have the same id.
    """
    path = Path(source)
    if path.suffix.lower() == ".txt" or (path.is_file() and path.suffix.lower() not in ROW_FILES):
        paragraphs = re.split(r"\n\s*\n", read_plain_text(path).replace("\r\n", "\n"))
        stripped = [paragraph.strip() for paragraph in paragraphs if paragraph.strip()]
        if not stripped:
            raise UserError(f"The file {source!r} is empty; give one with text.")
        return [Text(number, str(number), text) for number, text in enumerate(stripped)]
    rows = load_rows(source, config, split)
    with_id = [row for row in rows if row.get("id") is not None]
    if with_id and len(with_id) < len(rows):
        raise UserError(
            f"every row of {source!r} must have an `id`, or none, got {len(with_id)} of "
            f"{len(rows)}; complete them."
        )
    texts = [
        _text_of_row(row, number, column, f"row {number + 1} of {source!r}", tokenizer)
        for number, row in enumerate(rows)
    ]
    _check_keys(source, [text.key for text in texts])
    return texts


def texts_of_items(data: Any, split: str) -> list[Text]:
    """The prompts of a data module's questions, its passages and prompts, or its conversations.

    Args:
        data: A data module that has been set up.
        split: `validation` or `test`; conversations have no split.

    Raises:
        UserError: It has none of them.
    """
    if hasattr(data, "conversations"):
        pairs = [
            (f"conversation-{c.question_id}", c.category, chat_text(data.tokenizer, c.turns[:1]))
            for c in data.conversations()
        ]
        return [
            Text(number, key, text, domain, is_chat=True)
            for number, (key, domain, text) in enumerate(pairs)
        ]
    kinds = {
        "question": lambda item: item.prompt,
        "passage": lambda item: item.context + item.text,
        "prompt": lambda item: item.text,
    }
    items = [
        (f"{kind}-{item.id}", item.domain, text_of(item))
        for kind, text_of in kinds.items()
        if hasattr(data, f"{kind}s")
        for item in getattr(data, f"{kind}s")(split)
    ]
    if not items:
        raise UserError(
            f"`of` must be a data module with questions, passages, prompts or conversations in "
            f"{split!r}, and {type(data).__name__} has none; name another, or another `split`."
        )
    return [Text(number, key, text, domain) for number, (key, domain, text) in enumerate(items)]


def _text_of_row(
    row: Mapping[str, Any], number: int, column: str, place: str, tokenizer: Any
) -> Text:
    value = row.get(column)
    if value is None and column not in row:
        raise UserError(f"{place} has no column {column!r}, only {sorted(row)}; set `column`.")
    is_chat = isinstance(value, list | tuple)
    if is_chat:
        text = chat_text(tokenizer, _messages(value, place))
    elif isinstance(value, str) and value.strip():
        text = value
    else:
        got = "a blank one" if isinstance(value, str) else type(value).__name__
        raise UserError(
            f"{place} must have a text or a list of messages in {column!r}, got {got}; mend it."
        )
    key, domain = row.get("id"), row.get("domain")
    return Text(
        number,
        str(number if key is None else key),
        text,
        domain if isinstance(domain, str) and domain else "all",
        is_chat,
    )


def _messages(value: Iterable[Any], place: str) -> list[str]:
    wanted = "the messages of user and assistant in turn, the user's first and last"
    messages = []
    for number, message in enumerate(value):
        role = _ROLES[number % 2]
        if isinstance(message, Mapping):
            if message.get("role") != role:
                raise UserError(
                    f"{place} must hold {wanted}, got the role {message.get('role')!r} in message "
                    f"{number + 1}; mend it."
                )
            message = message.get("content")
        if not isinstance(message, str) or not message.strip():
            raise UserError(f"{place} must hold {wanted}, message {number + 1} is none; mend it.")
        messages.append(message)
    if len(messages) % 2 == 0:
        raise UserError(f"{place} must hold {wanted}, got {len(messages)} messages; mend it.")
    return messages


def _check_keys(source: str, keys: Sequence[str]) -> None:
    [(key, count)] = Counter(keys).most_common(1)
    if count > 1:
        raise UserError(
            f"the ids of {source!r} must differ, got {key!r} {count} times; rename all but one."
        )
