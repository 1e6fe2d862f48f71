"""Charts as inline SVG: readable on a phone, in black and white, and by a screen reader.

Series differ by marker and line style, never by colour alone. `matplotlib.pyplot` and its
global state are not used.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, StrMethodFormatter

from dsg.evaluation import CHANCE, DOMAINS, domain_name, method_name
from dsg.report.files import Densities
from dsg.report.measurements import Cell

CurveMetric = Literal["accuracy", "perplexity"]

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "legend.fontsize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 5.5,
    "svg.fonttype": "none",  # text stays text: searchable, and small files
    "text.parse_math": False,  # a `$` in a name is a dollar sign
}
_CROWDED_ABOVE = 0.7
_WIDTH = 4.4  # inches; at 9 points the text is still legible on a 390-pixel screen

# Okabe-Ito colours; dark and light alternate so that they differ in grey as well.
_LOOKS = (
    ("#000000", "o", "-"),
    ("#0072b2", "s", "--"),
    ("#d55e00", "^", "-."),
    ("#009e73", "D", ":"),
    ("#cc79a7", "v", (0, (5, 1, 1, 1, 1, 1))),
    ("#56b4e9", "P", (0, (3, 2))),
    ("#7f6000", "X", (0, (1, 1))),
    ("#555555", "*", (0, (7, 2))),
)


@dataclass(frozen=True)
class Series:
    """A named line: what was measured at each x."""

    name: str
    points: Mapping[float, Cell]

    @property
    def last(self) -> Cell:
        """The right end of the line."""
        return list(self.points.values())[-1]


@matplotlib.rc_context(STYLE)
def density_histograms(densities: Densities) -> Figure:
    """Histogram of the density per domain, one below the other, with the threshold across all."""
    names = [name for name in (*DOMAINS, *densities.domains) if densities.domains.get(name)]
    names = list(dict.fromkeys(names))
    highest = max(max(densities.domains[name]) for name in names)
    edges = _edges(densities.threshold, highest)
    figure = Figure((_WIDTH, 0.55 + 1.05 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(panels, names, strict=True):
        values = densities.domains[name]
        below = [value for value in values if value <= densities.threshold]
        above = [value for value in values if value > densities.threshold]
        axes.hist(
            # `hist` closes bins on the left; the gate is strict, so close them on the right.
            [[max(0.0, value - 1e-9) for value in part] for part in (below, above)],
            bins=edges,
            weights=[[100 / len(values)] * len(part) for part in (below, above)],
            stacked=True,
            color=["#c6dbef", "#b5460f"],
            edgecolor="black",
            linewidth=0.6,
        )
        axes.axvline(densities.threshold, color="black", linestyle="--", linewidth=1.4)
        label = domain_name(name)
        axes.set_title(f"{label}: {len(above) / len(values):.0%} of {len(values)} trigger")
        axes.set_ylabel("% of seq.")
        axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    panels[-1].set_xlabel(f"density (dashed line: threshold {densities.threshold:.3g})")
    return figure


@matplotlib.rc_context(STYLE)
def forget_retain_scatter(cells: Mapping[str, tuple[Cell, Cell]]) -> Figure:
    """Method -> (forget accuracy, retain accuracy), with both intervals."""
    figure = Figure((_WIDTH, 4.2), layout="constrained")
    _draw_scatter(figure.subplots(), cells)
    figure.legend(loc="outside upper left", ncols=2, handletextpad=0.4, columnspacing=1.0)
    return figure


@matplotlib.rc_context(STYLE)
def curves(
    panels: Mapping[str, Sequence[Series]], x_label: str, metric: CurveMetric = "accuracy"
) -> Figure:
    """Panels of one metric (title -> series), one below the other, with one legend."""
    names = list(dict.fromkeys(series.name for lines in panels.values() for series in lines))
    num_columns = 2 if max(map(len, names)) <= 24 else 1
    legend_rows = -(-len(names) // num_columns)
    figure = Figure((_WIDTH, 0.5 + 0.19 * legend_rows + 1.6 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, lines) in zip(grid, panels.items(), strict=True):
        axes.set_title(title)
        _draw_curves(axes, lines, names, metric)
    grid[-1].set_xlabel(x_label)
    handles = {
        label: handle
        for axes in grid
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        [handles[name] for name in names],
        names,
        loc="outside upper left",
        ncols=num_columns,
        handlelength=3.2,
        columnspacing=1.0,
    )
    return figure


@matplotlib.rc_context({**STYLE, "font.size": 10, "axes.titlesize": 11})
def overview(cells: Mapping[str, tuple[Cell, Cell]], title: str, lines: Sequence[Series]) -> Figure:
    """The scatter beside one panel of relearning curves, for a wide page."""
    figure = Figure((10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_scatter(left, cells)
    left.set_title("Forgetting and what it costs")
    if len(cells) > len(_LOOKS):  # a legend of so many would hide them
        left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, columnspacing=1.0)
    else:
        left.legend(loc="lower right" if _right_is_free(cells) else "best")
    right.set_title(title)
    _draw_curves(right, lines, [series.name for series in lines])
    right.set_xlabel("epoch of the attack")
    if lines:
        right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, handlelength=3.2)
    return figure


@matplotlib.rc_context(STYLE)
def to_svg(figure: Figure, identifier: str, label: str) -> Markup:
    """Inline SVG with a text alternative, the same bytes for the same figure.

    Args:
        figure: The chart.
        identifier: Unique within the page; prefixed to the ids inside the SVG.
        label: What the chart shows, in one sentence.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": identifier}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # Ids are global in a page, and namespaces mean nothing to an HTML parser.
    text = re.sub(r'\bid="', f'id="{identifier}-', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{identifier}-", text)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'(<svg[^>]*?) (?:width|height)="[\d.]+pt"', r"\1", text)
    text = re.sub(r'(<svg[^>]*?) (?:width|height)="[\d.]+pt"', r"\1", text)
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1).strip())


