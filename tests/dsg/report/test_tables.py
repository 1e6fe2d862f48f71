"""Tables of the terminal: methods side by side; one run's states side by side."""

import io

from rich.console import Console

from dsg.io.results import row, write_results
from dsg.report import build_report
from dsg.report.tables import outcome_table, results_table
from tests.report_data import accuracy, write_run


def shown(rows):
    table, num_more = outcome_table(rows)
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    lines = [line.strip() for line in console.file.getvalue().splitlines()]
    return [line for line in lines if line.strip()], num_more


def test_first_and_last_epoch_with_intervals():
    rows = [
        row(
            method="npo", guard=guard, epoch=epoch, domain=domain, protocol="cloze",
            metric="accuracy", value=0.5 + epoch / 10, n=72, low=0.25, high=0.75,
        )
        for epoch in (0, 1, 2)
        for guard in ("on", "off")
        for domain in ("retain", "forget")
    ]  # fmt: skip
    lines, num_more = shown(rows)
    assert num_more == 0
    assert [part.strip() for part in lines[0].split("  ") if part.strip()] == [
        *("[95 % intervals]", "n", "epoch 0, guard off", "epoch 0, guard on"),
        *("epoch 2, guard off", "epoch 2, guard on"),
    ]
    assert lines[2].split()[:3] == ["forget", "accuracy", "72"]
    assert lines[2].count("0.5 [0.25, 0.75]") == lines[2].count("0.7 [0.25, 0.75]") == 2
    assert lines[3].split()[:2] == ["retain", "accuracy"]


def test_what_is_looked_for_first_stands_first_and_the_rest_is_counted():
    rows = [
        row(guard="none", domain=f"subject_{place:02}", metric=metric, value=0.5, n=9)
        for place in range(40)
        for metric in ("own_number", "accuracy")
    ]
    rows.append(row(guard="none", domain="forget", metric="accuracy", value=None, n=3))
    rows.append(row(guard="none", domain="retain", metric="accuracy", value=1.0, n=3))
    lines, num_more = shown(rows)
    assert lines[2].split() == ["retain", "accuracy", "3", "1"]
    assert lines[3].split() == ["subject", "00", "accuracy", "9", "0.5"]
    assert len(lines) == 2 + 24
    assert num_more == 81 - 24


def of_protocols(*protocols):
    rows = [
        row(guard="none", domain="forget", protocol=protocol, metric="trigger_rate", value=0.5, n=4)
        for protocol in protocols
    ]
    lines, num_more = shown(rows)
    return [line.split("  ")[0] for line in lines[2:]], num_more


def test_protocols_are_named_where_there_are_several():
    named = ["forget trigger rate (cloze)", "forget trigger rate (passages)"]
    assert of_protocols("passages", "cloze") == (named, 0)
    assert of_protocols("cloze") == (["forget trigger rate"], 0)


def test_parts_of_a_protocol_are_left_out_where_there_is_an_overall_number():
    assert of_protocols("cloze_question", "cloze") == (["forget trigger rate"], 1)
    parts = ["forget trigger rate (turn_1)", "forget trigger rate (turn_2)"]
    assert of_protocols("turn_2", "turn_1") == (parts, 0)


def test_nothing_measured_gives_no_table():
    assert outcome_table([row(metric="accuracy", value=None)]) == (None, 0)
    assert outcome_table([]) == (None, 0)


def test_terminal_table(tmp_path):
    write_run(tmp_path)
    console = Console(width=100, record=True, file=None, quiet=True)
    with console.capture() as captured:
        console.quiet = False
        console.print(results_table(tmp_path))
    lines = captured.get().splitlines()
    clamp = next(line for line in lines if "Static clamp" in line)
    assert "<1" in clamp
    assert len([line for line in lines if "DSG" in line]) == 2
    assert max(map(len, lines)) <= 100


def test_the_terminal_table_of_several_seeds_fits_80_columns(tmp_path):
    write_run(tmp_path, seeds=(0, 1, 2))
    console = Console(width=80)
    with console.capture() as captured:
        console.print(results_table(tmp_path))
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.strip().startswith("RMU ") for line in lines)  # words are whole
    assert any(line.strip().startswith("Random ") for line in lines)
    clamp = next(line for line in lines if "Static clamp" in line)
    assert "3/3" in clamp


def test_the_table_says_in_how_many_cells_accuracy_is_below_chance(tmp_path):
    values = enumerate((0.05, 0.3, 0.3))
    rows = [accuracy("dsg", "forget", value, n=36, seed=seed) for seed, value in values]
    write_results(tmp_path, rows)
    assert "below chance in 1 of 3" in build_report(tmp_path).read_text(encoding="utf-8")
    console = Console(width=100)
    with console.capture() as captured:
        console.print(results_table(tmp_path))
    assert "1/3" in captured.get()
