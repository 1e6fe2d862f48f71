"""`report.html`: one self-contained page from the files of a run."""

from collections.abc import Mapping
from pathlib import Path

from dsg.io import read_results, write_atomically
from dsg.report import charts, markup
from dsg.report.cells import write_cells
from dsg.report.charts import CurveMetric, Series
from dsg.report.files import read_densities
from dsg.report.headline import ATTACKS, findings
from dsg.report.markup import Html
from dsg.report.measurements import (
    Cell,
    Measurements,
    domain_name,
    interval_note,
    method_name,
)
from dsg.report.passages import passage_findings
from dsg.report.provenance import LIMITS, facts_tables, features_table, settings_table
from dsg.report.tables import main_cells, main_tables, table_cell

REPORT_FILE = "report.html"

_OVERVIEW_DOMAINS = ("forget_unshown", "forget_shown", "forget")
_PANELS = ("forget", "forget_shown", "forget_unshown", "retain")


def build_report(run_dir: str | Path) -> Path:
    """Write `report.html` and `cells.csv` into a run folder.

    Sections without data say so in one line.

    Args:
        run_dir: Folder with `results.jsonl` and, if there, `run.json` and the files of
            `dsg.report.files`.

    Returns:
        Path of the page.

    Raises:
        UserError: `results.jsonl` is missing, or a file is malformed.
    """
    measurements = Measurements(read_results(run_dir))
    write_cells(run_dir)
    sections = (
        ("headline", "What the numbers say", _headline(measurements)),
        ("methods", "Methods side by side", main_tables(measurements)),
        ("density", "What the gate sees", _density(run_dir)),
        ("trade-off", "Forgetting and what it costs", _scatter(measurements)),
        ("relearning", "Relearning attacks", _relearning(measurements)),
        ("sequential", "One forget request after another", _sequential(measurements)),
        ("features", "The strongest selected features", features_table(run_dir)),
        ("settings", "Settings chosen on the validation half", settings_table(run_dir)),
        ("limits", "Threat model and limits", LIMITS),
        ("provenance", "How the numbers were made", facts_tables(run_dir)),
    )
    absent = markup.element("p", "Not measured in this run.", class_="absent")
    content = (markup.section(name, title, body or absent) for name, title, body in sections)
    page = markup.page("Dynamic SAE Guardrails: results of this run", *content)
    return write_atomically(Path(run_dir) / REPORT_FILE, page)


def save_overview_png(run_dir: str | Path, path: str | Path) -> Path:
    """Draw the forget-retain scatter beside the relearning curves, 10 x 4.6 inches at 160 dpi.

    Args:
        run_dir: Folder with `results.jsonl`.
        path: Where the PNG goes; its folder must exist.

    Raises:
        UserError: `results.jsonl` is missing or malformed.
    """
    measurements = Measurements(read_results(run_dir))
    attacked = measurements.where(attack="relearn_full", metric="accuracy")
    domain = next((name for name in _OVERVIEW_DOMAINS if attacked.where(domain=name).rows), None)
    lines = _series(attacked.where(domain=domain), "epoch") if domain else []
    title = f"Relearning by full fine-tuning: {domain_name(domain) if domain else 'not measured'}"
    figure = charts.overview(_trade_off(_first_group(measurements)), title, lines)
    figure.savefig(path, dpi=160, metadata={"Software": None})
    return Path(path)


def _headline(measurements: Measurements) -> Html:
    found = findings(measurements) or passage_findings(measurements)
    parts = []
    titles = {
        "for": "Speaks for the guard",
        "against": "Speaks against it",
        "caution": "Read with care",
    }
    for side, title in titles.items():
        texts = [finding.text for finding in found if finding.side == side]
        if texts:
            parts += [markup.element("h3", title), markup.bullets(texts)]
    return markup.join(parts)


def _density(run_dir: str | Path) -> Html:
    figures = []
    for number, (method, densities) in enumerate(read_densities(run_dir).items()):
        if not any(densities.domains.values()):
            continue
        name = method_name(method)
        label = f"Histograms of the density by domain for {name}, with the threshold."
        svg = charts.to_svg(charts.density_histograms(densities), f"density{number}", label)
        figures.append(markup.chart(svg, f"{name}: share of sequences by density."))
    intro = (
        "Density is the share of a sequence's tokens on which a selected feature is active. "
        "The gate triggers above the threshold, which comes from retain sequences alone."
    )
    return _with_intro(intro, figures)


def _scatter(measurements: Measurements) -> Html:
    figures = []
    for number, (title, group) in enumerate(measurements.groups()):
        cells = _trade_off(group)
        if not cells:
            continue
        described = "; ".join(
            f"{method_name(method)}: forget {forget.value:.1%}, retain {retain.value:.1%}"
            for method, (forget, retain) in cells.items()
        )
        svg = charts.to_svg(
            charts.forget_retain_scatter(cells), f"tradeoff{number}", f"Scatter. {described}."
        )
        num_seeds = max(retain.num_seeds for _, retain in cells.values())
        note = interval_note(num_seeds).replace("Brackets", "Bars")
        figures.append(markup.chart(svg, f"{title + '. ' if title else ''}{note}"))
    return _with_intro("The best place is the upper left, at the dotted line.", figures)


