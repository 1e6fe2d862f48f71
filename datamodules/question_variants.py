"""The batches of a question filter: every question in all orders of its choices."""

from typing import TYPE_CHECKING

from torch.utils.data import DataLoader

from datamodules.loading import batch_loader
from dsg.choices.permutations import ORDERS, VARIANTS, variant
from dsg.collate import encode_question, question_collate
from dsg.tokens import length_batches

if TYPE_CHECKING:
    from datamodules.multiple_choice import MultipleChoiceData


def variant_loader(data: "MultipleChoiceData") -> DataLoader:
    """All variants of all questions, those of a question next to each other.

    Variant v of question i has the id `VARIANTS * i + v`.
    """
    questions = [
        data.fit(variant(row, number, data.protocol, data.tokenizer, id=VARIANTS * place + number))
        for place, row in enumerate(row for rows in data.sets.values() for row in rows)
        for number in range(VARIANTS)
    ]
    # The order of the choices hardly changes a length, so that the first one tells those of all:
    # once with the question and once without it.
    lengths = [
        max(map(len, encode_question(data.tokenizer, question)[1]))
        for question in questions[:: len(ORDERS)]
    ]
    each = [lengths[question.id // len(ORDERS)] for question in questions]
    batches = length_batches(each, data.batch_size)
    collate = question_collate(data.tokenizer)
    return batch_loader(questions, batches, data.trainer, collate, keep_rest=True)
