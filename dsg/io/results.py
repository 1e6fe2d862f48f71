"""Measurements on disk: `results.jsonl`, one row per measurement, and `run.json` beside it.

`results.jsonl` holds nothing but what was measured, so that two runs which measured the same write
the same bytes. Everything that may differ between such runs (times, host, versions, paths) goes to
`run.json`. "Identical results" means byte-identical `results.jsonl`.
"""

import importlib.metadata
import json
import math
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsg.errors import UserError
from dsg.io.atomic import write_atomically
from dsg.io.reading import parse_json, read_text

KEYS = (
    "experiment",
    "method",
    "guard",
    "mode",
    "attack",
    "epoch",
    "request",
    "seed",
    "model",
    "dataset",
    "domain",
    "split",
    "protocol",
    "metric",
    "value",
    "n",
    "low",
    "high",
)

RESULTS_FILE = "results.jsonl"
ITEMS_FILE = "items.parquet"
FACTS_FILE = "run.json"

_MEASURED = ("value", "low", "high")
_IDENTITY = tuple(key for key in KEYS if key not in (*_MEASURED, "n"))
_SIGNIFICANT_DIGITS = 6

_PACKAGES = (
    "dynamic-sae-guardrails",
    "torch",
    "lightning",
    "transformers",
    "tokenizers",
    "peft",
    "sae-lens",
    "torchmetrics",
    "numpy",
    "scipy",
    "datasets",
    "rouge-score",
    "lm-eval",
    "openai",
)

# The last word of the name decides, so that `hf_token` goes and `num_tokens` or `token_mask` stays.
_SECRET_NAME = re.compile(r"(token|api_?key|secret|password|passwd|credentials?)$", re.IGNORECASE)
# A secret also travels inside a command line (`--hf_token=...`) or as a bare Hugging Face token.
_SECRET_TEXT = re.compile(
    r"((?:token|api_?key|secret|password)\s*[=:]\s*)\S+|\bhf_[A-Za-z0-9]{16,}", re.IGNORECASE
)


def row(**fields: Any) -> dict[str, Any]:
    """One measurement with all of `KEYS`; keys not given are None.

    Args:
        **fields: Values for some of `KEYS`. `value`, `low` and `high` become floats of 6
            significant digits; a number that is not finite becomes None (nothing was measured).

    Raises:
        UserError: A key is unknown or a value is neither text, nor a number, nor None.
    """
    unknown = sorted(set(fields) - set(KEYS))
    if unknown:
        raise UserError(
            f"A result row has the unknown key(s) {', '.join(unknown)}; use only {', '.join(KEYS)}."
        )
    return {key: _plain(key, fields.get(key)) for key in KEYS}


