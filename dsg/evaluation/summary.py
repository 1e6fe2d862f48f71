"""Turns per-sample values into the measurements of the report."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Float
from torch import Tensor

from dsg.evaluation import metrics
from dsg.evaluation.items import Item, Passage, Prompt, Question
from dsg.intervals import bootstrap, bootstrap_mean, wilson

TIE_MARGIN = 1e-5  # float32 logits of one text differ by as much between paddings

logger = logging.getLogger(__name__)

_SEPARATION = {
    "density_auroc": metrics.auroc,
    "density_tpr_at_5_fpr": metrics.tpr_at_fpr,
    "density_total_variation": metrics.total_variation,
}

AnyItem = TypeVar("AnyItem", bound=Item)


@dataclass(frozen=True)
class Measurement:
    """One number of the report with its 95 % interval (`None` where there is none).

    Attributes:
        domain: What it was measured on.
        metric: Such as `accuracy`; the names are those of the results file.
        protocol: Of questions `cloze`, `lm_eval` or `dsg`, with a suffix where only some of them
            or another rule is meant; `passages`; `generation`.
        value: The number.
        n: Items behind it; questions about one fact in several wordings count once.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    domain: str
    metric: str
    protocol: str
    value: float
    n: int
    low: float | None = None
    high: float | None = None


def summarise(
    questions: Sequence[Question],
    question_values: Mapping[str, Float[Tensor, " n"]],
    passages: Sequence[Passage],
    passage_values: Mapping[str, Float[Tensor, " m"]],
    baseline: Mapping[str, Float[Tensor, " n"]] | None = None,
    forget_domains: Sequence[str] = ("forget",),
    prompts: Sequence[Prompt] = (),
    prompt_values: Mapping[str, Float[Tensor, " k"]] | None = None,
    own_nll: Float[Tensor, " k"] | None = None,
) -> list[Measurement]:
    """Turn per-sample values into measurements.

    Args:
        questions: The questions that were scored, in any order; all of one protocol.
        question_values: Their values in the order of the question ids.
        passages: The passages that were scored, in any order.
        passage_values: Their values in the order of the passage ids.
        baseline: Question values of the base model, for the alignment score.
        forget_domains: The domains to be forgotten so far. If they are not named `forget`, they are
            reported together under that name as well.
        prompts: The prompts that were continued, in any order.
        prompt_values: Their values in the order of the prompt ids.
        own_nll: Loss of what the unguarded model says to the same prompts.

    Returns:
        Of each domain and pool: accuracy, in all and per form; of questions without a form also
        the probability of the right answer, with letters the share of each and whether the accuracy
        lies below chance; trigger rate; perplexity of passages; ROUGE-L, repetition, loss and
        gibberish of continuations. How well the density tells forget from retain; alignment. What
        was not measured is left out.
    """
    ordered = in_id_order(questions)
    domains = _members(questions, forget_domains)
    measurements: list[Measurement] = []
    for domain, rows in domains.items():
        measurements += _accuracies(domain, ordered, rows, question_values)
        if ordered[rows[0]].form is None:
            measurements += _benchmark(domain, ordered, rows, question_values)
    if questions:
        counts = {domain: len(_facts(ordered, rows)) for domain, rows in domains.items()}
        measurements += _gate(domains, question_values, questions[0].protocol, counts)
    passage_domains = _members(passages, forget_domains)
    for domain, rows in passage_domains.items():
        losses = passage_values["nll_sum"][rows].tolist()
        counts = [int(count) for count in passage_values["num_tokens"][rows]]
        if sum(counts):
            estimate = metrics.perplexity(losses, counts)
            measurements.append(Measurement(domain, "perplexity", "passages", **vars(estimate)))
    measurements += _gate(passage_domains, passage_values, "passages")
    if prompt_values:
        prompt_domains = _members(prompts, forget_domains)
        for domain, rows in prompt_domains.items():
            measurements += _continuations(domain, rows, prompt_values)
            if own_nll is not None and not all(math.isnan(loss) for loss in own_nll[rows]):
                own, losses = own_nll[rows].tolist(), prompt_values["nll"][rows].tolist()
                rate = metrics.gibberish_rate(losses, own)
                measurements.append(
                    Measurement(domain, "gibberish_rate", "generation", **vars(rate))
                )
        measurements += _gate(prompt_domains, prompt_values, "generation")
    if baseline is not None and {"forget", "retain"} <= domains.keys():
        measurements.append(_alignment(ordered, domains, question_values, baseline))
    return measurements


