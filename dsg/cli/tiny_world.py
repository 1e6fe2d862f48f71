"""The embedded benchmark's tokenizer, model and SAE: trained on first use, then cached.

Nothing else is ever cached: selection, calibration, attacks and evaluations always run.
"""

from pathlib import Path

HOOK_POINT = "blocks.2.hook_resid_post"
MODEL_FOLDER = "model"
SAE_FOLDER = "sae"
# Enough text for an SAE of a world of this size; more samples only repeat it.
SAE_DOCUMENTS = 4000


def ensure_tiny_world(seed: int, show_progress: bool = True) -> Path:
    """Folder with `model/` (model and tokenizer) and `sae/` of the tiny world of this seed.

    Args:
        seed: World seed; also seeds the training.
        show_progress: Show bars while training.
    """
    import datamodules.parts.pretraining
    import datamodules.tiny_world.words
    import datamodules.tiny_world.world
    import dsg.sae.training
    import lightning_modules.pretraining
    from dsg.io import cached_folder, content_key

    modules = (
        datamodules.parts.pretraining,
        datamodules.tiny_world.world,
        datamodules.tiny_world.words,
        dsg.sae.training,
        lightning_modules.pretraining,
    )
    sources = [Path(str(module.__file__)) for module in modules]
    key = content_key({"seed": seed}, [*sources, Path(__file__)])
    return cached_folder(
        f"tiny_world-{seed}-{key}", lambda folder: _build(folder, seed, show_progress)
    )


def _build(folder: Path, seed: int, show_progress: bool) -> None:
    from datamodules.parts.pretraining import TinyWorldCorpus
    from datamodules.tiny_world.words import DOMAINS
    from datamodules.tiny_world.world import World

    corpus = TinyWorldCorpus(seed=seed)
    pretrain(folder, corpus, seed, show_progress)
    texts = World(seed).documents(list(DOMAINS), SAE_DOCUMENTS, "sae")
    fit_sae(folder / SAE_FOLDER, folder / MODEL_FOLDER, texts, f"tiny_world:{seed}", seed)


def pretrain(folder: Path, corpus, seed: int, show_progress: bool, **settings) -> None:
    """Train a small Llama on a packed corpus by a Lightning `fit` run; it lands in `model/`.

    Args:
        folder: Where `model/` is made.
        corpus: A data module of `datamodules.parts.pretraining`.
        seed: Seeds the initial weights.
        show_progress: Show a bar while training.
        settings: Passed to `PretrainingModule`.
    """
    import lightning

    from lightning_modules.pretraining import PretrainingModule

    lightning.seed_everything(seed, verbose=False)
    corpus.setup("fit")
    module = PretrainingModule(vocab_size=len(corpus.tokenizer), **settings)
    trainer = lightning.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=show_progress,
    )
    trainer.fit(module, datamodule=corpus)


def fit_sae(folder: Path, model_folder: Path, texts: list[str], model_name: str, seed: int) -> None:
    """Train an SAE on the model's activations on `texts` and save it in `folder`."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from dsg.sae import SAETraining, gather_activations, train_sae
    from dsg.selection import corpus_batches

    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_folder)
    batches = corpus_batches(tokenizer, texts, max_length=128, batch_size=64)
    activations = gather_activations(model, HOOK_POINT, batches)
    train_sae(
        activations,
        folder,
        hook_point=HOOK_POINT,
        model_name=model_name,
        settings=SAETraining(seed=seed),
    )
