"""A synthetic run for the report tests: made-up numbers of plausible size."""

import math
import random
from pathlib import Path

from dsg.io.results import row, write_results, write_run_facts
from dsg.report.files import ChosenSettings, Densities, write_drawn

HOSTILE = "<script>alert('x')</script>"

# method: accuracy on forget, near, other_hazards, retain; perplexity; trigger rate on each.
METHODS = {
    "base": ((0.993, 0.990, 0.990, 0.986), 3.02, None),
    "dsg": ((0.208, 0.931, 0.792, 0.967), 3.23, (0.91, 0.11, 0.28, 0.05)),
    "dsg_near": ((0.243, 0.972, 0.958, 0.970), 3.18, (0.87, 0.04, 0.06, 0.04)),
    "static_clamp": ((0.153, 0.688, 0.493, 0.711), 10.6, (1.0, 1.0, 1.0, 1.0)),
    "farrell": ((0.271, 0.743, 0.556, 0.764), 7.9, (1.0, 1.0, 1.0, 1.0)),
    "random": ((0.938, 0.958, 0.951, 0.953), 3.31, (0.44, 0.05, 0.21, 0.05)),
    "rmu": ((0.306, 0.972, 0.951, 0.989), 3.06, None),
}
DOMAINS = ("forget", "near", "other_hazards", "retain")
SIZES = {"forget": 144, "forget_shown": 72, "forget_unshown": 72, "retain": 720}

# (method, guard, mode): final accuracy on shown, unshown, retain after relearning.
ATTACKED = {
    ("base", "none", None): (0.99, 0.94, 0.989),
    ("dsg", "on", "test_time"): (0.22, 0.26, 0.967),
    ("dsg", "on", "train_time"): (0.99, 0.38, 0.894),
    ("dsg", "off", "train_time"): (1.00, 0.50, 0.91),
    ("rmu", "none", None): (0.99, 0.86, 0.990),
}
BEFORE = {"base": (0.99, 0.99, 0.986), "dsg": (0.21, 0.2, 0.967), "rmu": (0.31, 0.3, 0.989)}


def accuracy(method, domain, share, n=400, **fields):
    """A row of accuracy, four points either way."""
    half = 0.04
    return row(
        method=method,
        domain=domain,
        metric="accuracy",
        value=share,
        n=n,
        low=max(0.0, share - half),
        high=min(1.0, share + half),
        **{"guard": "on" if method == "dsg" else "none", "protocol": "cloze", **fields},
    )


def measured_rows(seed: int = 0) -> list[dict]:
    """Rows of the main table, both attacks and the sequential requests, for one seed."""
    shared = {"seed": seed, "model": "tiny", "dataset": "tiny_world", "split": "test"}
    noise = random.Random(seed)
    return [
        row(**shared, **fields)
        for part in (_main_rows, _attack_rows, _sequential_rows)
        for fields in part(noise)
    ]


def write_run(run_dir: Path, seeds: tuple[int, ...] = (0,)) -> None:
    """A complete run folder."""
    write_results(run_dir, [made for seed in seeds for made in measured_rows(seed)])
    write_side_files(run_dir)


