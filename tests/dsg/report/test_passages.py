"""The report of a run without questions."""

import io
import re

import pytest
from rich.console import Console

from dsg.io.results import row, write_results
from dsg.report import build_report, results_table
from dsg.report.findings import findings
from dsg.report.measurements import Measurements

SHARED = {"experiment": "text_demo", "seed": 0, "model": "small", "split": "test"}


def static_rows(forget_rouge: float = 0.2) -> list[dict]:
    """Base, DSG and a static clamp on memorised and unseen passages."""
    rows = []
    perplexities = {"base": (4.0, 5.0), "dsg": (40.0, 5.5), "static_clamp": (48.0, 50.0)}
    for dataset in ("text/memorised", "text/unseen"):
        for method, values in perplexities.items():
            shared = {
                **SHARED,
                "dataset": dataset,
                "method": method,
                "guard": "none" if method == "base" else "on",
            }
            for domain, perplexity in zip(("forget", "retain"), values, strict=True):
                cell = {**shared, "domain": domain, "n": 100}
                bounds = {"low": perplexity * 0.9, "high": perplexity * 1.1}
                rows.append(row(**cell, metric="perplexity", value=perplexity, **bounds))
                said = forget_rouge if (method, domain) == ("dsg", "forget") else 0.6
                rows.append(
                    row(**cell, metric="rouge_l", value=said, low=said - 0.05, high=said + 0.05)
                )
                if method != "base":
                    rate = 0.9 if domain == "forget" else 0.05
                    rows.append(row(**cell, metric="trigger_rate", value=rate))
            if method != "base":
                area = {"metric": "density_auroc", "domain": "forget", "value": 0.97, "n": 200}
                rows.append(row(**shared, **area))
    return rows


def attack_rows() -> list[dict]:
    """Perplexity over two epochs of full fine-tuning."""
    return [
        row(
            **SHARED,
            dataset="text/memorised",
            method="dsg",
            guard=guard,
            mode="test_time",
            attack="relearn_full",
            epoch=epoch,
            domain=domain,
            metric="perplexity",
            value=(50.0 if guard == "on" else 4.0) - epoch,
            n=50,
        )
        for guard in ("on", "off")
        for domain in ("forget_shown", "forget_unshown", "retain")
        for epoch in (0, 1)
    ]


@pytest.fixture
def run_dir(tmp_path):
    write_results(tmp_path, static_rows() + attack_rows())
    return tmp_path


def test_page_shows_perplexity_and_continuation(run_dir):
    page = build_report(run_dir).read_text()
    for heading in ("Forget perplexity", "Forget ROUGE-L", "Retain ROUGE-L", "Density AUROC"):
        assert f">{heading}</th>" in page
    assert "small, text/memorised." in page
    assert "small, text/unseen." in page
    assert "perplexity, log" in page
    assert "Perplexity at the last epoch of the attack" in page
    assert "DSG, test-time: 49 at the end" in page
    assert "Dotted line: chance" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_terminal_table_names_both_parts(run_dir):
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(results_table(run_dir))
    shown = console.export_text()
    assert "Gate rates (TPR, FPR) in %" in shown
    assert re.search(
        r"small, text/unseen(.|\n)*DSG +40\.00 +5\.50 +0\.200 +0\.600 +90\.0 +5\.0",
        shown,
    )


def test_questions_leave_no_room_for_passages_in_the_terminal(run_dir):
    accuracy = {"metric": "accuracy", "method": "dsg", "guard": "on", "domain": "forget"}
    rows = [*static_rows(), row(**SHARED, **accuracy, dataset="text/memorised", value=0.2, n=10)]
    write_results(run_dir, rows)
    titles = [column.header for column in results_table(run_dir).columns]
    assert "forget" in titles
    assert not {"forget\nppl", "forget\nR-L", "retain\nR-L"} & set(titles)


def sides(rows: list[dict], word: str) -> list[str]:
    return [finding.side for finding in findings(Measurements(rows)) if word in finding.text]


def test_findings_fall_as_the_numbers_do():
    texts = [finding.text for finding in findings(Measurements(static_rows() + attack_rows()))]
    assert (
        "The density tells unseen forget passages from unseen retain passages with an AUROC of "
        "0.970; the gate triggers on 90.0% of the forget passages and on 5.0% of the retain "
        "passages." in texts
    )
    assert (
        "The guard multiplies the perplexity of memorised forget passages by 10.00 and that of "
        "memorised retain passages by 1.10." in texts
    )
    assert sides(static_rows(), "memorised forget passages reach") == ["for"]
    assert sides(static_rows(forget_rouge=0.58), "memorised forget passages reach") == ["against"]
    assert sides(static_rows(), "memorised retain passages reach") == ["for"]
    assert sides(static_rows(), "static clamp") == ["caution", "caution"]
    assert sides(attack_rows(), "of those shown is 49 with the guard put on") == ["for"]


def test_nothing_measured_says_nothing():
    assert findings(Measurements([])) == []
