"""The metrics of MUSE: verbatim memorisation, knowledge memorisation, and privacy leakage.

All numbers are those of the official evaluation, in per cent. Lower VerbMem and KnowMem on forget
text is better, higher KnowMem on retain text is better, and PrivLeak should be 0: below it a member
of the forget set is still recognised, above it is conspicuously absent.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from dsg.errors import UserError
from dsg.evaluation.metrics import area_under_roc, checked_scores
from dsg.evaluation.summary import Measurement
from dsg.intervals import bootstrap, bootstrap_mean
from dsg.io import RESULTS_FILE, read_results

VERBMEM, KNOWMEM_FORGET, KNOWMEM_RETAIN = "verbmem_forget", "knowmem_forget", "knowmem_retain"
# Of the continuation, and of the true one with the bos token that the tokenizer adds: one word
# fewer, as in the official code.
VERBMEM_TOKENS = 128
KNOWMEM_TOKENS = 32
KNOWMEM_STOP = ("\n\n", "\nQuestion", "Question:")
AUC_METRIC = "min_k_auc"
PROTOCOL = "muse"

# AUC of the published retrained models (Min-40 % Prob).
OFFICIAL_AUC = {"muse_news": 0.4772, "muse_books": 0.5393}
OFFICIAL, SELF = "official", "self"

# Domain of the prompts -> domain and metric of their mean.
_ROUGE_MEANS = {
    VERBMEM: ("forget", "verbmem"),
    KNOWMEM_FORGET: ("forget", "knowmem"),
    KNOWMEM_RETAIN: ("retain", "knowmem"),
}


def knowmem_prompt(examples: Iterable[tuple[str, str]], question: str) -> str:
    """A question after examples of questions with answers, as the official evaluation writes it."""
    shown = "".join(f"Question: {asked}\nAnswer: {answer}\n\n" for asked, answer in examples)
    # It ends in a space, which many tokenizers make a token of its own: part of the protocol.
    return f"{shown}Question: {question}\nAnswer: "


def min_k_auc(forget: Sequence[float], holdout: Sequence[float]) -> float:
    """Probability that a holdout text has the higher Min-K % Prob; ties count half.

    Near 0 for a model that was trained on the forget texts, near 0.5 for one that was not.

    Args:
        forget: Mean log-probability of the least likely 40 % of the tokens of each forget text.
        holdout: The same of texts that no model was trained on.

    Raises:
        UserError: A group is empty or holds a NaN.
    """
    members, others = checked_scores("forget", forget), checked_scores("holdout", holdout)
    return area_under_roc(others, members)


def privleak(auc: float, retrained_auc: float) -> float:
    """How far the AUC is from the retrained model's, in per cent of the latter."""
    return (auc - retrained_auc) / retrained_auc * 100


def check_retrained(name: str, retrained: str | None) -> None:
    """Refuses to go without the retrained model's AUC.

    Args:
        name: The corpus, `muse_news` or `muse_books`.
        retrained: Run directory of the retrained model's evaluation, `official`, or `self` for
            that evaluation itself.

    Raises:
        UserError: It is None, or there are no official numbers for this corpus.
    """
    if retrained is None:
        raise UserError(
            "`retrained` must tell the retrained model's AUC, without which PrivLeak means "
            f"nothing, got none; {_remedy(name)}"
        )
    if retrained == OFFICIAL and name not in OFFICIAL_AUC:
        raise UserError(
            f"`retrained: official` is known for {sorted(OFFICIAL_AUC)} only, got {name!r}; "
            f"{_remedy(name)}"
        )


def retrained_auc(name: str, retrained: str, split: str, num_texts: int) -> float:
    """The AUC of the retrained model, as published or as measured by another run.

    Args:
        name: As for `check_retrained`.
        retrained: As for `check_retrained`, but not `self`.
        split: The split whose texts are measured now.
        num_texts: Forget and holdout texts of it.

    Raises:
        UserError: The run measured no such AUC, or one on other texts.
    """
    if retrained == OFFICIAL:
        return OFFICIAL_AUC[name]
    measured = read_results(retrained) if (Path(retrained) / RESULTS_FILE).is_file() else []
    rows = [
        row
        for row in measured
        if (row["metric"], row["dataset"]) == (AUC_METRIC, name) and row["guard"] in ("none", "off")
    ]
    matching = [row for row in rows if (row["split"], row["n"]) == (split, num_texts)]
    if not matching:
        seen = sorted({(row["split"], row["n"]) for row in rows})
        raise UserError(
            f"`retrained` must be a run that measured {AUC_METRIC} of {name} on the {num_texts} "
            f"texts of the {split} split, got {retrained!r} with {seen or 'none'}; {_remedy(name)}"
        )
    return matching[0]["value"]


def measure(
    prompts: Sequence[str],
    rouge_l: Float[Tensor, " n"],
    passages: Sequence[str],
    min_k: Float[Tensor, " m"],
    retrained: float | None,
) -> list[Measurement]:
    """The six numbers of one model, with bootstrap intervals.

    Args:
        prompts: Domain of each prompt, in the order of the ids.
        rouge_l: ROUGE-L F1 of each, in [0, 1].
        passages: Domain of each passage (`forget`, `holdout`, perhaps others).
        min_k: Mean log-probability of its least likely 40 % of tokens, in nats.
        retrained: The retrained model's AUC; None leaves PrivLeak out, because this is that model.
    """
    measurements = []
    for prompt_domain, (domain, metric) in _ROUGE_MEANS.items():
        rows = [row for row, name in enumerate(prompts) if name == prompt_domain]
        if rows:
            estimate = bootstrap_mean([100 * value for value in rouge_l[rows].tolist()])
            measurements.append(Measurement(domain, metric, PROTOCOL, **vars(estimate)))
    groups = [
        min_k[[row for row, name in enumerate(passages) if name == domain]].tolist()
        for domain in ("forget", "holdout")
    ]
    if not any(groups):
        return measurements
    auc, size = min_k_auc(*groups), sum(map(len, groups))
    low, high = bootstrap(min_k_auc, *groups)
    measurements.append(Measurement("forget", AUC_METRIC, PROTOCOL, auc, size, low, high))
    if retrained is not None:
        ends = (None if end is None else privleak(end, retrained) for end in (low, high))
        value = privleak(auc, retrained)
        measurements.append(Measurement("forget", "privleak", PROTOCOL, value, size, *ends))
    return measurements


def _remedy(name: str) -> str:
    corpus, made = name.removeprefix("muse_"), f"runs/finetune_{name}_retrained"
    model, run = f"{made}/model", f"runs/{name}_retrained"
    return (
        "make the model with `dsg fit -c configs/finetune/muse_retrained.yaml --data.corpus "
        f"{corpus} --run_dir {made}`, measure it with `dsg test -c configs/evaluate/{name}.yaml "
        f"--model.model_name {model} --data.model_name {model} --data.retrained {SELF} --run_dir "
        f"{run}` and give `retrained: {run}`, or ask for the published number with `retrained: "
        f"{OFFICIAL}`."
    )
