"""Tiny copies of MUSE and TOFU in the hub's layouts."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.hub_folders import write_dataset

RAW_WORDS = 40


def sentence(*numbers: int) -> str:
    """A text of the tiny tokenizer's words."""
    return " ".join(f"w{number % 26}" for number in numbers)


def write_muse(folder: Path, num: int = 5) -> Path:
    """`muse-bench/MUSE-News`, with `num` items of each kind."""

    def texts(start: int, count: int, words: int) -> list[dict[str, str]]:
        return [
            {"text": sentence(*(start + index + step * (index + 2) for step in range(words)))}
            for index in range(count)
        ]

    def pairs(start: int, count: int) -> list[dict[str, str]]:
        return [
            {"question": sentence(start, index, index + 3), "answer": sentence(index + 1, start)}
            for index in range(count)
        ]

    verbatim = [
        {"prompt": sentence(1, 2, index, index + 7), "gt": sentence(*range(index, index + 9))}
        for index in range(num)
    ]
    folds = {f"forget_{number}": texts(number, 2 * number, 12) for number in (1, 2, 3, 4)}
    raw = {
        "forget": texts(0, num, RAW_WORDS),
        "retain1": texts(9, 3 * num, RAW_WORDS),
        "retain2": texts(17, num, RAW_WORDS),
        "holdout": texts(21, num, RAW_WORDS),
    }
    return write_dataset(
        folder,
        {
            "knowmem": {
                "forget_qa": pairs(3, num),
                "forget_qa_icl": pairs(11, 2),
                "retain_qa": pairs(5, num + 1),
                "retain_qa_icl": pairs(13, 2),
            },
            "verbmem": {"forget": verbatim},
            "privleak": {
                "forget": texts(0, num, 14),
                "retain": texts(17, num, 14),
                "holdout": texts(21, num, 14),
            },
            "raw": raw,
            "scal": folds,
            "sust": {name: texts(30 + place, 3, 12) for place, name in enumerate(folds)},
            "train": {name: raw[name] for name in ("forget", "retain1", "retain2")},
        },
    )


def write_tofu(folder: Path, num: int = 6) -> Path:
    """`locuslab/TOFU`, which comes as JSON lines: `num` forget pairs, three times as many others.

    The last `num` of the retain pairs are evaluated.
    """

    def pair(number: int) -> dict[str, str]:
        return {"question": sentence(number, 2, 3 * number), "answer": sentence(number, 5, number)}

    def asked(number: int, num_wrong: int, **more: str) -> dict[str, Any]:
        wrong = [sentence(number, 6 + place, number) for place in range(num_wrong)]
        return {**pair(number), "perturbed_answer": wrong, **more}

    whole = [pair(number) for number in range(4 * num)]
    paraphrased = [
        asked(
            number,
            5,
            paraphrased_answer=sentence(5, number),
            paraphrased_question=sentence(3, number),
        )
        for number in range(4 * num)
    ]
    configs = {
        "full": whole,
        "forget10": whole[:num],
        "retain90": whole[num:],
        "forget10_perturbed": paraphrased[:num],
        "retain_perturbed": paraphrased[3 * num :],
        "real_authors_perturbed": [asked(number, 3) for number in range(40, 43)],
        "world_facts_perturbed": [asked(number, 3) for number in range(50, 54)],
    }
    return write_json_dataset(folder, configs)


def write_json_dataset(folder: Path, configs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    """Write one JSON-lines file per configuration, and a card that lists them."""
    folder.mkdir(parents=True)
    lines = ["---", "configs:"]
    for config, rows in configs.items():
        lines += [f"- config_name: {config}", f"  data_files: {config}.json"]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{config}.json").write_text(text, encoding="utf-8")
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")
    return folder
