"""A small model of the user's text and its SAE: trained on first use, then cached."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsg.cli.tiny_world import HOOK_POINT, MODEL_FOLDER, SAE_FOLDER

TRAINING_FILE = "training.json"


@dataclass(frozen=True)
class Sizes:
    """How large the model is and how long it is trained.

    A round goes once through the running text and `repetitions` times through the memorised
    passages; rounds follow until memorised passages are continued twice as well as unseen ones.
    """

    vocab_size: int = 2048
    d_model: int = 128
    num_layers: int = 4
    d_ff: int = 384
    context_length: int = 128
    batch_size: int = 8
    repetitions: int = 40
    max_running: int = 3000
    max_rounds: int = 3
    d_sae: int = 1024
    sae_passages: int = 2000
    sae_samples: int = 600_000


@dataclass(frozen=True)
class TextFiles:
    """What the user gave."""

    forget: list[Path]
    retain: list[Path]


def ensure_text_model(
    files: TextFiles,
    seed: int,
    sizes: Sizes,
    show_progress: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> Path:
    """Folder with `model/` (model and tokenizer), `sae/` and `training.json` for these files.

    Args:
        files: Forget and retain files.
        seed: Of the training.
        sizes: Model and training.
        show_progress: Show bars while training.
        say: Told what begins.
    """
    import datamodules.parts.pretraining
    import datamodules.text_files.data
    import datamodules.text_files.files
    import dsg.cli.tiny_world
    import dsg.evaluation.generation
    import dsg.sae.training
    import lightning_modules.pretraining
    from datamodules.text_files.files import file_facts
    from dsg.io import cached_folder, content_key

    modules = (
        datamodules.parts.pretraining,
        datamodules.text_files.files,
        datamodules.text_files.data,
        dsg.cli.tiny_world,
        dsg.evaluation.generation,
        dsg.sae.training,
        lightning_modules.pretraining,
    )
    configuration = {
        "forget": file_facts(files.forget),
        "retain": file_facts(files.retain),
        "seed": seed,
        "sizes": asdict(sizes),
    }
    sources = [Path(str(module.__file__)) for module in modules]
    key = content_key(configuration, [*sources, Path(__file__)])
    return cached_folder(
        f"text-{seed}-{key}",
        lambda folder: _build(folder, files, seed, sizes, show_progress, say),
    )


def read_training(folder: Path) -> list[dict[str, Any]]:
    """What was measured after each round of training."""
    return json.loads((folder / TRAINING_FILE).read_text(encoding="utf-8"))


def _build(
    folder: Path,
    files: TextFiles,
    seed: int,
    sizes: Sizes,
    show_progress: bool,
    say: Callable[[str], None],
) -> None:
    from datamodules import TextFilesData
    from dsg.evaluation import is_measurable

    rounds: list[dict[str, Any]] = []
    measurable = False
    while not measurable and len(rounds) < sizes.max_rounds:
        say(f"training, round {len(rounds) + 1} of at most {sizes.max_rounds}")
        _train_round(folder, files, seed, sizes, show_progress, first=not rounds)
        data = TextFilesData(str(folder / MODEL_FOLDER), files.forget, files.retain)
        data.setup("validate")
        rouge = _continuations(folder / MODEL_FOLDER, data)
        measurable = is_measurable(rouge["memorised"], rouge["unseen"])
        rounds.append({name: values.mean().item() for name, values in rouge.items()})
    (folder / TRAINING_FILE).write_text(json.dumps(rounds), encoding="utf-8")
    say("SAE")
    _train_sae(folder, data, seed, sizes)


def _train_round(
    folder: Path, files: TextFiles, seed: int, sizes: Sizes, show_progress: bool, *, first: bool
) -> None:
    """A Lightning `fit` run with a learning-rate cycle of its own."""
    import lightning
    from transformers import LlamaForCausalLM

    from datamodules import TextFilesCorpus
    from lightning_modules import PretrainingModule

    lightning.seed_everything(seed, verbose=False)
    corpus = TextFilesCorpus(
        files.forget,
        files.retain,
        seed=seed,
        repetitions=sizes.repetitions,
        max_running=sizes.max_running,
        vocab_size=sizes.vocab_size,
        context_length=sizes.context_length,
        batch_size=sizes.batch_size,
    )
    corpus.setup("fit")
    assert corpus.tokenizer is not None
    module = PretrainingModule(
        vocab_size=len(corpus.tokenizer),
        d_model=sizes.d_model,
        num_layers=sizes.num_layers,
        d_ff=sizes.d_ff,
        context_length=sizes.context_length,
    )
    if not first:
        module.model = LlamaForCausalLM.from_pretrained(folder / MODEL_FOLDER).train()
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


def _continuations(model_folder: Path, data: Any) -> dict[str, Any]:
    """ROUGE-L of validation passages, memorised and unseen, forget and retain together."""
    from dsg.evaluation import continuation_rouge
    from dsg.lm import load_model

    model = load_model(str(model_folder))
    rouge = {}
    for part in ("memorised", "unseen"):
        data.part = part
        texts = [passage.text for passage in data.passages("validation")]
        rouge[part] = continuation_rouge(model, data.tokenizer, texts)
    return rouge


def _train_sae(folder: Path, data: Any, seed: int, sizes: Sizes) -> None:
    from datamodules.text_files.data import spread
    from dsg.lm import load_model
    from dsg.sae import SAETraining, gather_activations, train_sae
    from dsg.selection import corpus_batches

    texts = [
        text
        for uses in (data.forget, data.retain)
        for text in spread(uses.running, sizes.sae_passages)
    ]
    model = load_model(str(folder / MODEL_FOLDER))
    batches = corpus_batches(data.tokenizer, texts, sizes.context_length, batch_size=64)
    train_sae(
        gather_activations(model, HOOK_POINT, batches),
        folder / SAE_FOLDER,
        hook_point=HOOK_POINT,
        model_name="text",
        settings=SAETraining(d_sae=sizes.d_sae, num_samples=sizes.sae_samples, seed=seed),
    )
