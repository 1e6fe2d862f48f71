"""Multiple-choice questions in the words of a tokenizer that also knows letters and a chat."""

import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from dsg.evaluation.benchmarks.multiple_choice.prompts import ChoiceRow, row_key
from tests.helpers import tiny_model

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message['role'] }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_PIECES = [*"ABCD", *(f"w{index}" for index in range(26)), "Answer", "Question"]
_VOCAB = ["<pad>", "<eos>", "<bos>", "<unk>", "\n", ".", ":", "(", " "]
_VOCAB += [*_PIECES, *(f" {piece}" for piece in _PIECES)]


def choice_tokenizer(chat: bool = True, adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """One token per word with or without the space before it, and per sign."""
    tokenizer = Tokenizer(
        models.WordLevel({name: index for index, name in enumerate(_VOCAB)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|[^\w]"), "isolated")
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 2)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
    )
    fast.add_special_tokens({"extra_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def choice_model(seed: int = 0) -> LlamaForCausalLM:
    return tiny_model(seed=seed, vocab_size=len(choice_tokenizer()))


def save_choice_model(folder: Path, seed: int = 0) -> str:
    """The folder of a tiny random model with that tokenizer."""
    choice_model(seed).save_pretrained(folder)
    choice_tokenizer().save_pretrained(folder)
    return str(folder)


def choice_rows(num: int, seed: int = 0, subject: str = "toy") -> list[ChoiceRow]:
    """Questions of two to six random words with choices of one or two."""
    generator = torch.Generator().manual_seed(seed)

    def words(low: int, high: int) -> str:
        length = int(torch.randint(low, high + 1, (1,), generator=generator))
        return " ".join(f"w{i}" for i in torch.randint(26, (length,), generator=generator).tolist())

    rows = []
    for index in range(num):
        different: list[str] = []
        while len(different) < 4:
            different += {words(1, 2)} - {*different}
        first, second, third, fourth = different
        choices = (first, second, third, fourth)
        row = ChoiceRow(subject, f"{words(2, 6)} w{index % 26}", choices, index % 4)
        rows.append(ChoiceRow(subject, row.question, choices, row.answer, row_key(row)))
    return rows


def write_rows(path: Path, rows: list[ChoiceRow]) -> str:
    """Write a JSONL file with the hub's fields."""
    records = [
        {"question": row.question, "choices": list(row.choices), "answer": row.answer}
        for row in rows
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)
