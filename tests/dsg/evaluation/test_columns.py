"""Every column, metric and method has its words, and the README lists them as they are."""

import math
import re
from pathlib import Path

from dsg.evaluation.columns import (
    ATTACKED,
    COLUMNS,
    COMPARED,
    METHODS,
    METRICS,
    metric_of,
)
from dsg.evaluation.generation import PROMPT_COLUMNS
from dsg.evaluation.items import Passage
from dsg.evaluation.items_file import item_rows
from dsg.evaluation.scoring import PASSAGE_COLUMNS, question_columns
from dsg.guard import RECIPES
from dsg.io.results import KEYS

README = Path(__file__).parents[3] / "dsg" / "evaluation" / "README.md"


def table_after(header: str) -> list[list[str]]:
    """Cells of the README's table with this first line."""
    lines = README.read_text(encoding="utf-8").split(header + "\n")[1].splitlines()[1:]
    rows = lines[: lines.index("")] if "" in lines else lines
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_readme_explains_every_column():
    assert list(COLUMNS) == list(KEYS)
    rows = table_after("| column | meaning |")
    assert rows == [[f"`{name}`", meaning] for name, meaning in COLUMNS.items()]


def test_the_readme_explains_every_metric():
    def span(low, high):
        ends = ("" if math.isinf(end) else f"{end:g}" for end in (low, high))
        return " to ".join(ends).strip()

    rows = table_after("| metric | meaning | range | better |")
    assert rows == [
        [f"`{name}`", metric.meaning, span(metric.low, metric.high), metric.better or ""]
        for name, metric in METRICS.items()
    ]


def test_the_readme_names_every_value_of_an_item():
    section = README.read_text(encoding="utf-8").split("## Columns of `items.parquet`")[1]
    passage = Passage(id=0, domain="forget", text="a")
    columns = {*item_rows("on", "passages", [passage], {})[0]}
    columns |= {*PASSAGE_COLUMNS, *PROMPT_COLUMNS, *question_columns(1)}
    assert columns <= set(re.findall(r"`(\w+)`", section))


def test_every_method_has_a_label():
    assert {"base", *RECIPES} <= set(METHODS)  # objectives: tests/dsg/objectives/test_common.py


def test_tables_show_metrics_that_are_explained():
    assert {column.metric for column in (*COMPARED, *ATTACKED)} <= set(METRICS)


def test_an_unknown_metric_may_be_any_number():
    assert (metric_of("own").low, metric_of("own").unit) == (-math.inf, "")
    assert metric_of("chosen_3") == METRICS["chosen_0"]
