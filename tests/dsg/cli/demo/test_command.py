"""Options of the demonstration that contradict each other are refused before anything is loaded."""

import subprocess
import sys

import pytest

from dsg.cli.main import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--forget", "a.txt"], "--forget and --retain belong together"),
        (["--retain", "a.txt"], "--forget and --retain belong together"),
        (["--model", "m", "--forget", "a", "--retain", "b"], "--model and --sae belong together"),
        (["--model", "m", "--sae", "s"], "give --forget and --retain as well"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--forget_domains", "music"], "invalid choice: 'music'"),
        (["--parts", "everything"], "invalid choice: 'everything'"),
    ],
)
def test_contradicting_options(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_help_explains_every_option_without_torch():
    code = (
        "import sys; from dsg.cli.main import main\n"
        "try: main(['demo', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    for option in ("--seeds", "--forget_domains", "--parts", "--forget", "--retain", "--model"):
        assert option in done.stdout
    assert "default: [0]" in done.stdout
