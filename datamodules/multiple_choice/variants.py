"""The batches of a question filter: every question in all orders of its choices."""

from collections.abc import Sequence
from typing import Any

from torch.utils.data import DataLoader

from datamodules.parts.loading import BatchSize, batch_loader
from dsg.evaluation import Question, encode_question, question_collate
from dsg.evaluation.benchmarks.multiple_choice.permutations import ORDERS
from dsg.lm import length_batches


def variant_loader(
    tokenizer: Any,
    variants: Sequence[Question],
    batch_size: BatchSize,
    trainer: Any,
) -> DataLoader:
    """Batches of variants of about the same length.

    Args:
        tokenizer: The model's tokenizer.
        variants: All variants of all questions, those of a question next to each other; a variant's
            id is its place.
        batch_size: Questions in a batch, or `auto`.
        trainer: Whose ranks share the batches.
    """
    # The order of the choices hardly changes a length, so that the first one tells those of all:
    # once with the question and once without it.
    lengths = [
        max(map(len, encode_question(tokenizer, question)[1]))
        for question in variants[:: len(ORDERS)]
    ]
    each = [lengths[question.id // len(ORDERS)] for question in variants]
    batches = length_batches(each, batch_size)
    return batch_loader(variants, batches, trainer, question_collate(tokenizer), keep_rest=True)
