"""Text to token batches, and the one rule for which tokens count."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dsg.errors import UserError

_UNCOUNTED_ROLES = ("pad", "bos", "eos", "sep", "cls", "mask")


def uncounted_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that never count: pad, bos, eos, sep, cls, mask and added control tokens.

    `<unk>` stands for a word, so it counts unless it also has one of those roles.

    Args:
        tokenizer: The model's tokenizer.

    Returns:
        Distinct ids, ascending.
    """
    named = set(_role_ids(tokenizer, _UNCOUNTED_ROLES))
    control = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return sorted(named | {i for i in control if i != tokenizer.unk_token_id})


def count_mask(
    input_ids: Int[Tensor, "batch seq"],
    attention_mask: Int[Tensor, "batch seq"] | Bool[Tensor, "batch seq"] | None,
    uncounted_ids: Collection[int],
    pad_id: int | None,
) -> Bool[Tensor, "batch seq"]:
    """True where a token counts in statistics, densities and clamps.

    Args:
        input_ids: Token ids.
        attention_mask: Nonzero for real tokens. Without it only leading and trailing runs of
            `pad_id` are padding, because a pad id inside a text may be an ordinary token.
        uncounted_ids: Ids that never count, wherever they stand.
        pad_id: The padding id, or None if there is none.

    Returns:
        The token mask, on the device of `input_ids`.
    """
    uncounted = torch.tensor(sorted(uncounted_ids), dtype=input_ids.dtype, device=input_ids.device)
    counted = ~torch.isin(input_ids, uncounted)
    if attention_mask is not None:
        return counted & (attention_mask != 0)
    if pad_id is None:
        return counted
    real = (input_ids != pad_id).int()
    # A position lies between the first and the last real token if some real token is at or
    # before it and some real token is at or after it.
    inside = (real.cumsum(1) > 0) & (real.flip(1).cumsum(1).flip(1) > 0)
    return counted & inside


