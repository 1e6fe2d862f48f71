import lightning
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_modules.pretraining import PretrainingModule, lr_factor


def tiny_module() -> PretrainingModule:
    return PretrainingModule(
        vocab_size=23, d_model=16, num_layers=2, num_heads=2, d_ff=24, context_length=12, lr=1e-2
    )


def fit(module: PretrainingModule, run_dir, max_epochs: int = 8) -> lightning.Trainer:
    trainer = lightning.Trainer(
        max_epochs=max_epochs,
        default_root_dir=run_dir,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
    )
    blocks = torch.arange(16 * 12).reshape(16, 12) % 23
    trainer.fit(module, DataLoader(list(blocks), batch_size=4))  # pyright: ignore[reportArgumentType]
    return trainer


def test_training_learns_a_counting_sequence_and_saves_a_hugging_face_folder(tmp_path):
    lightning.seed_everything(0)
    module = tiny_module()
    trainer = fit(module, tmp_path)
    assert trainer.callback_metrics["train/loss"] < 2.5 < torch.log(torch.tensor(23.0))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    inputs = torch.arange(8)[None]
    assert torch.equal(saved(inputs).logits, module.model(inputs).logits)


def test_the_seed_alone_fixes_the_weights(tmp_path):
    weights = []
    for _ in range(2):
        lightning.seed_everything(3)
        module = tiny_module()
        fit(module, tmp_path, max_epochs=1)
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*weights)


def test_constructor_loads_nothing_and_configure_model_is_idempotent():
    module = tiny_module()
    assert not list(module.parameters())
    module.configure_model()
    first = module.model
    module.configure_model()
    assert module.model is first


@pytest.mark.parametrize(
    ("step", "factor"), [(0, 0.1), (9, 1.0), (10, 1.0), (55, 0.525), (100, 0.05), (200, 0.05)]
)
def test_lr_factor_by_hand(step: int, factor: float):
    assert lr_factor(step, num_steps=100, warmup_fraction=0.1) == pytest.approx(factor)
