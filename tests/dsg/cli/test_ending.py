"""Runs that are ended by a signal or a full disk, and how they go on."""

import csv
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from dsg.cli.main import main
from dsg.cli.process import Terminated, disk_full_behind, interrupts_raised
from dsg.cli.resuming import WholeCheckpoints
from dsg.io.run_directory import newest_checkpoint
from tests.dsg.cli.tiny_runs import TinyData, TinyModule

ROOT = Path(__file__).parents[3]
HERE = "tests.dsg.cli.tiny_runs"
TWO_RANKS = ("--trainer.devices", "2", "--trainer.strategy", "ddp")


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C raises, also where the test runner ignores it."""
    outer = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, outer)


ENDS = [
    ("InterruptedModule", {"number": signal.SIGINT.value}, 130, "interrupted; {}"),
    ("InterruptedModule", {"number": signal.SIGTERM.value}, 143, "terminated; {}"),
    (
        "FullDiskModule",
        {},
        1,
        "error: no space is left to write 'results.jsonl' (No space left on device); free some "
        "space and {}",
    ),
]


@pytest.mark.parametrize(("model", "settings", "status", "sentence"), ENDS)
def test_an_ended_run_goes_on_as_if_it_had_not_ended(
    model, settings, status, sentence, write_config, capsys
):
    config = write_config(model, trainer={"max_epochs": 4, "log_every_n_steps": 2}, **settings)
    logger = "--trainer.logger=lightning.pytorch.loggers.CSVLogger"
    options = ["-c", config, logger, "--trainer.logger.save_dir=."]
    assert main(["fit", *options]) == status
    command = f"continue with: {' '.join(['dsg fit', *options])} --resume"
    assert capsys.readouterr().err == f"dsg: {sentence.format(command)}\n"
    write_config("TinyModule", trainer={"max_epochs": 4, "log_every_n_steps": 2})
    assert main(["fit", *options, "--resume"]) == 0
    assert main(["fit", *options, "--run_dir", "whole"]) == 0
    whole, resumed = (Path(name, "metrics.csv").read_bytes() for name in ("whole", "runs/tiny"))
    assert resumed == whole
    with Path("whole/metrics.csv").open() as file:
        assert {row["epoch"] for row in csv.DictReader(file)} == {"0", "1", "2", "3"}


def test_without_checkpoint_it_says_to_start_again(write_config, capsys):
    trainer = {"max_epochs": 4, "enable_checkpointing": False}
    config = write_config("InterruptedModule", trainer=trainer)
    assert main(["fit", "-c", config]) == 130
    message = "dsg: interrupted; start again with: dsg fit -c tiny.yaml --overwrite\n"
    assert capsys.readouterr().err == message
    assert main(["fit", "-c", config, "--resume"]) == 2
    assert "--resume needs a checkpoint" in capsys.readouterr().err


def test_sigterm_ends_two_ranks(write_config):
    settings = {"number": signal.SIGTERM.value}
    config = write_config("InterruptedModule", trainer={"max_epochs": 4}, **settings)
    done = subprocess.run(
        [sys.executable, "-m", "dsg", "fit", "-c", config, *TWO_RANKS],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 143, done.stderr
    assert "dsg: terminated; continue with: dsg fit" in done.stderr


def twice(number: int) -> None:
    try:
        signal.raise_signal(number)
    finally:
        signal.raise_signal(number)


def exit_at(number: int) -> None:
    """As Lightning answers to Ctrl-C."""
    try:
        signal.raise_signal(number)
    except KeyboardInterrupt:
        sys.exit(1)


class TestSignals:
    def test_sigterm_is_raised_once(self):
        with pytest.raises(Terminated), interrupts_raised(), interrupts_raised():
            twice(signal.SIGTERM)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_the_trainers_exit_becomes_what_caused_it(self, number):
        expected = Terminated if number == signal.SIGTERM else KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt) as found, interrupts_raised():
            exit_at(number)
        assert found.type is expected

    def test_handlers_come_back(self):
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        with interrupts_raised():
            pass
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before

    def test_what_is_ignored_stays_ignored(self):
        outer = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            with interrupts_raised():
                signal.raise_signal(signal.SIGTERM)
        finally:
            signal.signal(signal.SIGTERM, outer)


def fit(folder: Path, **options) -> Trainer:
    settings = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "default_root_dir": folder}
    trainer = Trainer(
        **settings, enable_progress_bar=False, plugins=[WholeCheckpoints()], **options
    )
    trainer.fit(TinyModule(), TinyData())
    return trainer


class TestCheckpoints:
    def test_a_full_disk_leaves_the_older_one(self, tmp_path, monkeypatch):
        trainer = fit(tmp_path)
        path = tmp_path / "a.ckpt"
        trainer.save_checkpoint(path)
        before = path.read_bytes()

        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            trainer.save_checkpoint(path)
        assert path.read_bytes() == before
        assert torch.load(path, weights_only=True)["global_step"] == 3
        assert sorted(os.listdir(tmp_path)) == ["a.ckpt", "checkpoints"]

    @pytest.mark.parametrize(
        ("content", "sentence"),
        [
            (None, "must be a file, got 'bad.ckpt' which is none"),
            (b"", "'bad.ckpt' cannot be read (it is empty)"),
            (b"PK\x03\x04torn", "'bad.ckpt' cannot be read"),
            (b"\x80\x04cos\nsystem\n.", "'bad.ckpt' cannot be read"),
        ],
    )
    @pytest.mark.parametrize("command", ["fit", "test"])
    def test_a_bad_one_is_one_line(self, write_config, capsys, content, sentence, command):
        if content is not None:
            Path("bad.ckpt").write_bytes(content)
        assert main([command, "-c", write_config(), "--ckpt_path", "bad.ckpt"]) == 2
        error = capsys.readouterr().err
        assert sentence in error
        assert error.count("\n") == 1
        assert not Path("runs").exists()

    def test_resume_goes_on_from_the_newest_that_can_be_read(self, write_config, capsys):
        checkpoints = {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}"},
        }
        config = write_config(trainer={"max_epochs": 2, "callbacks": [checkpoints]})
        assert main(["fit", "-c", config]) == 0
        newest = Path("runs/tiny/checkpoints/step=6.ckpt")
        torn, whole = newest.read_bytes()[:-100], newest.with_name("step=5.ckpt")
        newest.write_bytes(torn)
        (newest.parent / ".step=7.ckpt.part").write_bytes(torn)
        capsys.readouterr()
        assert main(["fit", "-c", config, "--resume"]) == 0
        assert torch.load(whole, weights_only=True)["global_step"] == 5
        again = newest.with_name("step=6-v1.ckpt")  # Lightning never writes over another
        assert newest_checkpoint(Path("runs/tiny")) == again
        assert torch.load(again, weights_only=True)["global_step"] == 6
        assert not (newest.parent / ".step=7.ckpt.part").exists()
        for checkpoint in newest.parent.glob("*.ckpt"):
            checkpoint.write_bytes(torn)
        assert main(["fit", "-c", config, "--resume"]) == 2
        assert "--resume needs a checkpoint that can be read" in capsys.readouterr().err
        assert main(["fit", "-c", config, "--overwrite"]) == 0

    def test_one_of_another_model_is_one_line(self, write_config, capsys):
        content = {"state_dict": {"other": torch.zeros(1)}, "loops": {}, "global_step": 0}
        torch.save({**content, "pytorch-lightning_version": "2.6.0"}, "other.ckpt")
        assert main(["fit", "-c", write_config(), "--ckpt_path", "other.ckpt"]) == 2
        error = capsys.readouterr().err
        assert 'other weights (Unexpected key(s) in state_dict: "other")' in error
        assert error.count("\n") == 1


# Lets files grow to 3 kB, as on a disk that is nearly full; Python ignores the signal of it.
LIMITED = """
import resource, sys
from dsg.cli.main import main
import dsg.cli.lightning_cli
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", ["fit", "test"])
def test_a_disk_that_is_nearly_full_ends_a_run_in_one_line(write_config, command):
    trainer = {
        "max_epochs": 2,
        "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "."}},
    }
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            LIMITED,
            command,
            "-c",
            write_config("WordyModule", trainer=trainer),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("dsg: error: no space is left to write"), done.stderr
    assert done.stderr.count("\n") == 1


