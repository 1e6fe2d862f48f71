"""`dsg bench guard`: its options, its tables, its exit status."""

import argparse
import json
import subprocess
import sys
from dataclasses import replace

import pytest

from dsg.cli.bench import command as bench
from dsg.cli.bench import edit, layer, selection
from dsg.cli.bench.edit import EditCost
from dsg.cli.bench.layer import LayerShare
from dsg.cli.bench.selection import EarlyStop, SelectionMemory
from dsg.errors import UserError

TINY = ["--d_in", "32", "--d_sae", "2048", "--num_features", "4", "--tokens", "16", "32"]
SHARE = LayerShare(512, 1.0, 0.001, 0.004, untriggered_identical=True, triggered_differs=True)


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser(prog="dsg bench")
    bench.add_arguments(parser)
    return bench.run(parser.parse_args(["guard", *arguments]))


@pytest.fixture
def measured(monkeypatch):
    """Measurements that are known beforehand; returns the calls that asked for them."""
    calls = []

    def give(module, name, result):
        def measure(*arguments):
            calls.append((name, arguments))
            return result(*arguments) if callable(result) else result

        monkeypatch.setattr(module, name, measure)

    cost = EditCost(512, 115.0, 0.6, 3.0, 0.01, 300.0, 250.0, 350.0, 1e-4, 4.1, 8e-5, 4e-5)
    give(edit, "random_sae", None)
    give(edit, "measure_edit", cost)
    give(layer, "random_model", None)
    give(layer, "measure_layer", SHARE)
    give(
        selection,
        "measure_memory",
        lambda n, d_sae, _: SelectionMemory(n, 64, d_sae, 100 + n // 100_000, 4 * n * d_sae, 2.0),
    )
    give(selection, "measure_early_stop", EarlyStop(12, 3, 2.5, 5000.0, 2000.0, True))
    return calls


def test_a_tiny_run_measures_everything_and_writes_it_down(tmp_path, capsys):
    file = tmp_path / "bench.json"
    status = run(*TINY, "--memory_tokens", "20000", "--repeats", "2", "--json", str(file))
    printed = capsys.readouterr()
    assert status == 0
    assert "selection, 20000 tokens: " in printed.err
    for title in ("Dense edit / guard's edit", "Guard / one decoder layer", "Memory of selection"):
        assert title in printed.out
    assert printed.out.count("bit-identical") == 2
    found = json.loads(file.read_text(encoding="utf-8"))
    assert [row["num_tokens"] for row in found["edit"]] == [16, 32]
    assert all(row["ratio"] > 0 and row["difference_in_eps"] < 100 for row in found["edit"])
    assert all(row["untriggered_identical"] for row in found["layer"])
    # A process of its own did not keep the activations of all tokens.
    assert found["memory"][0]["num_tokens"] == 20000
    assert 0 < found["memory"][0]["increase_bytes"] < found["memory"][0]["all_activations_bytes"]
    assert found["early_stop"]["identical"]
    assert found["machine"]["threads"] >= 1
    assert found["options"]["d_in"] == 32


def test_ratios_are_what_the_tables_say(measured, capsys):
    assert run() == 0
    output = " ".join(capsys.readouterr().out.split())
    for text in ("│ 300x │ 250-350x │", "0.10% │ 0.40%", "+5.0%", "2.50x", "5000 / 2000"):
        assert text in output, text
    asked = [arguments[0] for name, arguments in measured if name == "measure_memory"]
    assert asked == [50_000, 500_000]
    assert ("measure_early_stop", (7, 0)) in measured


def test_fast_means_fewer_repeats_and_less_text_unless_they_are_given(measured):
    run("--fast", "--repeats", "2")
    asked = [arguments[0] for name, arguments in measured if name == "measure_memory"]
    assert asked == [5_000, 50_000]
    assert ("measure_early_stop", (2, 0)) in measured


@pytest.mark.parametrize("wrong", [{"untriggered_identical": False}, {"triggered_differs": False}])
def test_outputs_that_must_agree_and_do_not_fail_the_command(wrong, measured, monkeypatch, capsys):
    monkeypatch.setattr(layer, "measure_layer", lambda *_: replace(SHARE, **wrong))
    assert run() == 1
    assert measured
    assert ("DIFFERS" in capsys.readouterr().out) is ("untriggered_identical" in wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--num_features", "9", "--d_sae", "8"],
            "--num_features must be at most --d_sae 8, got 9",
        ),
        (["--tokens", "512", "15"], r"--tokens must be at least 16, got \[512, 15\]"),
        (["--memory_tokens", "0"], "--memory_tokens must be at least 1"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--json", "no/such/folder/file.json"], "--json must be a file in an existing folder"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(arguments, message, measured):
    with pytest.raises(UserError, match=message):
        run(*arguments)
    assert not measured


def test_help_explains_every_option_without_torch():
    code = (
        "import argparse, sys; from dsg.cli.bench import command as bench\n"
        "parser = argparse.ArgumentParser(); bench.add_arguments(parser)\n"
        "try: parser.parse_args(['guard', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    for option in ("--d_in", "--d_sae", "--num_features", "--tokens", "--repeats", "--json"):
        assert option in done.stdout
    assert "default: 2304" in done.stdout
    assert "or 3 with --fast" in " ".join(done.stdout.split())
