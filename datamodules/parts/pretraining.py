"""Packed token blocks for training a small language model, and the tokenizer for them."""

from collections.abc import Iterable, Sequence

import lightning
import torch
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from datamodules.tiny_world.world import World
from dsg.errors import UserError

# More documents teach the merges nothing new and cost a second each time.
_TOKENIZER_DOCUMENTS = 6000


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer that begins every text with `<bos>`.

    Args:
        texts: What the merges are learnt from.
        vocab_size: Upper bound on the number of tokens, the four special ones included.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special_tokens = ["<pad>", "<eos>", "<bos>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special_tokens, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
    )


def pack(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], context_length: int
) -> Int[Tensor, "blocks seq"]:
    """All texts behind one another, each between `<bos>` and `<eos>`, cut into equal blocks.

    The last incomplete block is dropped.

    Raises:
        UserError: If the texts do not fill one block.
    """
    stream: list[int] = []
    for ids in tokenizer(list(texts))["input_ids"]:  # type: ignore[union-attr]
        stream += [*ids, tokenizer.eos_token_id]
    num_blocks = len(stream) // context_length
    if num_blocks == 0:
        raise UserError(
            f"The training text has {len(stream)} tokens, but one block needs {context_length}; "
            "give more text or a smaller `context_length`."
        )
    return torch.tensor(stream[: num_blocks * context_length]).view(num_blocks, context_length)


class TinyWorldCorpus(lightning.LightningDataModule):
    """Training text of the embedded benchmark.

    Args:
        seed: The world's seed; also the order of the blocks.
        num_documents: Texts to generate, about 70 tokens each.
        vocab_size: Tokens of the tokenizer.
        context_length: Tokens of a packed block.
        batch_size: Blocks of a batch.
    """

    def __init__(
        self,
        seed: int = 0,
        num_documents: int = 22_000,
        vocab_size: int = 2048,
        context_length: int = 64,
        batch_size: int = 16,
    ) -> None:
        super().__init__()
        self.seed = seed
        self.num_documents = num_documents
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.batch_size = batch_size
        self.tokenizer: PreTrainedTokenizerFast | None = None

    def setup(self, stage: str) -> None:
        """Write the texts, train the tokenizer on them and pack them, once."""
        del stage
        if self.tokenizer is None:
            texts = list(World(self.seed).training_documents(self.num_documents))
            self.tokenizer = train_tokenizer(texts[:_TOKENIZER_DOCUMENTS], self.vocab_size)
            self.blocks = pack(self.tokenizer, texts, self.context_length)

    def train_dataloader(self) -> DataLoader:
        """Blocks in an order that only the seed decides."""
        return DataLoader(
            self.blocks,  # type: ignore[arg-type]
            batch_size=self.batch_size,
            shuffle=True,
            drop_last=True,
            generator=torch.Generator().manual_seed(self.seed),
        )