# Saves a checkpoint, or a model, that does not fit, and says what is made of the error.
SAVING = """
import resource, sys
from pathlib import Path
import torch
from dsg.io.atomic import whole_file
from dsg.cli.process import disk_full_behind
from tests.helpers import tiny_model
folder, model = Path(sys.argv[2]), tiny_model()
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
try:
    if sys.argv[1] == "model":
        model.save_pretrained(folder)
    with whole_file(folder / "a.ckpt") as file:
        torch.save(model.state_dict(), file)
except Exception as error:
    sys.stdout.write(str(disk_full_behind(error)))
"""


@pytest.mark.parametrize("what", ["model", "checkpoint"])
def test_weights_that_do_not_fit_are_recognised(tmp_path, what):
    done = subprocess.run(
        [sys.executable, "-c", SAVING, what, str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.startswith("no space is left to write"), done.stderr
    assert not list(tmp_path.rglob("*.ckpt*"))


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "x", "a"), "no space is left to write 'a' (No space left"),
        (OSError(errno.EDQUOT, "x"), "no space is left to write (Disk quota exceeded)"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "(No space left on"),
    ],
)
def test_a_full_disk_is_recognised(error, sentence):
    assert sentence in str(disk_full_behind(error))
    outer = RuntimeError("saving failed")
    outer.__cause__ = error
    assert sentence in str(disk_full_behind(outer))


def test_another_error_is_no_full_disk():
    assert disk_full_behind(OSError(errno.EACCES, "x")) is None
    assert disk_full_behind(RuntimeError("step 28")) is None
