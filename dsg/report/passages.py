"""What the numbers of a run without questions say, in sentences, whichever way they fall."""

from collections.abc import Iterator
from typing import Literal

from dsg.report.headline import ATTACKS
from dsg.report.measurements import Cell, Measurements, method_name
from dsg.report.sentences import Finding
from dsg.report.tables import percent


def passage_findings(measurements: Measurements) -> list[Finding]:
    """All sentences that the measurements support, part by part of the passages."""
    found: list[Finding] = []
    for title, group in measurements.groups():
        static = group.static()
        if {"base", "dsg"} <= set(static.distinct("method")):
            place = title.rpartition("/")[2]
            found += [*_gate(static, place), *_continuation(static, place), *_loss(static, place)]
    for attack, name in ATTACKS.items():
        found += _relearning(measurements.where(attack=attack, metric="perplexity"), name)
    return found


def _gate(static: Measurements, place: str) -> Iterator[Finding]:
    guarded = static.where(method="dsg", guard="on")
    area = guarded.cell(metric="density_auroc")
    hit, false = (
        guarded.cell(metric="trigger_rate", domain=domain) for domain in ("forget", "retain")
    )
    if area and hit and false:
        yield Finding(
            f"The density tells {place} forget passages from {place} retain passages with an AUROC "
            f"of {area.value:.3f}; the gate triggers on {percent(hit.value)} of the forget "
            f"passages and on {percent(false.value)} of the retain passages.",
            "for" if hit.value - false.value > 0.5 else "against",
        )


def _continuation(static: Measurements, place: str) -> Iterator[Finding]:
    rows = static.where(metric="rouge_l")
    # Passages that nobody has memorised cannot be forgotten.
    if place != "memorised" or not rows.rows:
        return
    for domain in ("forget", "retain"):
        cells = rows.where(domain=domain)
        plain, guarded = cells.cell(method="base"), cells.cell(method="dsg", guard="on")
        if not (plain and guarded):
            continue
        apart = not _overlap(plain, guarded)
        good = guarded.value < plain.value and apart if domain == "forget" else not apart
        yield Finding(
            f"Continued verbatim, {place} {domain} passages reach a ROUGE-L of "
            f"{guarded.value:.3f} with the guard and {plain.value:.3f} without"
            f"{'' if apart else ' (the intervals overlap)'}.",
            "for" if good else "against",
        )


def _loss(static: Measurements, place: str) -> Iterator[Finding]:
    rows = static.where(metric="perplexity").excluding(guard="off")
    for method in ("dsg", "static_clamp", "random"):
        cells = {
            (state, domain): rows.where(method=name).cell(domain=domain)
            for state, name in (("plain", "base"), ("guarded", method))
            for domain in ("forget", "retain")
        }
        if not all(cells.values()):
            continue
        grown = {
            domain: cells["guarded", domain].value / cells["plain", domain].value  # pyright: ignore
            for domain in ("forget", "retain")
        }
        name = "The guard" if method == "dsg" else f"Control, {method_name(method).lower()}: it"
        yield Finding(
            f"{name} multiplies the perplexity of {place} forget passages by "
            f"{grown['forget']:.2f} and that of {place} retain passages by {grown['retain']:.2f}.",
            "caution" if method != "dsg" else _side(grown["forget"] > 1.1 * grown["retain"]),
        )


def _relearning(attacked: Measurements, name: str) -> Iterator[Finding]:
    epochs = attacked.distinct("epoch")
    if not epochs:
        return
    last = attacked.where(method="dsg", epoch=epochs[-1])
    for mode, when in (("test_time", "put on afterwards"), ("train_time", "on meanwhile")):
        rows = last.where(mode=mode)
        for domain, what in (("forget_shown", "shown"), ("forget_unshown", "not shown")):
            on, off = (rows.where(guard=state).cell(domain=domain) for state in ("on", "off"))
            if on and off:
                yield Finding(
                    f"After {name} on forget passages, the perplexity of those {what} is "
                    f"{on.value:.3g} with the guard {when} and {off.value:.3g} without it.",
                    _side(on.value > 2 * off.value),
                )


def _side(speaks_for: bool) -> Literal["for", "against"]:
    return "for" if speaks_for else "against"


def _overlap(first: Cell, second: Cell) -> bool:
    ends = (first.low, first.high, second.low, second.high)
    if any(end is None for end in ends):
        return True
    return max(first.low, second.low) <= min(first.high, second.high)  # pyright: ignore
