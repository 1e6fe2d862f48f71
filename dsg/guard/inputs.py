"""What a forward pass was given: its tokens, which of them count, and which are the prompt."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from dsg.errors import UserError
from dsg.lm import count_mask

# Keyword arguments that a guarded model takes besides its own.
MASKS = ("token_mask", "prompt_mask")
# Arguments by which attention kernels are told where packed sequences begin.
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


@dataclass(frozen=True)
class ForwardInputs:
    """The arguments of a forward pass that matter to a guard.

    Attributes:
        shape: Batch and sequence length of this call's tokens.
        device: Where they are.
        input_ids: Token ids; None if only embeddings were given.
        attention_mask: The model's mask, which with a KV cache also covers earlier tokens.
        cache: KV cache before the call, or None.
        token_mask: Counted tokens as given by the caller, or None.
        prompt_mask: Prompt tokens as given by the caller, or None.
    """

    shape: torch.Size
    device: torch.device
    input_ids: Tensor | None
    attention_mask: Any
    cache: Any
    token_mask: Tensor | None
    prompt_mask: Tensor | None

    @classmethod
    def of(cls, arguments: Mapping[str, Any], given: Mapping[str, Tensor]) -> "ForwardInputs":
        """Reads the decoder's arguments, with the masks and ids that the model around it was given.

        Raises:
            UserError: If a mask does not have the tokens' shape.
        """
        input_ids = tokens = arguments.get("input_ids")
        attention_mask = arguments.get("attention_mask")
        if tokens is None:
            tokens = arguments["inputs_embeds"]
            # A multimodal model embeds the ids itself; prompt tuning adds tokens that have none.
            outer = given.get("input_ids")
            if outer is not None and outer.shape == tokens.shape[:2]:
                # It also turns the mask that it was given into other ones.
                input_ids, attention_mask = outer, given.get("attention_mask")
        shape = tokens.shape[:2]
        for name in MASKS:
            mask = given.get(name)
            if mask is not None and (mask.shape != shape or mask.dtype != torch.bool):
                raise UserError(
                    f"`{name}` must be boolean of shape {list(shape)} like the tokens of this "
                    f"call, got {mask.dtype} of shape {list(mask.shape)}; make it from `input_ids`."
                )
        _refuse_packed(arguments, shape, attention_mask)
        return cls(
            shape=shape,
            device=tokens.device,
            input_ids=input_ids,
            attention_mask=attention_mask,
            cache=arguments.get("past_key_values"),
            token_mask=given.get("token_mask"),
            prompt_mask=given.get("prompt_mask"),
        )

    def counted(self, uncounted_ids: list[int], pad_id: int | None) -> Bool[Tensor, "batch seq"]:
        """Counted tokens of this call: the caller's mask, or else a guard's own rule.

        Raises:
            UserError: If neither the ids nor a token mask are known, or the attention mask is not
                one value per token.
        """
        if self.token_mask is not None:
            return self.token_mask
        if self.input_ids is None:
            raise UserError(
                "`token_mask` must be given with `inputs_embeds`, whose tokens a guard cannot "
                "see, got none; pass it to the model's forward pass."
            )
        return count_mask(self.input_ids, self._recent_mask(), uncounted_ids, pad_id)

    def prompt(self, counted: Bool[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq"] | None:
        """Prompt tokens of a new input by the caller's mask; None, without one, for all.

        Raises:
            UserError: If a counted prompt token stands behind a counted token of the rest.
        """
        if self.prompt_mask is None:
            return None
        prompt, counted = self.prompt_mask.to(self.device), counted.to(self.device)
        if (((counted & ~prompt).cumsum(1) > 0) & counted & prompt).any():
            raise UserError(
                "`prompt_mask` must mark the beginning of each sequence, got prompt tokens behind "
                "others; mark one run of tokens from the start."
            )
        return prompt

    def _recent_mask(self) -> Int[Tensor, "batch seq"] | None:
        mask = self.attention_mask
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            raise UserError(
                "`attention_mask` must have shape [batch, seq] for a guard, got a mask made for a "
                "static KV cache; use a dynamic cache or pass `token_mask`."
            )
        return mask[:, -self.shape[1] :].to(self.device)


def _refuse_packed(arguments: Mapping[str, Any], shape: torch.Size, mask: Any) -> None:
    """Refuses several sequences in one row: a gate decides per row."""
    given = [name for name in _PACKED if arguments.get(name) is not None]
    positions = arguments.get("position_ids")
    restarts = False
    if isinstance(positions, Tensor) and positions.ndim == 2 and positions.shape == shape:
        real = torch.ones_like(positions, dtype=torch.bool)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            real = mask[:, -shape[1] :] != 0
        both = real[:, 1:] & real[:, :-1]  # [batch, seq - 1]
        restarts = bool(((positions.diff(dim=1) <= 0) & both).any())
    if given or restarts:
        raise UserError(
            "each row must hold one sequence for a guard to decide about, got packed sequences "
            f"({', '.join(given) or 'position_ids start again within a row'}); pad them instead."
        )


def pop_masks(kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Takes a guarded model's own keyword arguments out of a call's, those that were given."""
    popped = {name: kwargs.pop(name, None) for name in MASKS}
    return {name: mask for name, mask in popped.items() if mask is not None}


def named_arguments(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a module's forward pass by name, however they were passed."""
    if not args:
        return kwargs
    return {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}
