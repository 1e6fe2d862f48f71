"""What stands in `results.jsonl` and how people read it: columns, metrics, domains and methods.

The page, the printed tables and `table.csv` ask here, and the README of this folder lists it all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dsg.intervals import Estimate, mean_interval

COLUMNS = {
    "experiment": "the study that the run belongs to",
    "method": "what makes the model forget",
    "guard": "`none`: the run has no guard; `on`, `off`: with and without it",
    "mode": "`test_time`: the attacker trained without the guard; `train_time`: with it",
    "attack": "what attacked the model",
    "epoch": "after how many epochs of the attack or the training",
    "request": "after how many forget requests; 0 is the state before the first",
    "seed": "of the run",
    "model": "the model's label",
    "dataset": "what the items come from",
    "domain": "`forget`, `near`, `retain` or a data set's name; `forget_shown`, `forget_unshown`: "
    "facts that the attacker's text states, and the others",
    "split": "`validation` chooses settings, `test` is reported",
    "protocol": "how it was asked",
    "metric": "what was measured",
    "value": "the number",
    "n": "how many items stand behind it",
    "low": "lower end of its 95 % interval",
    "high": "upper end of its 95 % interval",
}

# Others are parts of these (forms of questions, other rules) or a benchmark's own.
PROTOCOLS = ("cloze", "lm_eval", "dsg", "passages", "generation", "prediction")

Better = Literal["higher", "lower", "by domain"] | None


@dataclass(frozen=True)
class Metric:
    """One value of the column `metric`.

    Attributes:
        meaning: What is counted or averaged.
        low: Lowest value that there is.
        high: Highest value that there is.
        better: `by domain`: higher where knowledge is kept, lower where it is to be forgotten. None
            for what only describes.
        unit: `%` for shares that people read in percent.
        is_ratio: Differences count as factors: means are geometric and intervals those of the
            logarithm.
    """

    meaning: str
    low: float = -math.inf
    high: float = math.inf
    better: Better = None
    unit: str = ""
    is_ratio: bool = False


def _share(meaning: str, better: Better = None, unit: str = "") -> Metric:
    return Metric(meaning, 0.0, 1.0, better, unit)


# What people look for first stands first; the rest by name.
METRICS = {
    "accuracy": _share("questions answered right", "by domain", "%"),
    "alignment": _share(
        "chance-corrected retain accuracy kept × forget accuracy lost, both relative to no "
        "unlearning",
        "higher",
    ),
    "mt_bench": Metric("mean rating of both turns by the judge, 1 to 10", better="higher"),
    "verbmem": Metric("ROUGE-L of verbatim continuations, × 100 (MUSE)", better="lower"),
    "knowmem": Metric("ROUGE-L of answers, × 100 (MUSE)", better="by domain"),
    "privleak": Metric("`min_k_auc` beside the retrained model's; 0 is best (MUSE)", unit="%"),
    "forget_quality": _share(
        "p-value: could the truth ratios be those of a model that never saw the text? (TOFU)",
        "higher",
    ),
    "model_utility": _share(
        "harmonic mean of probability, ROUGE and truth ratio of what is kept (TOFU)", "higher"
    ),
    "perplexity": Metric("exp of the mean loss per token", 1.0, better="by domain", is_ratio=True),
    "rouge_l": _share("ROUGE-L F1 of continuations and the text's own", "by domain"),
    "trigger_rate": _share("sequences on which the gate triggers", "by domain", "%"),
    "changed_rate": _share("texts whose continuation the guard changes", unit="%"),
    "density_auroc": _share("how well density tells forget from retain items", "higher"),
    "below_chance": _share("1 where accuracy lies below chance (one-sided test at 5 %)"),
    "chosen_0": _share("questions answered with the first letter; `chosen_1` and so on alike"),
    "collateral_damage": Metric(
        "accuracy on facts not shown that the weights lack beside the attacked base model",
        -1.0,
        1.0,
        "lower",
        "%",
    ),
    "correct_probability": _share("mean probability of the right answer", "by domain"),
    "cut_off": _share("answers as long as the limit"),
    "density_total_variation": _share(
        "distance of the forget and retain histograms of the density", "higher"
    ),
    "density_tpr_at_5_fpr": _share(
        "forget items above the threshold that 5 % of the retain items exceed", "higher"
    ),
    "drift_cosine": Metric("mean cosine of activations now and before training", -1.0, 1.0),
    "drift_norm_ratio": Metric("mean norm of activations now over before", 0.0, is_ratio=True),
    "epochs_to_half": Metric("epochs until half of what was forgotten is back", 0.0, unit="epochs"),
    "false_positive_rate": _share("held-out retain texts on which the gate triggers", "lower", "%"),
    "forget_trigger_rate": _share(
        "held-out forget texts on which the gate triggers", "higher", "%"
    ),
    "gibberish_rate": _share("answers with a loss beyond the unguarded model's usual", "lower"),
    "judge_failures": Metric("judgements without a rating", 0.0, better="lower"),
    "kept_correct": _share("questions answered right in every order of their choices"),
    "kept_correct_iff_question": _share("of these, those not always right without the question"),
    "kept_no_tricks": _share("of these, those whose choices refer to no other choice"),
    "ks_statistic": _share("distance of the truth ratios from the retained model's", "lower"),
    "min_k_auc": _share("how well Min-K % tells holdout from forget texts"),
    "mt_bench_repeat_sd": Metric("standard deviation of the score over repeats", 0.0),
    "nll": Metric("loss of the unguarded model on what was said, nats per token", 0.0, unit="nats"),
    "probability": _share("probability of the answer per token (TOFU)", "by domain"),
    "recovery_area": _share("mean share of what was forgotten that is back", "lower"),
    "repetition": _share("repeated 4-grams of what was said", "lower"),
    "rouge_l_recall": _share("ROUGE-L recall of answers, stemmed (TOFU)", "by domain"),
    "seconds_to_unlearn": Metric("time of unlearning", 0.0, unit="s", is_ratio=True),
    "threshold": Metric("statistic above which the gate triggers"),
    "truth_ratio": Metric("how clearly right is told from wrong (TOFU)", 0.0, better="higher"),
    "unlearning_score": _share(
        "forget questions answered wrong at 99 % of the utility, chosen on the other half", "higher"
    ),
}

DOMAINS = {
    "forget": "forget",
    "forget_shown": "forget, shown to the attacker",
    "forget_unshown": "forget, not shown",
    "near": "near domain",
    "other_hazards": "other hazards",
    "retain": "retain (distant)",
}

# Here, not on the objectives and recipes, because a page of results is made without PyTorch.
METHODS = {
    "base": "No unlearning",
    "dsg": "DSG",
    "dsg_near": "DSG, near data in calibration",
    "dsg_documents": "DSG, threshold from documents",
    "dsg_window": "DSG, window gate",
    "dsg_cusum": "DSG, CUSUM gate",
    "static_clamp": "Static clamp",
    "farrell": "Farrell et al.",
    "clamp_prime": "Clamp Prime",
    "refusal_clamp": "Refusal Clamp",
    "random": "Random features",
    "rmu": "RMU",
    "ga": "Gradient ascent",
    "grad_diff": "GradDiff",
    "npo": "NPO",
    "simnpo": "SimNPO",
    "scrub": "SCRUB",
    "ssd": "SSD",
    "task_vector": "Task vector",
}


@dataclass(frozen=True)
class Column:
    """A metric on a domain, as tables that compare methods show it.

    Attributes:
        title: Heading on a page.
        short: Heading in a terminal; empty for what is left out there.
        metric: One of `METRICS`.
        domains: The first that has the metric counts; None is any.
    """

    title: str
    short: str
    metric: str
    domains: tuple[str | None, ...]


COMPARED = (
    Column("Forget accuracy", "forget", "accuracy", ("forget",)),
    Column("Near-domain accuracy", "near", "accuracy", ("near",)),
    Column("Other-hazards accuracy", "", "accuracy", ("other_hazards",)),
    Column("Retain accuracy", "retain", "accuracy", ("retain",)),
    Column("Alignment", "align.", "alignment", ("forget", "retain", None)),
    Column("Forget perplexity", "forget\nppl", "perplexity", ("forget",)),
    Column("Retain perplexity", "ppl", "perplexity", ("retain",)),
    Column("Forget ROUGE-L", "forget\nR-L", "rouge_l", ("forget",)),
    Column("Retain ROUGE-L", "retain\nR-L", "rouge_l", ("retain",)),
    Column("Gate true positives (forget)", "TPR", "trigger_rate", ("forget",)),
    Column("Gate false positives (retain)", "FPR", "trigger_rate", ("retain",)),
    Column("Gate false positives (near)", "", "trigger_rate", ("near",)),
    Column("Gate triggers (other hazards)", "", "trigger_rate", ("other_hazards",)),
    Column("Density AUROC", "AUROC", "density_auroc", ("forget", "retain", None)),
)
ATTACKED = (
    Column("Accuracy on shown facts", "shown", "accuracy", ("forget_shown",)),
    Column("Accuracy on facts not shown", "unshown", "accuracy", ("forget_unshown",)),
    Column("Retain accuracy", "retain", "accuracy", ("retain",)),
    Column("Area under the recovery", "area", "recovery_area", ("forget_shown",)),
    Column("Epochs to half of it", "half", "epochs_to_half", ("forget_shown",)),
    Column("Collateral damage", "damage", "collateral_damage", ("forget_unshown",)),
)


def metric_of(name: str) -> Metric:
    """What is known of a metric; of an unknown name that it is a number."""
    return METRICS["chosen_0"] if name.startswith("chosen_") else METRICS.get(name, Metric(""))


def method_name(method: str) -> str:
    """A method as people read it."""
    return METHODS.get(method, method)


def domain_name(domain: str) -> str:
    """A domain as people read it."""
    return DOMAINS.get(domain, domain)


def mean_over_runs(metric: str, values: Sequence[float]) -> Estimate:
    """Mean of a metric over independent runs (seeds, draws), with an interval on its own scale.

    Args:
        metric: Its name in the results.
        values: One number per run.

    Raises:
        UserError: There is no value.
    """
    scale = metric_of(metric)
    return mean_interval(values, low=scale.low, high=scale.high, is_ratio=scale.is_ratio)
