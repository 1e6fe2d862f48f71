"""Trains a JumpReLU SAE on a model's residual stream with SAELens's own trainer."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig, SAETrainer
from sae_lens.config import LoggingConfig, SAETrainerConfig
from torch import Tensor
from transformers import PreTrainedModel

from dsg.lm import TokenBatch, read_activations


@dataclass(frozen=True)
class SAETraining:
    """How an SAE is trained; the defaults suit the embedded benchmark's 128-wide stream.

    Library-like initial values (threshold 0.5, decoder norm 0.1) leave nine features of ten dead
    on so small a model; hence the larger ones here.

    Attributes:
        d_sae: Number of features.
        num_samples: Token activations to train on, drawn with repetition if there are fewer.
        target_l0: Features that should be active on a token.
        seed: Decides the initial weights and the order of the activations.
    """

    d_sae: int = 1024
    num_samples: int = 600_000
    batch_size: int = 1024
    lr: float = 2e-3
    target_l0: float = 12.0
    l0_coefficient: float = 0.3
    seed: int = 0


@torch.no_grad()
def gather_activations(
    model: PreTrainedModel, hook_point: str, batches: Sequence[TokenBatch]
) -> Float[Tensor, "tokens d_in"]:
    """Hook-point activations of every counted token, in batch order, float32."""
    rows = [read_activations(model, hook_point, b)[b.token_mask].float() for b in batches]
    return torch.cat(rows)


def train_sae(
    activations: Float[Tensor, "tokens d_in"],
    folder: Path,
    *,
    hook_point: str,
    model_name: str,
    settings: SAETraining | None = None,
) -> None:
    """Fit an SAE to activations and save its inference form as an ordinary SAELens folder.

    Args:
        activations: What to reconstruct, one row per token.
        folder: Where to save.
        hook_point: Where they were read; stored in the SAE's metadata.
        model_name: The model they came from; stored in the SAE's metadata.
        settings: How to train.
    """
    settings = settings or SAETraining()
    num_steps = settings.num_samples // settings.batch_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        sae = JumpReLUTrainingSAE(
            JumpReLUTrainingSAEConfig(
                d_in=activations.shape[-1],
                d_sae=settings.d_sae,
                device="cpu",
                dtype="float32",
                normalize_activations="expected_average_only_in",
                decoder_init_norm=1.0,
                jumprelu_init_threshold=1.5,
                jumprelu_bandwidth=1.0,
                jumprelu_sparsity_loss_mode="quadratic",
                target_l0=settings.target_l0,
                l0_coefficient=settings.l0_coefficient,
                l0_warm_up_steps=num_steps // 4,
                jumprelu_ste_to_input=True,
            )
        )
        sae.cfg.metadata.hook_name = hook_point
        sae.cfg.metadata.model_name = model_name
        trainer = SAETrainer(
            cfg=SAETrainerConfig(
                total_training_samples=num_steps * settings.batch_size,
                train_batch_size_samples=settings.batch_size,
                lr=settings.lr,
                lr_end=settings.lr / 10,
                lr_warm_up_steps=num_steps // 20,
                lr_decay_steps=num_steps // 5,
                device="cpu",
                dead_feature_window=max(50, num_steps // 10),
                # Sampling builds a W&B histogram even with logging off.
                feature_sampling_window=10**9,
                n_batches_for_norm_estimate=20,
                logger=LoggingConfig(log_to_wandb=False),
            ),
            sae=sae,
            data_provider=_shuffled_batches(activations, settings),
        )
        trainer.fit().save_inference_model(folder)


def _shuffled_batches(activations: Tensor, settings: SAETraining) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(settings.seed)
    size = settings.batch_size
    num_batches = math.ceil(len(activations) / size)
    while True:
        order = torch.randperm(len(activations), generator=generator)
        # Wrap around so that a small set still fills every batch.
        order = order.repeat(math.ceil(num_batches * size / len(order)))
        for start in range(0, num_batches * size, size):
            yield activations[order[start : start + size]]
