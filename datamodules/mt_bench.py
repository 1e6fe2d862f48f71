"""MT-Bench as Lightning data: 80 conversations of two questions."""

from typing import Any

import lightning
from torch.utils.data import DataLoader

from datamodules.parts.batches import batch_loader
from datamodules.parts.corpora import Corpora, CorpusSettings, FromCorpora
from datamodules.parts.loading import load_tokenizer
from dsg.evaluation.benchmarks.mt_bench.conversations import (
    NAME,
    Conversation,
    ConversationBatch,
    read_conversations,
)
from dsg.io import dataset_revision, load_rows, short_name
from dsg.lm import chat_text, encode_texts, length_batches
from dsg.selection import texts_digest

QUESTIONS = "HuggingFaceH4/mt_bench_prompts"


class MtBenchData(FromCorpora, lightning.LightningDataModule):
    """The questions of MT-Bench, or one's own in the same format.

    All are the test split: nothing is chosen on them. Batches hold questions of similar length,
    whose answers are generated together.

    Args:
        model_name: The model's folder or hub name, for its tokenizer and its chat template.
        questions: Hub name (`@revision` pins it), folder in the hub's layout, or the published
            `question.jsonl` (`question_id`, `category`, `turns`, perhaps `reference`).
        split: Split of the data set.
        reference_answers: FastChat's `reference_answer/gpt-4.jsonl`, the right answers that the
            published grading shows for math, reasoning and coding; None takes the references of
            `questions`, which are short and miss some.
        batch_size: Conversations of a batch.
        corpora: Texts to make a guard from; None where it is loaded, or there is none.
    """

    def __init__(
        self,
        model_name: str,
        questions: str = QUESTIONS,
        split: str = "train",
        reference_answers: str | None = None,
        batch_size: int = 8,
        corpora: CorpusSettings | None = None,
    ) -> None:
        super().__init__()
        self.name = "mt_bench"
        self.model_name = model_name
        self.questions = questions
        self.split = split
        self.reference_answers = reference_answers
        self.batch_size = batch_size
        self.corpora = None if corpora is None else Corpora(corpora)
        self.tokenizer: Any = None

    def setup(self, stage: str) -> None:
        """Load the tokenizer and read the questions, once."""
        del stage
        if self.tokenizer is not None:
            return
        path = self.reference_answers
        references = [] if path is None else load_rows(path, None, "train")
        rows = load_rows(self.questions, None, self.split)
        self._conversations = read_conversations(rows, references)
        self._revision = dataset_revision(self.questions, None)
        self.tokenizer = load_tokenizer(self.model_name)

    def conversations(self) -> list[Conversation]:
        """All conversations, in the order of their ids."""
        return self._conversations

    def test_dataloader(self) -> DataLoader:
        """Each conversation exactly once, those with first questions of similar length together."""
        conversations = self._conversations
        texts = [chat_text(self.tokenizer, c.turns[:1], NAME) for c in conversations]
        lengths = [len(ids) for ids in encode_texts(self.tokenizer, texts, None)]
        batches = length_batches(lengths, self.batch_size)
        return batch_loader(conversations, batches, self.trainer, ConversationBatch, keep_rest=True)

    def facts(self) -> dict[str, Any]:
        """Where the questions came from, how many they are, and the hash of all of them."""
        parts = [
            "\x1f".join([conversation.category, *conversation.turns, *conversation.references])
            for conversation in self._conversations
        ]
        return {
            "questions": short_name(self.questions),
            "revision": self._revision,
            "n": len(parts),
            "sha256": texts_digest(parts),
            "corpora": self.corpora.facts() if self.corpora else {},
        }