def in_id_order(items: Sequence[AnyItem]) -> list[AnyItem]:
    """The order in which per-sample values come."""
    return sorted(items, key=lambda item: item.id)


def named_twice(names: Iterable[tuple[str, str | None]]) -> set[str]:
    """Domains that are the whole of a pool, whose numbers are theirs as well.

    Args:
        names: Domain and pool of each item.
    """
    members: dict[str, set[str]] = {}
    for domain, pool in names:
        members.setdefault(pool or domain, set()).add(domain)
    alone = {next(iter(domains)) for pool, domains in members.items() if domains != {pool}}
    return {domain for domain in alone if _only_pool(domain, members)}


def _only_pool(domain: str, members: Mapping[str, set[str]]) -> bool:
    return [domains for domains in members.values() if domain in domains] == [{domain}]


def _alignment(
    questions: Sequence[Question],
    domains: Mapping[str, list[int]],
    values: Mapping[str, Tensor],
    baseline: Mapping[str, Tensor],
) -> Measurement:
    """The score with the bootstrap's interval over whole facts, each with both models' answers."""
    chance = _chance(questions)

    def score(retain: np.ndarray, forget: np.ndarray) -> float:
        retain_sums, forget_sums = retain.sum(axis=0), forget.sum(axis=0)
        retained, base_retained = (retain_sums[:2] / retain_sums[2]).tolist()
        forgotten, base_forgotten = (forget_sums[:2] / forget_sums[2]).tolist()
        return metrics.alignment(retained, forgotten, base_retained, base_forgotten, chance)

    # Per fact: answered rightly, rightly by the base model, questions.
    right, base_right = values["correct"], baseline["correct"]
    groups = [
        np.array(
            [
                [right[rows].sum().item(), base_right[rows].sum().item(), len(rows)]
                for rows in _facts(questions, domains[domain])
            ]
        )  # [facts, 3]
        for domain in ("retain", "forget")
    ]
    size, ends = sum(map(len, groups)), bootstrap(score, *groups)
    protocol = questions[0].protocol
    return Measurement("forget", "alignment", protocol, score(*groups), size, *ends)


def _facts(questions: Sequence[Question], rows: Sequence[int]) -> list[list[int]]:
    """The rows about each fact; questions of no known fact stand for themselves."""
    facts: dict[tuple[bool, int], list[int]] = {}
    for row in rows:
        fact = questions[row].fact
        facts.setdefault((fact is None, row if fact is None else fact), []).append(row)
    return list(facts.values())


def _chance(questions: Sequence[Question]) -> float:
    return 1 / max(question.num_answers for question in questions)


def _members(items: Sequence[Item], forget_domains: Sequence[str]) -> dict[str, list[int]]:
    """Positions (in id order) of the items of each reported domain and pool."""
    members: dict[str, list[int]] = {}
    pooled: dict[str, list[int]] = {}
    for position, item in enumerate(in_id_order(items)):
        members.setdefault(item.domain, []).append(position)
        if item.pool is not None:
            pooled.setdefault(item.pool, []).append(position)
        if item.domain in forget_domains:
            pooled.setdefault("forget", []).append(position)
        is_forget = item.domain in forget_domains or item.pool == "forget"
        if is_forget and item.shown is not None:
            part = "forget_shown" if item.shown else "forget_unshown"
            pooled.setdefault(part, []).append(position)
    return dict(sorted((members | pooled).items()))


