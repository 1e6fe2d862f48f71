"""What the attacks of a grid bring back: the best learning rate of each attacker, and how fast."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsg.errors import UserError
from dsg.grid.plan import Attacked, Place
from dsg.recovery import accuracy_curve, area_under_recovery, best_over_lr, epochs_to_half
from dsg.results import row

DOMAINS = ("forget", "forget_shown", "forget_unshown")
AREA, HALF = "recovery_area", "epochs_to_half"

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Recovery:
    """The attacks of a grid, summed up.

    Attributes:
        rows: Result rows of the attackers' best runs, and how much and how fast they recover.
        attempts: One line per attack and learning rate.
    """

    rows: Rows
    attempts: list[dict[str, Any]]


def sum_up(attacks: Sequence[Attacked], run_dir: Path, base: str) -> Recovery:
    """Sum up the finished attacks.

    The attacker's best learning rate is the one with the highest forget accuracy in the end, as the
    model is served: with its guard, if it has one. An attacker with a failed cell is left out: one
    with fewer tries would look weaker.

    Args:
        attacks: All attacks of the grid.
        run_dir: Directory of the grid.
        base: Method that has forgotten nothing; what it knows before its attack is there to be
            recovered.
    """
    by_attacker: dict[tuple, list[Attacked]] = {}
    for one in attacks:
        attacker = (one.place, one.attack, one.method, one.mode)
        by_attacker.setdefault(attacker, []).append(one)
    known = {
        (one.place, one.attack): one.cell.rows(run_dir)
        for one in attacks
        if one.method == base and one.cell.is_finished(run_dir)
    }
    rows, attempts = [], []
    for (place, attack, _, _), tries in by_attacker.items():
        if not all(one.cell.is_finished(run_dir) for one in tries):
            continue
        found = {one.lr: one.cell.rows(run_dir) for one in tries}
        method = tries[0].method
        curves = {
            lr: accuracy_curve(each, method=method, **_served(each)) for lr, each in found.items()
        }
        best = best_over_lr(curves)
        rows += found[best.lr]
        for one in tries:
            measured = _measured(found[one.lr], known.get((place, attack), []))
            attempts.append(_attempt(one, measured, curves[one.lr][-1], one.lr == best.lr))
            if one.lr == best.lr:
                rows += measured
    return Recovery(rows, attempts)


def _measured(rows: Rows, base_rows: Rows) -> Rows:
    """Area under the recovery and epochs to half of it, per domain and state of the guard."""
    measured = []
    for method, state in sorted({(found["method"], found["guard"]) for found in rows}):
        for domain in DOMAINS:
            place = {"method": method, "guard": state, "domain": domain}
            try:
                curve = accuracy_curve(rows, **place)
                known = accuracy_curve(base_rows, guard="none", domain=domain)[0]
            except UserError:  # not every data set tells shown facts from others
                continue
            for metric, measure in ((AREA, area_under_recovery), (HALF, epochs_to_half)):
                numbers = {"value": measure(curve, known), "n": None, "low": None, "high": None}
                one = {"epoch": None, "metric": metric, "protocol": "cloze", **place, **numbers}
                measured.append(row(**{**rows[0], **one}))
    return measured


def _served(rows: Iterable[dict[str, Any]]) -> dict[str, str]:
    """The columns of the forget accuracy that users of the served model see."""
    guarded = any(found["guard"] == "on" for found in rows)
    return {"guard": "on" if guarded else "none", "domain": "forget"}


def _attempt(one: Attacked, measured: Rows, accuracy: float, is_best: bool) -> dict[str, Any]:
    place: Place = one.place
    served = {
        found["metric"]: found["value"]
        for found in measured
        if (found["method"], found["domain"]) == (one.method, "forget") and found["guard"] != "off"
    }
    return {
        "seed": place.seed,
        "forget_domain": place.domain,
        "method": one.method,
        "mode": one.mode,
        "attack": one.attack,
        "lr": one.lr,
        "forget_accuracy": accuracy,
        AREA: served.get(AREA),
        HALF: served.get(HALF),
        "best": is_best,
    }