def write_results(run_dir: str | Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write `results.jsonl`, sorted by `KEYS` (None first), in one atomic step.

    A row that comes twice with equal content is written once.

    Args:
        run_dir: Folder of the run; made if missing.
        rows: Measurements as `row` makes them; other mappings are passed through `row`.

    Returns:
        Path of the file.

    Raises:
        UserError: Two rows measure the same thing with different outcomes, or a row is malformed.
    """
    unique: dict[tuple, dict[str, Any]] = {}
    for fields in rows:
        candidate = row(**fields)
        identity = tuple(_sort_key(candidate[key]) for key in _IDENTITY)
        earlier = unique.setdefault(identity, candidate)
        if earlier != candidate:
            described = {key: earlier[key] for key in _IDENTITY if earlier[key] is not None}
            raise UserError(
                f"Two result rows measure the same thing, {described}, with the values "
                f"{earlier['value']} and {candidate['value']}; tell them apart by `experiment`."
            )
    lines = [
        json.dumps(unique[identity], ensure_ascii=False, allow_nan=False) + "\n"
        for identity in sorted(unique)
    ]
    return write_atomically(Path(run_dir) / RESULTS_FILE, "".join(lines))


def read_results(run_dir: str | Path) -> list[dict[str, Any]]:
    """Read the rows of `results.jsonl`, in the order of the file.

    Raises:
        UserError: The file is missing, or a line is not a JSON object with exactly `KEYS`.
    """
    path = Path(run_dir) / RESULTS_FILE
    if not path.is_file():
        raise UserError(
            f"run_dir {str(run_dir)!r} holds no {RESULTS_FILE}; give the folder of a finished run."
        )
    # Not `splitlines`: JSON may hold other line separators inside a string.
    lines = read_text(path).removesuffix("\n").split("\n")
    lines = [] if lines == [""] else lines
    return [_parse_line(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def write_run_facts(run_dir: str | Path, facts: Mapping[str, Any]) -> Path:
    """Write `run.json`: the given facts, package versions and host; secrets are left out.

    Args:
        run_dir: Folder of the run; made if missing.
        facts: Times, ranks, hashes, the full configuration. Entries whose name ends in `token`,
            `api_key`, `secret` or `password` are dropped at any depth. Values that JSON does not
            know are written as text.

    Returns:
        Path of the file.
    """
    content = {**facts, "versions": _versions(), "host": _host()}
    text = json.dumps(
        _without_secrets(content), indent=2, sort_keys=True, ensure_ascii=False, default=str
    )
    return write_atomically(Path(run_dir) / FACTS_FILE, text + "\n")


def read_run_facts(run_dir: str | Path) -> dict[str, Any]:
    """Read `run.json`; an empty dict if the run has none.

    Raises:
        UserError: The file is not a JSON object.
    """
    path = Path(run_dir) / FACTS_FILE
    if not path.is_file():
        return {}
    facts = parse_json(read_text(path), str(path), "delete it or run again")
    if not isinstance(facts, dict):
        raise UserError(f"{path} must hold a JSON object, got {type(facts).__name__}; run again.")
    return facts


def _plain(key: str, value: Any) -> Any:
    # 0-d tensors and NumPy scalars know how to become plain Python numbers.
    value = value.item() if hasattr(value, "item") else value
    if value is None or (isinstance(value, str) and key not in (*_MEASURED, "n")):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(
            f"Result key `{key}` takes {'' if key in (*_MEASURED, 'n') else 'text, '}a number or "
            f"None, got {value!r}; convert it first."
        )
    if not math.isfinite(value):
        return None
    if key in _MEASURED:
        return float(f"{value:.{_SIGNIFICANT_DIGITS}g}") + 0.0  # + 0.0 turns -0.0 into 0.0
    # 3 and 3.0 are the same epoch; write them alike.
    return int(value) if float(value).is_integer() else value


def _sort_key(value: Any) -> tuple:
    if value is None:
        return (0,)
    return (2, value) if isinstance(value, str) else (1, value)


def _parse_line(line: str, place: str) -> dict[str, Any]:
    fields = parse_json(line, place, "mend or delete the line")
    if not isinstance(fields, dict) or set(fields) != set(KEYS):
        keys = set(fields) if isinstance(fields, dict) else set()
        missing, unknown = sorted(set(KEYS) - keys), sorted(keys - set(KEYS))
        raise UserError(
            f"{place} must be a JSON object with exactly the {len(KEYS)} result keys; "
            f"missing {missing}, unknown {unknown}; write it with `dsg.io.results.write_results`."
        )
    try:
        return row(**fields)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def _without_secrets(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {str(name): item for name, item in value.items()}
        return {
            name: _without_secrets(item)
            for name, item in kept.items()
            if not _SECRET_NAME.search(name)
        }
    if isinstance(value, str):
        return _SECRET_TEXT.sub(lambda found: (found[1] or "") + "[removed]", value)
    if isinstance(value, Sequence):
        return [_without_secrets(item) for item in value]
    return value


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _host() -> dict[str, Any]:
    import torch  # here, because reading results needs no torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "platform": platform.platform(),
        "machine": platform.machine(),
        "num_cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus,
    }
