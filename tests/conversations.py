"""Conversations in the tiny tokenizer's words, and a model that can hold them."""

import json
from pathlib import Path
from typing import Any

from tests.helpers import tiny_model, tiny_tokenizer

# One word per marker, so that the tiny tokenizer knows them.
TEMPLATE = (
    "{{ bos_token }} {% for m in messages %}{% if m['role'] == 'user' %}w24 {{ m['content'] }} "
    "{% else %}w25 {{ m['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}w25{% endif %}"
)
_CATEGORIES = ("writing", "roleplay", "math")


def rows(num: int = 7) -> list[dict[str, Any]]:
    """Rows in the published format, a third of them with references."""
    found = []
    for index in range(num):
        words = [f"w{(3 * index + step) % 24}" for step in range(1 + index % 4)]
        category = _CATEGORIES[index % 3]
        row = {"question_id": 100 + index, "category": category}
        row["turns"] = [" ".join(words), f"w{index} w{index + 3}"]
        if category == "math":
            row["reference"] = ["w5", "w6"]
        found.append(row)
    return found


def write_questions(path: Path, num: int = 7) -> Path:
    """`question.jsonl`."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(num)), encoding="utf-8")
    return path


def chat_tokenizer() -> Any:
    """The tiny tokenizer with a chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def save_chat_model(folder: Path) -> Path:
    """The tiny model with that tokenizer."""
    tiny_model().save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder
