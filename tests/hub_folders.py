"""Folders in the exact layouts of the Hugging Face hub, small enough to build in a test."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from tests.helpers import jumprelu_sae, standard_sae

D_MODEL = 16
D_SAE = 16_384  # as in Gemma Scope, whose ids the configurations name
NUM_LAYERS = 8
MMLU_SUBJECTS = (
    "high_school_us_history",
    "college_computer_science",
    "college_biology",
    "high_school_geography",
    "human_aging",
)
_BIOLOGY, _SECURITY, _GENERAL, _SHARED = (
    words.split()
    for words in (
        "cell gene virus protein enzyme toxin sample culture vector membrane",
        "packet kernel socket buffer shell cipher router payload",
        "river king valley treaty harvest empire mountain border memory age market climate city",
        "table which what of the in a is and to by with from was",
    )
)
_WMDP_TOPICS = {"wmdp-bio": _BIOLOGY, "wmdp-chem": _GENERAL, "wmdp-cyber": _SECURITY}
# What the hub's own template of Gemma 2 does, in fewer words.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
Rows = Sequence[Mapping[str, Any]]


def write_dataset(folder: Path, configs: Mapping[str, Mapping[str, Rows]]) -> Path:
    """Write a data set as the hub stores it: Parquet files, and a card that lists them.

    Args:
        folder: Where.
        configs: Rows by configuration and split; a configuration without a name is `default`.
    """
    lines = ["---", "license: mit", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        (folder / config).mkdir(parents=True, exist_ok=True)
        for split, rows in splits.items():
            table = pyarrow.Table.from_pylist([dict(row) for row in rows])
            path = f"{config}/{split}-00000-of-00001.parquet"
            pyarrow.parquet.write_table(table, folder / path)
            lines += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    card = "\n".join([*lines, "---", "", f"# {folder.name}", ""])
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


def text(rng: np.random.Generator, num_words: int, topic: Sequence[str] = _GENERAL) -> str:
    """Random words of a topic and of those that all texts share."""
    return " ".join(rng.choice([*topic, *_SHARED], num_words).tolist())


def question_rows(
    num: int, seed: int, subject: str | None = None, topic: Sequence[str] = _GENERAL
) -> list[dict[str, Any]]:
    """Questions in the columns of WMDP, or of MMLU where a subject is given."""
    rng = np.random.default_rng(seed)
    return [
        {
            "question": f"{text(rng, 6, topic).capitalize()} {index}?",
            **({"subject": subject} if subject else {}),
            "choices": _choices(rng, topic),
            "answer": int(rng.integers(4)),
        }
        for index in range(num)
    ]


def _choices(rng: np.random.Generator, topic: Sequence[str]) -> list[str]:
    found: list[str] = []
    while len(found) < 4:
        found += {text(rng, int(rng.integers(1, 4)), topic)} - {*found}
    return found


def text_rows(num: int, seed: int, topic: Sequence[str]) -> list[dict[str, str]]:
    """Texts of some 100 characters about a topic."""
    rng = np.random.default_rng(seed)
    return [{"text": text(rng, int(rng.integers(20, 35)), topic)} for _ in range(num)]


def wmdp_rows(config: str, num: int) -> list[dict[str, Any]]:
    """What `write_wmdp` writes for a configuration."""
    return question_rows(num, list(_WMDP_TOPICS).index(config), topic=_WMDP_TOPICS[config])


def write_wmdp(folder: Path, num: int = 7) -> Path:
    """`cais/wmdp`."""
    return write_dataset(folder, {name: {"test": wmdp_rows(name, num)} for name in _WMDP_TOPICS})


def write_mmlu(folder: Path, num: int = 5) -> Path:
    """`cais/mmlu`, the subjects that the papers report."""
    return write_dataset(
        folder,
        {
            name: {
                "test": question_rows(num, 10 + seed, name),
                "dev": question_rows(5, 30 + seed, name),
            }
            for seed, name in enumerate(MMLU_SUBJECTS)
        },
    )


def write_corpora(folder: Path, num: int = 16) -> Path:
    """`cais/wmdp-corpora`."""
    kinds = {
        "bio-retain-corpus": _BIOLOGY,
        "cyber-forget-corpus": _SECURITY,
        "cyber-retain-corpus": _SECURITY,
    }
    return write_dataset(
        folder,
        {
            name: {"train": text_rows(num, 50 + seed, topic)}
            for seed, (name, topic) in enumerate(kinds.items())
        },
    )


def write_bio_forget(folder: Path, num: int = 16) -> Path:
    """`cais/wmdp-bio-forget-corpus`: one configuration, and columns beside the text."""
    rows = [
        {"title": "A title", "abstract": "An abstract.", "text": row["text"], "doi": str(index)}
        for index, row in enumerate(text_rows(num, 60, _BIOLOGY))
    ]
    return write_dataset(folder, {"default": {"train": rows}})


def write_wikitext(folder: Path, num: int = 40) -> Path:
    """`Salesforce/wikitext`, with its empty lines and headings."""
    rows = [{"text": ""}, {"text": " = Heading = \n"}, *text_rows(num, 70, _GENERAL)]
    return write_dataset(folder, {"wikitext-2-raw-v1": {"test": rows}})


def gemma_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with Gemma's special tokens, chat template and one token a letter."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = [
        " ".join(_BIOLOGY + _SECURITY + _GENERAL + _SHARED),
        "Answer: A B C D",
        "The following are multiple choice questions",
    ]
    tokenizer.train_from_iterator(lines * 9, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        extra_special_tokens=["<start_of_turn>", "<end_of_turn>"],
        chat_template=CHAT_TEMPLATE,
    )


def write_gemma(folder: Path) -> Path:
    """A tiny random Gemma 2 with its tokenizer, saved as the hub stores it."""
    tokenizer = gemma_tokenizer()
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=D_MODEL,
        intermediate_size=32,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=1024,
        sliding_window=16,
        query_pre_attn_scalar=8,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Gemma2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_gemma_scope(folder: Path) -> Path:
    """A folder with Gemma Scope's `params.npz`, 16k features wide."""
    sae = jumprelu_sae(D_MODEL, D_SAE, apply_b_dec_to_input=False)
    # Some features fire on some tokens, as in a trained SAE.
    sae.threshold.data += 30.0
    folder.mkdir(parents=True, exist_ok=True)
    names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    np.savez(folder / "params.npz", **{name: getattr(sae, name).detach().numpy() for name in names})
    return folder


def write_cache(
    cache: Path, repository: str, commit: str, folder: Path, revisions: Sequence[str] = ()
) -> Path:
    """Put a folder's files where the hub's cache keeps those of one commit of a model.

    Args:
        cache: The cache's root.
        repository: `org/name`.
        commit: 40 hex digits.
        folder: Its files.
        revisions: Branches and tags that point to the commit.

    Returns:
        The snapshot's folder, which holds links to the files.
    """
    place = cache / f"models--{repository.replace('/', '--')}"
    snapshot = place / "snapshots" / commit
    for name in ("blobs", "refs", snapshot.relative_to(place)):
        (place / name).mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        content = file.read_bytes()
        blob = place / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    for revision in revisions:
        (place / "refs" / revision).write_text(commit)
    return snapshot


def write_saelens(folder: Path) -> Path:
    """A folder that SAELens wrote."""
    standard_sae(D_MODEL).save_model(folder)
    return folder
