"""The user's own files as passages, and what each passage is used for."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from dsg.errors import UserError
from dsg.io import parse_json, read_bytes, read_text

# A passage ends at the end of a paragraph once it is long enough, and else when it is full.
MIN_WORDS, MAX_WORDS = 60, 90
# Two passages share text if half of their runs of this many words do: cut elsewhere, a text that
# was given twice would have no passage in common.
_RUN_OF_WORDS = 8

# Shares of all passages, and what is enough of each; the rest is running text.
_SHARES = {
    "forget": {"memorised": 0.25, "unseen": 0.25},
    "retain": {
        "memorised": 0.15,
        "unseen": 0.15,
        "attack": 0.1,
        "calibration": 0.15,
        "heldout": 0.15,
    },
}
_ENOUGH = {"memorised": 120, "unseen": 150, "attack": 150, "calibration": 300, "heldout": 300}
MIN_PASSAGES = {"forget": 40, "retain": 80}


@dataclass(frozen=True)
class Uses:
    """The passages of one kind by what they are used for; no passage is in two of them.

    Attributes:
        memorised: Trained on many times.
        unseen: Never trained on.
        attack: Mixed into an attacker's text (retain only); trained on once.
        calibration: Set the threshold (retain only); never trained on.
        heldout: Measure the false-positive rate (retain only); never trained on.
        running: All others: trained on once at most; features are selected with them.
    """

    memorised: list[str]
    unseen: list[str]
    running: list[str]
    attack: list[str]
    calibration: list[str]
    heldout: list[str]


def read_uses(
    forget_files: Sequence[str | Path], retain_files: Sequence[str | Path]
) -> tuple[Uses, Uses]:
    """Read the files of both kinds and deal their passages out.

    A passage's use depends on its SHA-256, so it does not move when the order of the files changes.

    Returns:
        Forget and retain passages.

    Raises:
        UserError: A file cannot be used, there is too little text, or the kinds share passages.
    """
    passages_of = {
        "forget": _passages_of_files(forget_files),
        "retain": _passages_of_files(retain_files),
    }
    for kind, passages in passages_of.items():
        if len(passages) < MIN_PASSAGES[kind]:
            raise UserError(
                f"--{kind} needs at least {MIN_PASSAGES[kind]} different passages of about "
                f"{(MIN_WORDS + MAX_WORDS) // 2} words, got {len(passages)} in "
                f"{len(forget_files if kind == 'forget' else retain_files)} file(s); give more "
                "text."
            )
    _check_unshared(passages_of["forget"], passages_of["retain"])
    return _deal("forget", passages_of["forget"]), _deal("retain", passages_of["retain"])


def read_passages(path: str | Path) -> list[str]:
    """Cut a file into passages of 60 to 90 words, white space normalised.

    Args:
        path: JSONL with a `text` in every line if its name ends in `.jsonl`, else plain text whose
            paragraphs are parted by empty lines. Short paragraphs (or texts of a JSONL file) are
            joined; what is left over at the end is a passage from 30 words on.

    Raises:
        UserError: The file is missing, empty or no text, or a line of a JSONL file has no `text`.
    """
    paragraphs = list(paragraphs_of(Path(path)))
    if not any(paragraphs):
        raise UserError(f"The file {str(path)!r} is empty; give one with text.")
    passages: list[str] = []
    words: list[str] = []
    for paragraph in paragraphs:
        words += paragraph
        while len(words) >= MIN_WORDS:
            passages.append(" ".join(words[:MAX_WORDS]))
            words = words[MAX_WORDS:]
    if len(words) >= MIN_WORDS // 2:
        passages.append(" ".join(words))
    return passages


def file_facts(paths: Iterable[str | Path]) -> list[dict[str, str | int]]:
    """Name, size in bytes and SHA-256 of files; not where they lie."""
    contents = ((Path(path).name, read_bytes(path)) for path in paths)
    return [
        {"name": name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents
    ]


def paragraphs_of(path: Path) -> Iterator[list[str]]:
    """Words of each paragraph of a plain text, or of each text of a JSONL file."""
    text = read_plain_text(path)
    if path.suffix != ".jsonl":
        for paragraph in text.replace("\r\n", "\n").split("\n\n"):
            yield paragraph.split()
        return
    # Not `splitlines`: JSON may hold other line separators inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _text_of(line, f"{path}, line {number}").split()


def _text_of(line: str, place: str) -> str:
    wanted = 'must be a JSON object such as {"text": "..."}'
    record = parse_json(line, place, f"it {wanted}")
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        got = f"the keys {sorted(record)}" if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{place}, {wanted} whose text is a string, got {got}; mend the line.")
    return record["text"]


def read_plain_text(path: Path) -> str:
    """The text of a file in UTF-8.

    Raises:
        UserError: There is none, or it is something else.
    """
    text = read_text(path)
    if "\0" in text:
        raise UserError(
            f"The file {str(path)!r} is binary (it holds zero bytes); give plain text or JSONL."
        )
    return text


def _passages_of_files(paths: Sequence[str | Path]) -> list[str]:
    """Different passages of all files; of those that differ in case alone the first counts."""
    different: dict[str, str] = {}
    for path in paths:
        for passage in read_passages(path):
            different.setdefault(passage.casefold(), passage)
    return list(different.values())


def _check_unshared(forget: Sequence[str], retain: Sequence[str]) -> None:
    in_forget = {run for passage in forget for run in _runs_of_words(passage)}
    shared = []
    for passage in retain:
        runs = _runs_of_words(passage)
        if sum(run in in_forget for run in runs) >= len(runs) / 2:
            shared.append(passage)
    if shared:
        raise UserError(
            f"--forget and --retain must not share passages, got {len(shared)} of the "
            f"{len(retain)} retain passages in the forget text too, such as {shared[0][:60]!r}; "
            "remove them from one side."
        )


def _runs_of_words(passage: str) -> list[tuple[str, ...]]:
    words = passage.casefold().split()
    return [tuple(words[i : i + _RUN_OF_WORDS]) for i in range(len(words) - _RUN_OF_WORDS + 1)]


def _deal(kind: str, passages: Sequence[str]) -> Uses:
    queue = sorted(passages, key=lambda text: hashlib.sha256(text.casefold().encode()).digest())
    uses: dict[str, list[str]] = {field.name: [] for field in fields(Uses)}
    start = 0
    for use, share in _SHARES[kind].items():
        count = min(_ENOUGH[use], int(share * len(queue)))
        uses[use] = queue[start : start + count]
        start += count
    dealt = {text for texts in uses.values() for text in texts}
    # Running text keeps the order of the files, so that neighbours stay neighbours.
    uses["running"] = [text for text in passages if text not in dealt]
    return Uses(**uses)
