"""The runs of `configs/reproduce`: a method's file and a data file, once also other settings."""

from pathlib import Path

FOLDER = Path(__file__).parents[1] / "configs" / "reproduce"

_METHODS = ("dsg", "farrell", "ga", "npo", "rmu", "scrub", "ssd")
_PAIRS = [
    *((method, f"wmdp_{data}") for method in _METHODS for data in ("bio", "cyber")),
    *((f"muse_{method}", "muse_news") for method in ("ga", "grad_diff", "npo", "rmu", "simnpo")),
    ("dsg", "muse_books"),
    ("dsg", "muse_news"),
    ("zero_shot", "zero_shot_bio"),
    ("zero_shot", "zero_shot_cyber"),
    ("clamp_prime", "dont_forget_it"),
    ("refusal_clamp", "dont_forget_it"),
    ("relearn_full", "wmdp_bio"),
    ("relearn_rmu", "wmdp_bio"),
]
_SETTINGS = {("dsg", "wmdp_cyber"): "table_10", ("dsg", "muse_news"): "table_2_news"}


def _files(method: str, data: str) -> list[Path]:
    names = [method, f"data/{data}"]
    if (method, data) in _SETTINGS:
        names.append(f"settings/{_SETTINGS[method, data]}")
    return [FOLDER / f"{name}.yaml" for name in names]


RUNS = {f"{method}_{data}": _files(method, data) for method, data in _PAIRS}
"""Name of a run -> its configurations, the last on top."""
