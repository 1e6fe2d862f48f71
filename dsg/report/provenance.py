"""What stands behind the numbers: features, settings, facts of the run, and their limits."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsg.io import read_run_facts
from dsg.report import markup
from dsg.report.files import read_features, read_settings
from dsg.report.markup import Html
from dsg.report.measurements import method_name

LIMITS = markup.bullets(
    (
        "A guard protects a model that is served behind an interface. Whoever holds the weights "
        "can take it off: numbers with the guard removed are what such an attacker gets.",
        "The weights still hold the knowledge. Accuracy near chance means that the served model "
        "does not show it to these questions, not that it is gone.",
        "Accuracy below chance is a systematic preference for wrong options (avoidance), which an "
        "attacker can read backwards.",
        "The gate has false positives. Text near the forget domain, and domains missing from the "
        "calibration text, are hit more often than the calibrated rate.",
        "Intervals describe the questions or seeds of this run. They say nothing about other "
        "models, other autoencoders or stronger attacks.",
    )
)


def features_table(run_dir: str | Path) -> Html:
    """The selected features; empty if the run has no `features.json`."""
    features = read_features(run_dir)
    if not features:
        return Html("")
    rows = []
    for feature in features:
        contexts = (
            markup.element(
                "div",
                each.before,
                markup.element("mark", each.token),
                each.after,
                markup.element("small", f"{each.activation:.3g}"),
            )
            for each in feature.contexts
        )
        rows.append(
            [
                feature.feature_id,
                f"{feature.forget_score:.3g}",
                "–" if feature.ratio is None else f"{feature.ratio:.3g}",
                markup.element("div", *contexts, class_="contexts"),
                ", ".join(token.strip() for token in feature.promoted),
            ]
        )
    headers = ["Feature", "Forget score", "Ratio", "Strongest tokens, in context", "Promotes"]
    caption = (
        "Score: mean squared activation on forget text; ratio: divided by that on retain text. "
        "Promotes: tokens whose logit the decoder row raises; a negative clamp lowers them."
    )
    return markup.table(caption, headers, rows)


def settings_table(run_dir: str | Path) -> Html:
    """Each method's settings; empty if the run has no `settings.json`."""
    settings = read_settings(run_dir)
    if not settings:
        return Html("")
    rows = (
        [
            method_name(each.method),
            _listed(each.chosen),
            each.tried,
            _listed(each.validation),
        ]
        for each in settings
    )
    caption = "Chosen on validation facts; every other number on this page is from test facts."
    return markup.table(caption, ["Method", "Chosen", "Tried", "On validation facts"], rows)


def facts_tables(run_dir: str | Path) -> Html:
    """What `run.json` says, nested parts folded away; empty if the run has none."""
    facts = read_run_facts(run_dir)
    if not facts:
        return Html("")
    simple = {key: item for key, item in facts.items() if not isinstance(item, dict | list)}
    parts = (
        [markup.table("From run.json", ["Fact", "Value"], list(simple.items()))] if simple else []
    )
    for key in sorted(set(facts) - set(simple)):
        text = json.dumps(facts[key], indent=2, ensure_ascii=False)
        parts.append(
            markup.element("details", markup.element("summary", key), markup.element("pre", text))
        )
    return markup.join(parts)


def _listed(values: Mapping[str, Any]) -> Html:
    return markup.join(
        (markup.element("div", f"{name} = {_plain(value)}") for name, value in values.items())
    )


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
