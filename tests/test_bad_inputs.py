"""Every command line of the table ends in one sentence: no traceback, no hang, no silence."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

from dsg.cli.main import main
from tests.bad_inputs.commands import COMMANDS
from tests.bad_inputs.configurations import CONFIGURATIONS
from tests.bad_inputs.world import write_world

ROOT = Path(__file__).parents[1]
ROWS = {**COMMANDS, **CONFIGURATIONS}
# Far more than any row needs; whoever waits for a pipe or a network waits longer.
SECONDS = 60


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("bad_inputs") / "w")


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    """A working directory of its own with the world in it; the hub cannot be reached."""
    (tmp_path / "w").symlink_to(world)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    # Stands in for the embedded benchmark, which would first have to be trained.
    monkeypatch.setattr("dsg.cli.tiny_world.ensure_tiny_world", lambda _: world)

    def hang(*_):
        pytest.fail(f"still running after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    yield tmp_path
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_the_table_is_long():
    assert len(ROWS) >= 250
    assert all(len(sentence) >= 10 for sentence in ROWS.values())


@pytest.mark.parametrize("words", ROWS)
def test_a_bad_command_line_is_one_sentence(words, here, capsys):
    status = main(shlex.split(words))
    error = capsys.readouterr().err
    assert ROWS[words] in error
    assert error.startswith("dsg: error: ")
    assert (status, error.count("\n")) == (2, 1), error
    assert not (here / "runs").exists(), "a refused run leaves nothing behind"


@pytest.mark.parametrize(
    ("environment", "words", "status", "expected"),
    [
        ({"RANK": "abc"}, "report w/run", 2, "variable RANK must be the number of a rank"),
        ({"RANK": "abc"}, "test -c w/base.yaml", 2, "variable RANK must be the number of a rank"),
        ({"LOCAL_RANK": "x"}, "test -c w/base.yaml", 2, "variable LOCAL_RANK must be the number"),
        ({"PYTHONIOENCODING": "ascii"}, "test --help", 0, ""),
        (
            {"PYTHONIOENCODING": "ascii"},
            "check --model w/model --sae w/sae --hook_point blocks.1.hook_resid_post --text "
            "w/forget.txt",
            1,
            "",
        ),
    ],
)
def test_an_odd_environment_is_one_sentence_or_does_not_matter(
    here, environment, words, status, expected
):
    done = subprocess.run(
        [sys.executable, "-m", "dsg", *shlex.split(words)],
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert expected in done.stderr
