"""The reader gives back what Lightning's `WandbLogger` wrote, and notices damage."""

import os
import struct
import subprocess
import sys

import pytest

from tests.wandb_reader import BLOCK, HEADER, find_run_file, read_history

# Enough steps and one long text, so that records cross the borders of blocks.
NUM_STEPS = 400
LONG = "x" * (3 * BLOCK)
PROGRAM = f"""
import sys
from lightning.pytorch.loggers import WandbLogger
import wandb

logger = WandbLogger(project="test", save_dir=sys.argv[1], offline=True)
for step in range({NUM_STEPS}):
    metrics = {{"val/forget/guard_on/accuracy": step / 7, "val/retain/guard_off/accuracy": 1.0}}
    logger.log_metrics({{**metrics, "epoch": step // 10}}, step=10 * step)
logger.log_metrics({{"text": {LONG!r}, "dotted.key": -1e-9}}, step=9999)
wandb.finish()
"""


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)],
        env={**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"},
        check=True,
        timeout=120,
        capture_output=True,
    )
    return find_run_file(folder)


def test_every_step_comes_back_with_its_keys_and_values(run_file):
    *rows, last = read_history(run_file)
    assert [row["_step"] for row in rows] == list(range(NUM_STEPS))
    assert [row["trainer/global_step"] for row in rows] == list(range(0, 10 * NUM_STEPS, 10))
    assert [row["epoch"] for row in rows] == [step // 10 for step in range(NUM_STEPS)]
    values = [row["val/forget/guard_on/accuracy"] for row in rows]
    assert values == pytest.approx([step / 7 for step in range(NUM_STEPS)], rel=1e-12)
    assert {row["val/retain/guard_off/accuracy"] for row in rows} == {1.0}
    assert last["text"] == LONG
    assert last["dotted.key"] == -1e-9


def test_every_damaged_byte_is_noticed(run_file, tmp_path):
    content = run_file.read_bytes()
    damaged = tmp_path / "run-x.wandb"
    # A byte of the data, of a checksum, and of a piece's kind.
    for offset in (len(content) // 2, len(HEADER), len(HEADER) + 6):
        changed = bytearray(content)
        changed[offset] ^= 0x10
        damaged.write_bytes(changed)
        with pytest.raises(ValueError, match=r"wrong checksum|unknown kind|within a record"):
            read_history(damaged)


def test_a_file_cut_short_is_noticed(run_file, tmp_path):
    content = run_file.read_bytes()
    cut = tmp_path / "run-x.wandb"
    first_length = struct.unpack_from("<H", content, len(HEADER) + 4)[0]
    for size in (
        len(content) - 1,
        len(content) - BLOCK,
        len(HEADER) + 3,
        len(HEADER) + 7 + first_length - 1,
    ):
        cut.write_bytes(content[:size])
        with pytest.raises(ValueError, match="ends within a record"):
            read_history(cut)


def test_another_file_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(ValueError, match="not a W&B run file"):
        read_history(tmp_path / "x")