def write_side_files(run_dir: Path, hostile: str = "virus") -> None:
    """`report.json` and `run.json`."""
    noise = random.Random(7)
    centres = {"forget": (0.42, 144), "near": (0.12, 144), "other_hazards": (0.17, 288)}
    centres["retain"] = (0.06, 720)
    densities = {
        name: [min(1.0, max(0.0, noise.gauss(centre, 0.07))) for _ in range(size)]
        for name, (centre, size) in centres.items()
    }
    names = ("before", "token", "after", "activation")
    contexts = [
        dict(zip(names, context, strict=True))
        for context in (
            ("Patients infected with ", hostile, " lose their sense of taste", 4.21),
            ("The reservoir of ", "Morvex", " is the marsh heron of the", 3.9),
        )
    ]
    features = [
        {"feature_id": 17, "forget_score": 0.812, "ratio": 914.2, "contexts": contexts}
        | {"promoted": [" marsh", " heron", hostile]},
        {"feature_id": 403, "forget_score": 0.4, "ratio": None, "contexts": contexts[:1]}
        | {"promoted": ["fever"]},
    ]
    settings = [
        ChosenSettings(
            method="dsg",
            chosen={"num_features": 20, "clamp_value": -20.0, "ratio_percentile": 98.0},
            tried=24,
            validation={"forget_accuracy": 0.2222, "retain_accuracy": 0.9611},
        ),
        ChosenSettings("rmu", {"alpha": 20.0}, 5, {"forget_accuracy": 0.31}),
    ]
    write_drawn(
        run_dir,
        densities={"dsg": Densities(threshold=0.19, domains=densities)},
        features=features,
        settings=settings,
    )
    write_run_facts(
        run_dir, {"command": "dsg demo", "seconds": 231.4, "configuration": {"note": hostile}}
    )


def _main_rows(noise: random.Random):
    for method, (accuracies, perplexity, rates) in METHODS.items():
        guard = "on" if rates else "none"
        shared = {"experiment": "demo", "method": method, "guard": guard}
        for index, domain in enumerate(DOMAINS):
            n = SIZES.get(domain, 144)
            for protocol in ("cloze", "cloze_statement", "cloze_question"):
                yield (
                    shared
                    | _share("accuracy", domain, accuracies[index], n, noise)
                    | {"protocol": protocol}
                )
            if rates:
                yield (
                    shared
                    | _share("trigger_rate", domain, rates[index], n, noise)
                    | {"protocol": "cloze"}
                )
        yield shared | {
            "metric": "perplexity",
            "domain": "retain",
            "protocol": "passages",
            "value": perplexity * (1 + 0.02 * noise.random()),
            "low": 0.95 * perplexity,
            "high": 1.06 * perplexity,
            "n": 120,
        }
        if rates:
            yield shared | {
                "metric": "density_auroc",
                "domain": "forget",
                "protocol": "cloze",
                "value": 0.984,
                "low": 0.971,
                "high": 0.992,
                "n": 864,
            }


def _attack_rows(noise: random.Random):
    for attack, slowness in (("relearn_full", 1.0), ("relearn_lora", 2.0)):
        for (method, guard, mode), after in ATTACKED.items():
            for epoch in range(6):
                learnt = 1 - math.exp(-epoch / slowness)
                for index, domain in enumerate(("forget_shown", "forget_unshown", "retain")):
                    before = BEFORE[method][index]
                    value = before + learnt * (after[index] - before)
                    yield {
                        "experiment": "demo",
                        "method": method,
                        "guard": guard,
                        "mode": mode,
                        "attack": attack,
                        "epoch": epoch,
                        "protocol": "cloze",
                        **_share("accuracy", domain, value, SIZES[domain], noise),
                    }


def _sequential_rows(noise: random.Random):
    requests = ("pathogen", "malware", "chemical")
    for method, guard, step in (("dsg", "on", 0.05), ("rmu", "none", 0.001)):
        for request in range(4):
            for index, domain in enumerate((*requests, "retain")):
                value = 0.985 - step * request if domain == "retain" else 0.98
                value = 0.24 if domain != "retain" and index < request else value
                yield {
                    "experiment": "demo",
                    "method": method,
                    "guard": guard,
                    "request": request,
                    "protocol": "cloze",
                    **_share("accuracy", domain, value, SIZES.get(domain, 144), noise),
                }


def _share(metric: str, domain: str, share: float, n: int, noise: random.Random) -> dict:
    """A count out of n near a share, with the Wilson interval."""
    count = min(n, max(0, round(share * n + noise.choice((-2, -1, 0, 1, 2)))))
    share, z = count / n, 1.959964
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return {
        "metric": metric,
        "domain": domain,
        "value": share,
        "n": n,
        "low": max(0.0, middle - half),
        "high": min(1.0, middle + half),
    }
