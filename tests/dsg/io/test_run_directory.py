"""The run directory: claimed safely, undone after a user error, kept after anything else."""

import os
import signal
import subprocess
import sys

import pytest

from dsg.errors import UserError
from dsg.io.run_directory import LOCK, MARKER, is_rank_zero, run_directory


@pytest.fixture(autouse=True)
def no_ranks(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def earlier_run(tmp_path):
    with run_directory(tmp_path / "run") as directory:
        (directory / "results.jsonl").write_text("old")
    return directory


def claim(path, *, write=None, error=None, **options):
    """Claim a run directory, write one file into it, and fail if told to."""
    with run_directory(path, **options) as directory:
        if write is not None:
            (directory / write).parent.mkdir(exist_ok=True)
            (directory / write).write_text("new")
        if error is not None:
            raise error


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, True),
        ({"LOCAL_RANK": "0"}, True),
        ({"LOCAL_RANK": "1"}, False),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, False),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "2", "LOCAL_RANK": "0"}, False),
        ({"SLURM_PROCID": "3"}, False),
        # Set inside an interactive allocation too, where Lightning starts the ranks itself.
        ({"SLURM_PROCID": "0", "LOCAL_RANK": "1"}, False),
    ],
)
def test_is_rank_zero(variables, expected, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_rank_zero() is expected


def test_makes_parents_and_a_marker(tmp_path):
    with run_directory(tmp_path / "runs" / "a") as directory:
        assert (directory / MARKER).is_file()
    assert directory == tmp_path / "runs" / "a"


def test_an_empty_directory_is_used(tmp_path):
    with run_directory(tmp_path):
        pass
    assert (tmp_path / MARKER).is_file()


def test_an_earlier_run_is_not_touched(earlier_run):
    with pytest.raises(UserError, match=r"already holds files; add --overwrite .* --resume"):
        claim(earlier_run)
    assert (earlier_run / "results.jsonl").read_text() == "old"


def test_overwrite_replaces_an_earlier_run(earlier_run):
    with run_directory(earlier_run, overwrite=True):
        assert not (earlier_run / "results.jsonl").exists()
        (earlier_run / "new").touch()
    assert {path.name for path in earlier_run.iterdir()} == {MARKER, LOCK, "new"}
    assert [path.name for path in earlier_run.parent.iterdir()] == ["run"]


def test_overwrite_keeps_what_a_link_points_to(earlier_run, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(earlier_run, target_is_directory=True)
    with run_directory(link, overwrite=True):
        (link / "new").touch()
    assert link.is_symlink()
    assert (earlier_run / "new").exists()


def test_overwrite_refuses_other_directories(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match=f"was not written by dsg .it has no {MARKER}"):
        claim(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_overwrite_refuses_the_working_directory(earlier_run, monkeypatch):
    monkeypatch.chdir(earlier_run)
    with pytest.raises(UserError, match="from inside it; change to another working directory"):
        claim(".", overwrite=True)
    assert (earlier_run / "results.jsonl").exists()


def test_overwrite_with_resume_is_refused(tmp_path):
    with pytest.raises(UserError, match="either --overwrite or --resume, got both"):
        claim(tmp_path, overwrite=True, resume=True)


def test_user_error_leaves_nothing_behind(tmp_path):
    error = UserError("the file is too small")
    with pytest.raises(UserError, match="too small"):
        claim(tmp_path / "runs" / "a", write="checkpoints/half.ckpt", error=error)
    assert list(tmp_path.iterdir()) == []


def test_user_error_keeps_a_parent_that_others_use(tmp_path):
    with pytest.raises(UserError, match="wrong"):
        claim(tmp_path / "runs" / "a", write="../b", error=UserError("wrong"))
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["b"]


def test_user_error_brings_an_overwritten_run_back(earlier_run):
    with pytest.raises(UserError, match="wrong"):
        claim(earlier_run, overwrite=True, write="results.jsonl", error=UserError("wrong"))
    assert (earlier_run / "results.jsonl").read_text() == "old"
    assert [path.name for path in earlier_run.parent.iterdir()] == ["run"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_other_ends_keep_what_was_written(error, earlier_run):
    with pytest.raises(error):
        claim(earlier_run, overwrite=True, write="results.jsonl", error=error)
    assert (earlier_run / "results.jsonl").read_text() == "new"
    assert [path.name for path in earlier_run.parent.iterdir()] == ["run"]


def test_resume_keeps_the_run_even_after_a_user_error(earlier_run):
    with pytest.raises(UserError, match="wrong"):
        claim(earlier_run, resume=True, error=UserError("wrong"))
    assert (earlier_run / "results.jsonl").read_text() == "old"


def test_resume_needs_an_earlier_run(tmp_path):
    with pytest.raises(UserError, match="--resume needs the directory of an earlier run"):
        claim(tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()


def test_a_file_is_refused(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match="must be a directory, got the file"):
        claim(tmp_path / "run", overwrite=True)


def test_an_unwritable_place_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory\)"):
        claim(tmp_path / "file" / "run")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(UserError, match=r"cannot be written \(Permission denied\); name a writ"):
        claim(tmp_path / "run")


def test_other_ranks_touch_nothing(earlier_run, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with run_directory(earlier_run) as directory:
        assert directory == earlier_run
    with pytest.raises(UserError, match="wrong"):
        claim(earlier_run, overwrite=True, error=UserError("wrong"))
    assert (earlier_run / "results.jsonl").read_text() == "old"
    with run_directory(tmp_path / "new"):
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": True}])
def test_a_live_run_is_left_alone(earlier_run, options):
    with run_directory(earlier_run, resume=True):
        (earlier_run / "results.jsonl").write_text("live")
        with pytest.raises(UserError, match=f"goes on \\(process {os.getpid()} on .*stop it"):
            claim(earlier_run, write="other", **options)
        assert (earlier_run / "results.jsonl").read_text() == "live"
        assert not (earlier_run / "other").exists()
    claim(earlier_run, write="other", overwrite=True)


def test_a_fresh_run_cannot_be_taken_either(tmp_path):
    with run_directory(tmp_path / "run"), pytest.raises(UserError, match="still goes on"):
        claim(tmp_path / "run", overwrite=True)


def test_a_killed_run_holds_no_claim(tmp_path):
    code = (
        "import sys, time; from dsg.io.run_directory import run_directory\n"
        "with run_directory(sys.argv[1]): print('claimed', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "claimed\n"
        with pytest.raises(UserError, match=f"process {process.pid} on"):
            claim(tmp_path / "run", resume=True)
        process.send_signal(signal.SIGKILL)
    claim(tmp_path / "run", resume=True)
