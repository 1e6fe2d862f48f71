"""Files of made-up sentences for the tests of the own-text mode."""

import random
from pathlib import Path


def write_text(path: Path, words: str, num_paragraphs: int, seed: int = 0) -> Path:
    """Paragraphs of 65 words out of a small vocabulary: one passage each."""
    rng = random.Random(f"{seed} {words}")
    vocabulary = words.split()
    paragraphs = (" ".join(rng.choices(vocabulary, k=65)) for _ in range(num_paragraphs))
    path.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    return path


FORGET_WORDS = "the of and a was pathogen virus toxin spreads lab cell dose agent culture spore"
RETAIN_WORDS = "the of and a was garden river bread song chair lamp market cloud horse window"


def write_both(folder: Path, num_forget: int = 60, num_retain: int = 120) -> tuple[Path, Path]:
    """A forget and a retain file."""
    return (
        write_text(folder / "forget.txt", FORGET_WORDS, num_forget),
        write_text(folder / "retain.txt", RETAIN_WORDS, num_retain),
    )