def _edges(threshold: float, highest: float) -> list[float]:
    """About 24 equal bins from 0, one of which ends at the threshold."""
    end = max(highest, 1.15 * threshold) or 1.0
    width = end / 24
    if threshold > 0:
        width = threshold / max(1, round(threshold / width))
    return [width * step for step in range(math.ceil(end / width - 1e-9) + 1)]


def _draw_scatter(axes: Axes, cells: Mapping[str, tuple[Cell, Cell]]) -> None:
    for index, (method, (forget, retain)) in enumerate(cells.items()):
        color, marker, _ = _LOOKS[index % len(_LOOKS)]
        hollow = index // len(_LOOKS) % 2 == 1  # the looks begin again
        axes.errorbar(
            100 * forget.value,
            100 * retain.value,
            xerr=_arms(forget),
            yerr=_arms(retain),
            color=color,
            marker=marker,
            markersize=8,
            markerfacecolor="white" if hollow else color,
            markeredgecolor=color if hollow else "black",
            linestyle="none",
            elinewidth=1,
            label=method_name(method),
        )
    axes.axvline(100 * CHANCE, color="black", linestyle=":", linewidth=1.2)
    axes.set_xlabel(f"forget accuracy, % (dotted line: chance {CHANCE:.0%}) – lower is better")
    axes.set_ylabel("retain accuracy, % – higher is better")
    axes.set_xlim(left=0, right=103)
    axes.set_ylim(top=102)


def _draw_curves(
    axes: Axes, lines: Sequence[Series], names: Sequence[str], metric: CurveMetric = "accuracy"
) -> None:
    scale = 100 if metric == "accuracy" else 1
    span = max((x for series in lines for x in series.points), default=0)
    for series in lines:
        index = names.index(series.name)
        color, marker, dashes = _LOOKS[index % len(_LOOKS)]
        cells = list(series.points.values())
        lower, upper = zip(*(_arms_or_zero(cell, scale) for cell in cells), strict=True)
        axes.errorbar(
            # A small shift keeps the bars of neighbouring lines apart.
            [x + 0.007 * span * (index - (len(names) - 1) / 2) for x in series.points],
            [scale * cell.value for cell in cells],
            yerr=[lower, upper],
            color=color,
            marker=marker,
            linestyle=dashes,
            markerfacecolor="white" if index % 2 else color,
            elinewidth=0.7,
            label=series.name,
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if metric == "perplexity":
        axes.set_ylabel("perplexity, log")
        axes.set_yscale("log")
        axes.set_yticks(_log_ticks(*axes.get_ylim()))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        return
    axes.axhline(100 * CHANCE, color="black", linestyle=":", linewidth=1)
    axes.set_ylabel("accuracy, %")
    values = [cell.value for series in lines for cell in series.points.values()]
    lowest = min(values, default=0.0)
    if lowest > _CROWDED_ABOVE:
        # Lines that share the top of the panel need its whole height; the title says so.
        start = 10 * int(10 * lowest - 0.5)
        axes.set_ylim(start, 101)
        axes.set_title(f"{axes.get_title(loc='left')} – axis starts at {start}%")
    else:
        axes.set_ylim(-3, 105)
        axes.set_yticks([0, 25, 50, 75, 100])


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers, few enough for a low panel; matplotlib's own overlap below a decade."""
    steps = (1, 2, 5) if high > 4 * low else (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**power for power in powers for step in steps]
    return [tick for tick in ticks if low <= tick <= high]


def _right_is_free(cells: Mapping[str, tuple[Cell, Cell]]) -> bool:
    """Whether no method lies where a legend at the lower right would be."""
    lowest = min((retain.value for _, retain in cells.values()), default=1.0)
    middle = (1 + lowest) / 2
    return all(forget.value < 0.6 or retain.value > middle for forget, retain in cells.values())


def _arms(cell: Cell) -> list[list[float]] | None:
    if cell.low is None or cell.high is None:
        return None
    lower, upper = _arms_or_zero(cell)
    return [[lower], [upper]]


def _arms_or_zero(cell: Cell, scale: int = 100) -> tuple[float, float]:
    """Lengths of the error bar; a value rounded past the end of its interval has none there."""
    low = cell.value if cell.low is None else cell.low
    high = cell.value if cell.high is None else cell.high
    return max(0.0, scale * (cell.value - low)), max(0.0, scale * (high - cell.value))