def _accuracies(
    domain: str, questions: Sequence[Question], rows: list[int], values: Mapping[str, Tensor]
) -> list[Measurement]:
    protocol = questions[rows[0]].protocol
    by_protocol = {protocol: rows}
    for row in rows:
        if questions[row].form is not None:
            by_protocol.setdefault(f"{protocol}_{questions[row].form}", []).append(row)
    num_ties = int((values["margin"][rows].abs() < TIE_MARGIN).sum())
    if num_ties:
        logger.warning(
            "%d of %d questions of %r are ties: two options differ by less than %g nats.",
            num_ties,
            len(rows),
            domain,
            TIE_MARGIN,
        )
    right = values["correct"]
    return [
        _proportion(domain, "accuracy", name, right[members], len(_facts(questions, members)))
        for name, members in by_protocol.items()
    ]


def _benchmark(
    domain: str, questions: Sequence[Question], rows: list[int], values: Mapping[str, Tensor]
) -> list[Measurement]:
    """Probability of the right answer, below-chance flag, and accuracy by other rules or shares."""
    protocol = questions[rows[0]].protocol
    probability = bootstrap_mean(values["correct_probability"][rows].tolist())
    measurements = [Measurement(domain, "correct_probability", protocol, **vars(probability))]
    members = [questions[row] for row in rows]
    n = len(_facts(questions, rows))
    flag = metrics.below_chance(_mean(values["correct"][rows]) * n, n, _chance(members))
    measurements.append(Measurement(domain, "below_chance", protocol, float(flag), n))
    if protocol == "cloze":
        return [
            *measurements,
            _proportion(domain, "accuracy", "cloze_plain", values["correct_plain"][rows], n),
            _proportion(domain, "accuracy", "cloze_chars", values["correct_chars"][rows], n),
        ]
    places = range(max(question.num_answers for question in members))
    shares = [(values["chosen"][rows] == place).double() for place in places]
    measurements += [
        _proportion(domain, f"chosen_{place}", protocol, share, n)
        for place, share in zip(places, shares, strict=True)
    ]
    return measurements


def _continuations(domain: str, rows: list[int], values: Mapping[str, Tensor]) -> list[Measurement]:
    measurements = []
    for metric in ("rouge_l", "rouge_l_recall", "repetition", "nll"):
        numbers = [value for value in values[metric][rows].tolist() if not math.isnan(value)]
        if numbers:
            estimate = bootstrap_mean(numbers)
            measurements.append(Measurement(domain, metric, "generation", **vars(estimate)))
    return measurements


def _gate(
    domains: Mapping[str, list[int]],
    values: Mapping[str, Tensor],
    protocol: str,
    counts: Mapping[str, int] | None = None,
) -> list[Measurement]:
    """Trigger rates and density AUROC; nothing if no guard was attached."""
    if not domains or bool(values["density"].isnan().any()):
        return []
    counts = counts or {domain: len(rows) for domain, rows in domains.items()}
    measurements = [
        _proportion(domain, "trigger_rate", protocol, values["triggered"][rows], counts[domain])
        for domain, rows in domains.items()
    ]
    if {"forget", "retain"} <= domains.keys():
        high, low = (values["density"][domains[name]].tolist() for name in ("forget", "retain"))
        sizes = counts["forget"], counts["retain"]
        measurements += [
            Measurement("forget", name, protocol, **vars(measure(high, low, sizes=sizes)))
            for name, measure in _SEPARATION.items()
        ]
    return measurements


def _proportion(domain: str, metric: str, protocol: str, outcomes: Tensor, n: int) -> Measurement:
    """A share of the outcomes, with the interval of `n` independent ones."""
    share = _mean(outcomes)
    estimate = wilson(share * n, n)
    return Measurement(domain, metric, protocol, share, n, estimate.low, estimate.high)


def _mean(outcomes: Tensor) -> float:
    return math.fsum(outcomes.tolist()) / len(outcomes)
