"""`report.html`: one self-contained page from the files of a run."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dsg.evaluation import CHANCE, METRICS, domain_name, method_name
from dsg.io import read_results, read_run_facts, write_atomically
from dsg.report import charts
from dsg.report.charts import CurveMetric, Series
from dsg.report.files import Densities, read_drawn, write_table
from dsg.report.findings import ATTACKS, findings
from dsg.report.measurements import Cell, Measurements, interval_note
from dsg.report.tables import compare_methods, interval, main_cells, number

REPORT_FILE = "report.html"
TEMPLATE_FILE = "report.html.jinja"

_OVERVIEW_DOMAINS = ("forget_unshown", "forget_shown", "forget")
_PANELS = ("forget", "forget_shown", "forget_unshown", "retain")


@dataclass(frozen=True)
class Figure:
    """A chart of the page, and the right ends of its lines as a table.

    Attributes:
        svg: The chart.
        caption: Its caption.
        panels: Titles of its panels, if its lines end in a table.
        ends: Name of a line -> its last cell in each panel.
        ends_caption: Caption of that table.
        metric: What the lines show.
    """

    svg: Markup
    caption: str
    panels: tuple[str, ...] = ()
    ends: Mapping[str, list[Cell | None]] | None = None
    ends_caption: str = ""
    metric: CurveMetric = "accuracy"


def build_report(run_dir: str | Path) -> Path:
    """Write `report.html` and `table.csv` into a run folder.

    Sections without data say so in one line.

    Args:
        run_dir: Folder with `results.jsonl` and, if there, `run.json` and `report.json`.

    Returns:
        Path of the page.

    Raises:
        UserError: `results.jsonl` is missing, or a file is malformed.
    """
    rows, drawn = read_results(run_dir), read_drawn(run_dir)
    facts, measurements = read_run_facts(run_dir), Measurements(rows)
    nested = {name: item for name, item in facts.items() if isinstance(item, dict | list)}
    write_table(run_dir, [*rows, *drawn.times])
    page = _template().render(
        findings=findings(measurements),
        comparisons=compare_methods(measurements),
        densities=list(_densities(drawn.densities)),
        trade_offs=list(_trade_offs(measurements)),
        relearning=list(_relearning(measurements)),
        sequential=list(_sequential(measurements)),
        features=drawn.features,
        settings=drawn.settings,
        simple_facts={name: item for name, item in facts.items() if name not in nested},
        nested_facts=nested,
        chance=f"{CHANCE:.0%}",
        alignment=METRICS["alignment"].meaning,
    )
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
    # A sequence of requests compares no methods.
    groups = (group for _, group in measurements.groups() if main_cells(group))
    figure = charts.overview(_trade_off(next(groups, measurements)), title, lines)
    figure.savefig(path, dpi=160, metadata={"Software": None})
    return Path(path)


def _template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "interval": interval,
        "method_name": method_name,
        "domain_name": domain_name,
        "interval_note": interval_note,
        "short": lambda value: f"{value:.4g}" if isinstance(value, float) else str(value),
        "json": lambda value: json.dumps(value, indent=2, ensure_ascii=False),
    }
    return environment.get_template(TEMPLATE_FILE)


def _densities(densities: Mapping[str, Densities]) -> Iterator[Figure]:
    for place, (method, measured) in enumerate(densities.items()):
        if any(measured.domains.values()):
            name = method_name(method)
            label = f"Histograms of the density by domain for {name}, with the threshold."
            svg = charts.to_svg(charts.density_histograms(measured), f"density{place}", label)
            yield Figure(svg, f"{name}: share of sequences by density.")


def _trade_offs(measurements: Measurements) -> Iterator[Figure]:
    for place, (title, group) in enumerate(measurements.groups()):
        cells = _trade_off(group)
        if not cells:
            continue
        described = "; ".join(
            f"{method_name(method)}: forget {forget.value:.1%}, retain {retain.value:.1%}"
            for method, (forget, retain) in cells.items()
        )
        figure = charts.forget_retain_scatter(cells)
        svg = charts.to_svg(figure, f"tradeoff{place}", f"Scatter. {described}.")
        num_seeds = max(retain.num_seeds for _, retain in cells.values())
        note = interval_note(num_seeds).replace("Brackets", "Bars")
        yield Figure(svg, f"{title}. {note}" if title else note)


def _relearning(measurements: Measurements) -> Iterator[Figure]:
    asked = measurements.excluding(attack=None).where(metric="accuracy").rows
    metric: CurveMetric = "accuracy" if asked else "perplexity"
    for attack, name in ATTACKS.items():
        attacked = measurements.where(attack=attack, metric=metric)
        panels = {
            domain_name(domain): lines
            for domain in _PANELS
            if (lines := _series(attacked.where(domain=domain), "epoch"))
        }
        if panels:
            caption = f"After {name} on forget text mixed with retain text."
            label = "epoch of the attack"
            yield _curves(panels, attack, label, label, caption, metric)


def _sequential(measurements: Measurements) -> Iterator[Figure]:
    rows = measurements.where(attack=None, metric="accuracy").excluding(request=None, guard="off")
    for place, method in enumerate(rows.distinct("method")):
        of_method = rows.where(method=method)
        lines = [
            Series(domain_name(domain), _points(of_method.where(domain=domain), "request"))
            for domain in of_method.distinct("domain")
            if domain not in ("forget", "near")
        ]
        name = method_name(method)
        caption = f"{name}: accuracy by domain after each request."
        identifier, label = f"sequential{place}", "forget requests so far"
        yield _curves({name: lines}, identifier, label, "request", caption)


def _trade_off(group: Measurements) -> dict[str, tuple[Cell, Cell]]:
    accuracy = group.static().excluding(guard="off").where(metric="accuracy")
    cells = {}
    for method in accuracy.distinct("method"):
        rows = accuracy.where(method=method)
        forget, retain = rows.cell(domain="forget"), rows.cell(domain="retain")
        if forget and retain:
            cells[method] = (forget, retain)
    return cells


def _curves(
    panels: Mapping[str, list[Series]],
    identifier: str,
    x_label: str,
    step: str,
    caption: str,
    metric: CurveMetric = "accuracy",
) -> Figure:
    described = " ".join(
        (f"{title}. " if len(panels) > 1 else "") + _described(lines, metric)
        for title, lines in panels.items()
    )
    figure = charts.curves(panels, x_label, metric)
    svg = charts.to_svg(figure, identifier, f"{caption} {described}")
    ends: dict[str, list[Cell | None]] = {}
    for place, lines in enumerate(panels.values()):
        for series in lines:
            ends.setdefault(series.name, [None] * len(panels))[place] = series.last
    num_seeds = max(cell.num_seeds for cells in ends.values() for cell in cells if cell)
    ends_caption = f"{metric.capitalize()} at the last {step}. {interval_note(num_seeds)}"
    return Figure(svg, caption, tuple(panels), ends, ends_caption, metric)


def _series(rows: Measurements, key: str) -> list[Series]:
    """One line per method, guard state and mode.

    Without its guard a model attacked in the open is the base model: that line is not drawn twice.
    """
    has_base = "base" in rows.distinct("method")
    lines = []
    for method in rows.distinct("method"):
        for mode in (None, "test_time", "train_time"):
            for guard in ("none", "on", "off"):
                points = _points(rows.where(method=method, mode=mode, guard=guard), key)
                if points and not (has_base and (mode, guard) == ("test_time", "off")):
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


def _described(lines: list[Series], metric: CurveMetric) -> str:
    form = ".1%" if metric == "accuracy" else ".3g"
    return (
        "; ".join(f"{series.name}: {series.last.value:{form}} at the end" for series in lines) + "."
    )
