"""The dispatcher: what it lists, what it imports, and how failures reach the terminal."""

import os
import subprocess
import sys
import time
import types

import pytest

from dsg.cli import main as main_module
from dsg.cli.environment import prepare_environment
from dsg.cli.main import COMMANDS, main
from dsg.errors import UserError


@pytest.fixture
def use_command(monkeypatch):
    """Let `dsg demo ...` run a function of the test."""

    def use(function):
        monkeypatch.setitem(COMMANDS, "demo", ("", function))

    return use


def raising(error):
    def run(_):
        raise error

    return run


def test_help_is_fast_and_imports_nothing_heavy():
    code = (
        "import sys; from dsg.cli.main import main; status = main(['--help']);"
        "heavy = {'torch', 'lightning', 'transformers', 'wandb', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy; sys.exit(status)"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 3
    for command in (
        "fit",
        "validate",
        "test",
        "predict",
        "check",
        "demo",
        "bench",
        "grid",
        "compare",
        "report",
    ):
        assert f"\n  {command} " in done.stdout
    assert not done.stderr


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_lists_every_command_on_a_line_of_its_own(arguments, capsys):
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    for command, (description, _) in COMMANDS.items():
        assert [line for line in lines if line.split()[:1] == [command] and description in line]


def test_python_dash_m_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "dsg", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "dsg COMMAND" in done.stdout


@pytest.mark.parametrize(("typed", "near"), [("tset", "test"), ("reprot", "report")])
def test_unknown_command_names_the_near_ones(typed, near, capsys):
    assert main([typed]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dsg: error: Unknown command {typed!r}; did you mean {near}")
    assert error.count("\n") == 1


def test_unknown_command_without_near_names_lists_all(capsys):
    assert main(["qqqqq"]) == 2
    commands = "choose one of fit, validate, test, predict, check, demo, bench, grid"
    commands += ", compare, report"
    assert commands in capsys.readouterr().err


def test_user_error_is_one_line_and_status_2(use_command, capsys):
    use_command(raising(UserError("`forget` must hold text,\n  got nothing; add some.")))
    assert main(["demo"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "dsg: error: `forget` must hold text, got nothing; add some.\n"
    assert captured.out == ""


def test_a_bug_keeps_its_traceback(use_command):
    use_command(raising(ZeroDivisionError("bug")))
    with pytest.raises(ZeroDivisionError, match="bug"):
        main(["demo"])


def test_interrupt_says_how_to_continue(use_command, capsys):
    use_command(raising(KeyboardInterrupt("continue with: dsg demo --resume")))
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "dsg: interrupted; continue with: dsg demo --resume\n"


def test_interrupt_of_another_rank_is_silent(use_command, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    use_command(raising(KeyboardInterrupt()))
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == ""


def test_closed_pipe_is_silent():
    code = "import sys; from dsg.cli.main import main; sys.exit(main(['--help']))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (1, b"")


def test_report_builds_and_names_the_report(monkeypatch, capsys):
    fake = types.SimpleNamespace(build_report=lambda run_dir: f"{run_dir}/report.html")
    monkeypatch.setitem(sys.modules, "dsg.report", fake)
    assert main(["report", "runs/x"]) == 0
    assert capsys.readouterr().out == "runs/x/report.html\n"


def test_report_without_directory_is_one_line(capsys):
    assert main(["report"]) == 2
    assert capsys.readouterr().err == (
        "dsg: error: the following arguments are required: RUN_DIR; see dsg report --help.\n"
    )


def test_demo_gets_its_parsed_arguments(monkeypatch):
    seen = []
    fake = types.ModuleType("dsg.cli.demo.command")
    fake.add_arguments = lambda parser: parser.add_argument("--seeds", type=int, nargs="+")
    fake.run = lambda arguments: seen.append(arguments.seeds)
    monkeypatch.setitem(sys.modules, "dsg.cli.demo.command", fake)
    monkeypatch.setattr(main_module.sys.modules["dsg.cli"], "demo", fake, raising=False)
    assert main(["demo", "--seeds", "0", "1"]) == 0
    assert seen == [[0, 1]]


class TestPrepareEnvironment:
    NAMES = ("OMP_NUM_THREADS", "WANDB_MODE", "WANDB_SILENT", "TOKENIZERS_PARALLELISM")

    def test_sets_defaults(self, monkeypatch):
        for name in self.NAMES:
            monkeypatch.setenv(name, "")  # so that monkeypatch restores it
            monkeypatch.delenv(name)
        prepare_environment()
        assert 1 <= int(os.environ["OMP_NUM_THREADS"]) <= 4
        assert os.environ["WANDB_MODE"] == "offline"
        assert os.environ["WANDB_SILENT"] == "true"
        assert os.environ["TOKENIZERS_PARALLELISM"] == "false"

    def test_keeps_what_the_user_set(self, monkeypatch):
        monkeypatch.setenv("OMP_NUM_THREADS", "7")
        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setenv("WANDB_SILENT", "")
        monkeypatch.delenv("WANDB_SILENT")
        prepare_environment()
        assert os.environ["OMP_NUM_THREADS"] == "7"
        assert os.environ["WANDB_MODE"] == "online"
        assert "WANDB_SILENT" not in os.environ