@dataclass(frozen=True)
class TokenBatch:
    """Padded token ids of several sequences.

    Attributes:
        input_ids: Token ids, shape [batch, seq].
        attention_mask: 1 for real tokens, 0 for padding, shape [batch, seq].
        token_mask: True for counted tokens, shape [batch, seq].
    """

    input_ids: Int[Tensor, "batch seq"]
    attention_mask: Int[Tensor, "batch seq"]
    token_mask: Bool[Tensor, "batch seq"]

    def to(self, device: torch.device | str) -> "TokenBatch":
        """The same batch on another device."""
        return TokenBatch(
            self.input_ids.to(device), self.attention_mask.to(device), self.token_mask.to(device)
        )

    def __getitem__(self, rows: slice) -> "TokenBatch":
        """Some of the sequences, still padded to the same length."""
        return TokenBatch(self.input_ids[rows], self.attention_mask[rows], self.token_mask[rows])

    def model_inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of a Hugging Face forward pass."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], max_length: int | None
) -> list[list[int]]:
    """Tokenizes each text with the tokenizer's own special tokens, cut on the right.

    Args:
        tokenizer: The model's tokenizer.
        texts: One sequence each.
        max_length: Longest sequence to keep, in tokens with special tokens; None keeps all.

    Returns:
        Token ids per text.

    Raises:
        UserError: If `max_length` is below 1, or a text begins with more than one bos token.
    """
    if max_length is not None and max_length < 1:
        raise UserError(f"`max_length` must be at least 1 token, got {max_length}; raise it.")
    texts = list(texts)
    if not texts:
        return []
    # verbose=False: the tokenizer would warn about lengths that are cut on the next line.
    sequences = [list(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]
    bos_id = tokenizer.bos_token_id
    for index, ids in enumerate(sequences):
        # Where bos doubles as eos or separator a second one is no mistake.
        if bos_id is not None and bos_id != tokenizer.eos_token_id and ids[:2] == [bos_id] * 2:
            raise UserError(
                f"text {index} must begin with at most one bos token {tokenizer.bos_token!r}, "
                "got two; remove it from the text, the tokenizer adds its own."
            )
    return [ids[:max_length] for ids in sequences]


def pad_sequences(
    sequences: Sequence[Sequence[int]],
    pad_id: int,
    uncounted_ids: Collection[int],
    side: Literal["right", "left"] = "right",
) -> TokenBatch:
    """Pads sequences to the longest of them.

    The attention mask comes from the lengths, never from the ids: `pad_id` may equal eos.

    Args:
        sequences: Token ids, one sequence per row.
        pad_id: Id that fills the gaps.
        uncounted_ids: Ids that never count.
        side: Where the padding goes.

    Returns:
        A batch on the CPU, at least one position long.
    """
    length = max((len(ids) for ids in sequences), default=0) or 1
    input_ids = torch.full((len(sequences), length), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(sequences):
        start = 0 if side == "right" else length - len(ids)
        input_ids[row, start : start + len(ids)] = torch.tensor(list(ids), dtype=torch.long)
        attention_mask[row, start : start + len(ids)] = 1
    token_mask = count_mask(input_ids, attention_mask, uncounted_ids, pad_id)
    return TokenBatch(input_ids, attention_mask, token_mask)


def padding_for(tokenizer: PreTrainedTokenizerBase) -> Callable[..., TokenBatch]:
    """`pad_sequences` with the padding and the uncounted ids of a tokenizer."""
    uncounted_ids = uncounted_token_ids(tokenizer)
    return partial(pad_sequences, pad_id=padding_id(tokenizer), uncounted_ids=uncounted_ids)


def length_batches(lengths: Sequence[int], batch_size: int | Literal["auto"]) -> list[list[int]]:
    """Groups sample indices into batches of similar length, the same on every rank.

    Args:
        lengths: Tokens per sample.
        batch_size: Largest number of samples per batch; `auto` fills each batch up to
            `auto_tokens()`, padding included.

    Returns:
        Batches of indices into `lengths`, ordered by (length, index).

    Raises:
        UserError: If `batch_size` is below 1.
    """
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    if batch_size != "auto":
        if batch_size < 1:
            raise UserError(f"`batch_size` must be at least 1, got {batch_size}; raise it.")
        return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    batches: list[list[int]] = []
    most = auto_tokens()
    for index in order:
        # The newest sample is the longest: the others are padded to it.
        if batches and lengths[index] * (len(batches[-1]) + 1) <= most:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def auto_tokens() -> int:
    """Tokens of a batch whose size is found automatically; a CPU gains nothing from large ones."""
    return 16_384 if torch.cuda.is_available() else 2048


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's pad id, else its eos id, else 0; masks never depend on the choice."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token_id, int):
            return token_id
    return 0


def check_vocabulary(tokenizer: Any, vocab_size: int, model_name: str) -> None:
    """Refuses a tokenizer that writes ids for which the model has no embedding.

    Control tokens that no text holds may lie beyond it, such as an image's place in Gemma 3.

    Args:
        tokenizer: The tokenizer.
        vocab_size: Rows of the model's embedding.
        model_name: Of both, for the message.

    Raises:
        UserError: The tokenizer writes such an id.
    """
    added = [i for i, token in tokenizer.added_tokens_decoder.items() if not token.special]
    used = [*added, *_role_ids(tokenizer, (*_UNCOUNTED_ROLES, "unk"))]
    size = max(tokenizer.vocab_size, *(token_id + 1 for token_id in used), 0)
    if size > vocab_size:
        raise UserError(
            f"`model_name` must hold a tokenizer of at most the model's {vocab_size} tokens, got "
            f"{model_name!r} with one of {size}; give the tokenizer that belongs to the model."
        )


def _role_ids(tokenizer: Any, roles: Sequence[str]) -> list[int]:
    """Ids of the tokens with these roles that the tokenizer has."""
    ids = [getattr(tokenizer, f"{role}_token_id", None) for role in roles]
    return [token_id for token_id in ids if isinstance(token_id, int)]


def shared_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