def _relearning(measurements: Measurements) -> Html:
    attacks = measurements.excluding(attack=None)
    metric: CurveMetric = "accuracy" if attacks.where(metric="accuracy").rows else "perplexity"

    def figure(attack: str, name: str) -> Html | None:
        attacked = attacks.where(attack=attack, metric=metric)
        caption = f"After {name} on forget text mixed with retain text."
        return _curves(attacked, "epoch", attack, "epoch of the attack", caption, metric)

    figures = filter(None, (figure(attack, name) for attack, name in ATTACKS.items()))
    told = {
        "accuracy": ("facts", "Dotted line: chance."),
        "perplexity": ("passages", "The lower the perplexity, the better a text is known."),
    }
    what, reading = told[metric]
    intro = (
        f"An attacker fine-tunes the model on part of the forget {what}. Test-time: the guard is "
        "put on afterwards. Train-time: it is on during the attack too. Guard removed: the "
        f"attacker holds the weights and takes it off. {reading}"
    )
    return _with_intro(intro, list(figures))


def _sequential(measurements: Measurements) -> Html:
    rows = measurements.where(attack=None, metric="accuracy").excluding(request=None, guard="off")
    figures = []
    for number, method in enumerate(rows.distinct("method")):
        found = rows.where(method=method)
        domains = [name for name in found.distinct("domain") if name not in ("forget", "near")]
        lines = [
            Series(domain_name(name), _points(found.where(domain=name), "request"))
            for name in domains
        ]
        name = method_name(method)
        figure = charts.curves({name: lines}, "forget requests so far")
        caption = f"{name}: accuracy by domain after each request."
        svg = charts.to_svg(figure, f"sequential{number}", f"{caption} {_described(lines)}")
        numbers = _last_points({name: lines}, "request")
        figures.append(markup.join([markup.chart(svg, caption), numbers]))
    intro = "Domains are to be forgotten one after the other; all are asked after each request."
    return _with_intro(intro, figures)


def _first_group(measurements: Measurements) -> Measurements:
    """The first group that compares methods; a sequence of requests compares none."""
    groups = (group for _, group in measurements.groups())
    return next((group for group in groups if main_cells(group)), measurements)


def _trade_off(group: Measurements) -> dict[str, tuple[Cell, Cell]]:
    accuracy = group.static().excluding(guard="off").where(metric="accuracy")
    found = {}
    for method in accuracy.distinct("method"):
        rows = accuracy.where(method=method)
        forget, retain = rows.cell(domain="forget"), rows.cell(domain="retain")
        if forget and retain:
            found[method] = (forget, retain)
    return found


def _curves(
    rows: Measurements,
    key: str,
    identifier: str,
    x_label: str,
    caption: str,
    metric: CurveMetric,
) -> Html | None:
    panels = {
        domain_name(domain): lines
        for domain in _PANELS
        if (lines := _series(rows.where(domain=domain), key))
    }
    if not panels:
        return None
    described = " ".join(f"{title}. {_described(lines, metric)}" for title, lines in panels.items())
    figure = charts.curves(panels, x_label, metric)
    svg = charts.to_svg(figure, identifier, f"{caption} {described}")
    return markup.join([markup.chart(svg, caption), _last_points(panels, x_label, metric)])


def _series(rows: Measurements, key: str) -> list[Series]:
    """One line per method, guard state and mode.

    Without its guard a model attacked in the open is the base model: that line is not drawn twice.
    """
    lines = []
    for method in rows.distinct("method"):
        for mode in (None, "test_time", "train_time"):
            for guard in ("none", "on", "off"):
                if (mode, guard) == ("test_time", "off") and "base" in rows.distinct("method"):
                    continue
                found = rows.where(method=method, mode=mode, guard=guard)
                points = _points(found, key)
                if points:
                    lines.append(Series(_series_name(method, mode, guard), points))
    return lines


def _series_name(method: str, mode: str | None, guard: str) -> str:
    name = method_name(method)
    if mode:
        name += f", {mode.replace('_', '-')}"
    return f"{name}, guard removed" if guard == "off" else name


def _points(rows: Measurements, key: str) -> dict[float, Cell]:
    cells = ((x, rows.where(**{key: x}).cell()) for x in rows.distinct(key))
    return {x: cell for x, cell in cells if cell}


def _last_points(
    panels: Mapping[str, list[Series]], x_label: str, metric: CurveMetric = "accuracy"
) -> Html:
    """The right ends of all lines as a table, folded away."""
    names = list(dict.fromkeys(series.name for lines in panels.values() for series in lines))
    ends = {
        (title, series.name): list(series.points.values())[-1]
        for title, lines in panels.items()
        for series in lines
    }
    rows = (
        [name, *(table_cell(ends.get((title, name)), metric) for title in panels)] for name in names
    )
    num_seeds = max(cell.num_seeds for cell in ends.values())
    caption = f"{metric.capitalize()} at the last {x_label}. {interval_note(num_seeds)}"
    return markup.element(
        "details",
        markup.element("summary", "The last points as a table"),
        markup.table(caption, ["", *panels], rows),
    )


def _described(lines: list[Series], metric: CurveMetric = "accuracy") -> str:
    form = ".1%" if metric == "accuracy" else ".3g"
    ends = (
        f"{series.name}: {list(series.points.values())[-1].value:{form}} at the end"
        for series in lines
    )
    return "; ".join(ends) + "."


def _with_intro(intro: str, figures: list[Html]) -> Html:
    if not figures:
        return Html("")
    return markup.join(
        [
            markup.element("p", intro),
            markup.element(
                "div",
                *(markup.element("div", each, class_="chart") for each in figures),
                class_="charts",
            ),
        ]
    )
