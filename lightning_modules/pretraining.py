"""Trains the embedded benchmark's language model from scratch: `fit`."""

import math

import lightning
import torch
from jaxtyping import Float, Int
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_modules.parts.saving import save_model_folder

FINAL_LR_FRACTION = 0.05


class PretrainingModule(lightning.LightningModule):
    """A small Llama-architecture causal LM trained on packed token blocks.

    The data module yields `LongTensor` blocks `[batch, seq]` without padding. The initial weights
    come from the global seed. At the end of `fit` the model lies in `<run directory>/model`.

    Args:
        vocab_size: Number of tokens of the tokenizer.
        d_model: Width of the residual stream.
        num_layers: Number of decoder layers.
        num_heads: Attention heads; must divide `d_model`.
        d_ff: Width of the gated feed-forward layers.
        context_length: Tokens of one packed block.
        lr: Peak learning rate of AdamW (betas 0.9 and 0.98).
        weight_decay: Decoupled weight decay of every parameter.
        warmup_fraction: Share of the optimizer steps with a linearly rising learning rate; a
            cosine then takes it down to 5 % of its peak.
        pad_token_id: Id that the saved configuration names as padding.
        bos_token_id: Id that begins a text.
        eos_token_id: Id that ends a text.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        d_ff: int = 384,
        context_length: int = 64,
        lr: float = 3e-3,
        weight_decay: float = 0.05,
        warmup_fraction: float = 0.03,
        pad_token_id: int = 0,
        bos_token_id: int = 2,
        eos_token_id: int = 1,
    ) -> None:
        super().__init__()
        self.config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=d_model,
            intermediate_size=d_ff,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_heads,
            max_position_embeddings=context_length,
            tie_word_embeddings=True,
            initializer_range=0.02,
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
        )
        self.lr = lr
        self.weight_decay = weight_decay
        self.warmup_fraction = warmup_fraction
        self.model: LlamaForCausalLM | None = None

    def configure_model(self) -> None:
        """Draw the initial weights, once."""
        if self.model is None:
            self.model = LlamaForCausalLM(self.config)

    def training_step(self, batch: Int[Tensor, "batch seq"], batch_idx: int) -> Float[Tensor, ""]:
        """Mean next-token cross-entropy of one block batch, in nats."""
        del batch_idx
        assert self.model is not None
        loss = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with linear warm-up and a cosine to 5 % of the peak, stepped every batch."""
        optimizer = torch.optim.AdamW(
            self.parameters(),
            lr=self.lr,
            betas=(0.9, 0.98),
            weight_decay=self.weight_decay,
        )
        num_steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_factor(step, num_steps, self.warmup_fraction)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_fit_end(self) -> None:
        """Leave an ordinary Hugging Face folder behind."""
        assert self.model is not None
        self.model.eval()
        save_model_folder(self.trainer, self.model)


def lr_factor(step: int, num_steps: int, warmup_fraction: float) -> float:
    """Learning rate at `step`, relative to its peak: linear warm-up, then a cosine to 5 %.

    Args:
        step: Optimizer steps taken so far, from 0.
        num_steps: Optimizer steps of the whole run.
        warmup_fraction: Share of them that warms up, in `[0, 1)`.
    """
    num_warmup_steps = max(1, round(warmup_fraction * num_steps))
    if step < num_warmup_steps:
        return (step + 1) / num_warmup_steps
    progress = min(1.0, (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps))
    return FINAL_LR_FRACTION + (1 - FINAL_LR_FRACTION) * 0.5 * (1 + math.cos(math.pi * progress))
