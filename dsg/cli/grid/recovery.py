"""Numbers made of several cells' rows: recovery under attack, unlearning score, mean over draws.

What an attacker aims at are the facts that its text states, where a data set tells them from the
others: the others may fall with the attack itself, which would hide what came back.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dsg.attacks import accuracy_curve, area_under_recovery, best_over_lr, epochs_to_half
from dsg.cli.grid.plan import Attacked, Place
from dsg.errors import UserError
from dsg.evaluation import PROTOCOLS, Outcome, mean_over_runs, unlearning_score
from dsg.io import row

DOMAINS = ("forget", "forget_shown", "forget_unshown")
SHOWN, UNSHOWN = "forget_shown", "forget_unshown"
AREA, HALF, COLLATERAL = "recovery_area", "epochs_to_half", "collateral_damage"
SUMMARIES = (AREA, HALF, COLLATERAL)

Rows = list[dict[str, Any]]


class _Attacker(NamedTuple):
    """Whom, where and how; with several learning rates."""

    place: Place
    attack: str
    method: str
    mode: str | None


@dataclass(frozen=True)
class Recovery:
    """The attacks of a grid, summed up.

    Attributes:
        rows: Result rows of the attackers' best runs; how much and how fast they recover; and the
            collateral damage, see `collateral_damage`.
        attempts: One line per attack and learning rate.
    """

    rows: Rows
    attempts: list[dict[str, Any]]


def sum_up(attacks: Sequence[Attacked], run_dir: Path, base: str) -> Recovery:
    """Sum up the finished attacks.

    The attacker's best learning rate is the one with the highest accuracy on what it aims at in the
    end, as the model is served: with its guard, if it has one. An attacker with a failed cell is
    left out: one with fewer tries would look weaker.

    Args:
        attacks: All attacks of the grid.
        run_dir: Directory of the grid.
        base: Method that has forgotten nothing; what it knows before its attack is there to be
            recovered. Where it is not attacked itself, it is what lies below a guard at test time.
    """
    by_attacker: dict[_Attacker, dict[float, Rows | None]] = {}
    for attacked in attacks:
        attacker = _Attacker(attacked.place, attacked.attack, attacked.method, attacked.mode)
        rows = attacked.cell.rows(run_dir) if attacked.cell.is_finished(run_dir) else None
        by_attacker.setdefault(attacker, {})[attacked.lr] = rows
    for attacker, tries in list(by_attacker.items()):
        control = _Attacker(attacker.place, attacker.attack, base, None)
        below = {lr: _below_guard(rows, base) for lr, rows in tries.items()}
        if control not in by_attacker and all(below.values()):
            by_attacker[control] = dict(below)
    reported, attempts = [], []
    for attacker, tries in by_attacker.items():
        finished = {lr: rows for lr, rows in tries.items() if rows is not None}
        if len(finished) < len(tries):
            continue
        method = attacker.method
        curves = {
            lr: accuracy_curve(rows, method=method, **_served(rows))
            for lr, rows in finished.items()
        }
        best = best_over_lr(curves)
        reported += finished[best.lr]
        controls = by_attacker.get(_Attacker(attacker.place, attacker.attack, base, None), {})
        for lr, rows in finished.items():
            base_rows = controls.get(lr) or []
            measured = _measured(rows, base_rows)
            attempts.append(_attempt(attacker, lr, rows, measured, lr == best.lr))
            if lr == best.lr:
                damage = collateral_damage(rows, base_rows, is_base=method == base)
                reported += measured + damage
    return Recovery(reported, attempts)


def _below_guard(rows: Rows | None, base: str) -> Rows:
    """Rows of the model that an attacker trained who never saw its guard."""
    return [
        {**measurement, "method": base, "mode": None, "guard": "none"}
        for measurement in rows or ()
        if (measurement["mode"], measurement["guard"]) == ("test_time", "off")
    ]


def collateral_damage(rows: Rows, base_rows: Rows, *, is_base: bool) -> Rows:
    """The accuracy on facts not shown that an attack costs the weights, without any guard.

    Of the model that has forgotten nothing it is what the attack takes from it. Of every other one
    it is what that model under the same attack knows more: knowledge that is gone from the weights,
    for which no guard can be credited. Weights that were changed to forget may also lack what is
    still forgotten.

    Args:
        rows: Rows of one attack.
        base_rows: Those of the model that has forgotten nothing, with the same learning rate.
        is_base: Whether `rows` are of that very model.

    Returns:
        One row per method and state of the guard; none where no facts are told apart.
    """
    place = {"domain": UNSHOWN}
    states = {state["guard"] for state in rows}
    try:
        weights = accuracy_curve(rows, guard="off" if "off" in states else "none", **place)
        intact = weights[0] if is_base else accuracy_curve(base_rows, guard="none", **place)[-1]
    except UserError:
        return []
    value = {"metric": COLLATERAL, "value": intact - weights[-1]}
    return [_row(rows, **state, **place, **value) for state in _methods_and_states(rows)]


def _measured(rows: Rows, base_rows: Rows) -> Rows:
    """Area under the recovery and epochs to half of it, per domain and state of the guard."""
    measured = []
    for state in _methods_and_states(rows):
        for domain in DOMAINS:
            try:
                curve = accuracy_curve(rows, **state, domain=domain)
                intact = accuracy_curve(base_rows, guard="none", domain=domain)[0]
            except UserError:  # not every data set tells shown facts from others
                continue
            for metric, measure in ((AREA, area_under_recovery), (HALF, epochs_to_half)):
                value = {"metric": metric, "value": measure(curve, intact)}
                measured.append(_row(rows, **state, domain=domain, **value))
    return measured


def _methods_and_states(rows: Rows) -> list[dict[str, str]]:
    pairs = sorted({(measurement["method"], measurement["guard"]) for measurement in rows})
    return [{"method": method, "guard": state} for method, state in pairs]


def _row(rows: Rows, **fields: Any) -> dict[str, Any]:
    """A row about the whole of an attack."""
    whole = dict.fromkeys(("epoch", "n", "low", "high"))
    return row(**{**rows[0], **whole, "protocol": "cloze", **fields})


def _served(rows: Iterable[dict[str, Any]]) -> dict[str, str]:
    """The columns of the accuracy that the attacker aims at, as users of the model see it."""
    guarded = any(measurement["guard"] == "on" for measurement in rows)
    told_apart = any(measurement["domain"] == SHOWN for measurement in rows)
    return {"guard": "on" if guarded else "none", "domain": SHOWN if told_apart else "forget"}


def _attempt(
    attacker: _Attacker, lr: float, rows: Rows, measured: Rows, is_best: bool
) -> dict[str, Any]:
    place: Place = attacker.place
    served = {"method": attacker.method, **_served(rows)}
    recovered = {
        measurement["metric"]: measurement["value"]
        for measurement in measured
        if all(measurement[name] == value for name, value in served.items())
    }
    return {
        "seed": place.seed,
        "forget_domain": place.domain,
        "method": attacker.method,
        "mode": attacker.mode,
        "attack": attacker.attack,
        "lr": lr,
        "facts": served["domain"],
        "accuracy": accuracy_curve(rows, **served)[-1],
        AREA: recovered.get(AREA),
        HALF: recovered.get(HALF),
        "best": is_best,
    }


UNLEARNING_SCORE = "unlearning_score"

Row = Mapping[str, Any]


def score_rows(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """One row per seed with the score, under the settings that were chosen on validation questions.

    Args:
        rows: Result rows of guarded evaluations on `validation` and on `test`, whose `experiment`
            tells the settings. The unguarded model's accuracies are the base's.

    Returns:
        Rows of the metric `unlearning_score`; none for a seed in which no setting keeps 99 % of the
        utility, or which was not measured on both halves.
    """
    by_seed: dict[Any, list[Row]] = {}
    for measurement in rows:
        if measurement["metric"] == "accuracy" and measurement["protocol"] in PROTOCOLS:
            by_seed.setdefault(measurement["seed"], []).append(measurement)
    scored = [_score(seed, measured) for seed, measured in by_seed.items()]
    return [measurement for measurement in scored if measurement is not None]


def _score(seed: Any, rows: Sequence[Row]) -> dict[str, Any] | None:
    outcomes = {
        split: {guard: _outcomes(rows, split, guard) for guard in ("off", "on")}
        for split in ("validation", "test")
    }
    choosing, reported = outcomes["validation"], outcomes["test"]
    settings = [name for name in choosing["on"] if name in reported["on"]]
    if not settings:
        return None
    first = settings[0]
    scored = unlearning_score(
        [choosing["on"][name] for name in settings],
        [reported["on"][name] for name in settings],
        choosing["off"][first],
        reported["off"][first],
    )
    if scored is None:
        return None
    setting, score = scored
    like = next(
        measurement
        for measurement in rows
        if measurement["guard"] == "on" and measurement["domain"] == "forget"
    )
    return row(
        **{
            **like,
            "experiment": settings[setting],
            "split": "test",
            "seed": seed,
            "metric": UNLEARNING_SCORE,
            **vars(score),
        }
    )


def _outcomes(rows: Sequence[Row], split: str, guard: str) -> dict[str, Outcome]:
    """Outcome of each setting that has both accuracies."""
    by_setting: dict[str, dict[str, Row]] = {}
    for measurement in rows:
        if (measurement["split"], measurement["guard"]) == (split, guard) and measurement[
            "domain"
        ] in ("forget", "retain"):
            by_setting.setdefault(measurement["experiment"], {})[measurement["domain"]] = (
                measurement
            )
    return {
        name: Outcome(
            both["forget"]["value"] * both["forget"]["n"],
            both["forget"]["n"],
            both["retain"]["value"],
        )
        for name, both in by_setting.items()
        if len(both) == 2
    }


_MEASURED = ("method", "value", "low", "high")


def mean_over_draws(
    rows: Iterable[Mapping[str, Any]], method: str, num_draws: int
) -> list[dict[str, Any]]:
    """One row per measurement, with an interval over the draws.

    Where a draw gave no number, such as an infinite perplexity, there is no mean either; and no row
    at all where a draw is missing.

    Args:
        rows: Result rows of all draws, which differ in `method` alone.
        method: The `method` of their mean.
        num_draws: How many there are.
    """
    by_measurement: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for measured in rows:
        shared = tuple((key, value) for key, value in measured.items() if key not in _MEASURED)
        by_measurement.setdefault(shared, []).append(measured)
    means = []
    for drawn in by_measurement.values():
        if len(drawn) < num_draws:
            continue
        values = [measured["value"] for measured in drawn]
        mean: dict[str, Any] = dict.fromkeys(("value", "low", "high"))
        if None not in values:
            estimate = mean_over_runs(drawn[0]["metric"], values)
            mean = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
        means.append({**drawn[0], "method": method, **mean})
    return means
