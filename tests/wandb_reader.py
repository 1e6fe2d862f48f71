"""Reads the history out of a W&B offline run file (`run-<id>.wandb`).

The file is a 7-byte header and then LevelDB's log format: blocks of 32 KiB that hold pieces, each a
4-byte CRC-32 (plain, not LevelDB's masked CRC-32C), a 2-byte length, a 1-byte kind and the data. A
record that does not fit into the rest of a block is cut into a first, middle and last piece. Each
record is one protobuf message.
"""

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import HistoryRecord, Record

HEADER = struct.pack("<4sHB", b":W&B", 0xBEE1, 0)
BLOCK = 32 * 1024
PIECE = struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def find_run_file(folder: Path) -> Path:
    """The one offline run below a folder, for instance below a run directory."""
    (path,) = folder.rglob("offline-run-*/run-*.wandb")
    return path


def read_history(path: Path) -> list[dict[str, Any]]:
    """What was logged, one dict per logging step, in order.

    A key may be stored whole or as a path (for dicts, joined by `.` as W&B shows it).

    Raises:
        ValueError: The file is no W&B file, is damaged, or was cut short.
    """
    rows = []
    for data in _records(path.read_bytes()):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            rows.append(_row(record.history))
    return rows


def read_run(path: Path) -> dict[str, Any]:
    """Name, group, project, job type, tags, id and configuration of the run.

    Raises:
        ValueError: See `read_history`; or the file describes no run.
    """
    config: dict[str, Any] = {}
    described: dict[str, Any] = {}
    for data in _records(path.read_bytes()):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "run":
            run = record.run
            described = {"name": run.display_name, "group": run.run_group, "project": run.project}
            described |= {"job_type": run.job_type, "tags": list(run.tags), "id": run.run_id}
            config |= _config(run.config.update)
        elif record.WhichOneof("record_type") == "config":
            config |= _config(record.config.update)
    if not described:
        raise ValueError("the W&B file describes no run")
    return {**described, "config": config}


def read_axes(path: Path) -> dict[str, str]:
    """The metric on the x-axis of each metric for which one was defined by name.

    Raises:
        ValueError: See `read_history`.
    """
    axes = {}
    for data in _records(path.read_bytes()):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "metric" and record.metric.name:
            axes[record.metric.name] = record.metric.step_metric
    return axes


def _config(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def _row(history: HistoryRecord) -> dict[str, Any]:
    return {
        item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in history.item
    }


def _records(content: bytes) -> Iterator[bytes]:
    if content[: len(HEADER)] != HEADER:
        raise ValueError(f"not a W&B run file: it begins with {content[: len(HEADER)]!r}")
    pieces: list[bytes] = []
    for kind, data in _pieces(content):
        if (kind in (FULL, FIRST)) == bool(pieces):
            raise ValueError("a record of the W&B file lacks its beginning or its end")
        pieces.append(data)
        if kind in (FULL, LAST):
            yield b"".join(pieces)
            pieces.clear()
    if pieces:
        raise ValueError("the W&B file ends within a record")


def _pieces(content: bytes) -> Iterator[tuple[int, bytes]]:
    offset = len(HEADER)
    while offset < len(content):
        left_in_block = BLOCK - offset % BLOCK
        if left_in_block < PIECE.size:  # too small for a piece: filled with zeros
            offset += left_in_block
            continue
        if offset + PIECE.size > len(content):
            raise ValueError("the W&B file ends within a record")
        checksum, length, kind = PIECE.unpack_from(content, offset)
        begin = offset + PIECE.size
        data = content[begin : begin + length]
        if len(data) < length:
            raise ValueError("the W&B file ends within a record")
        if kind not in (FULL, FIRST, MIDDLE, LAST):
            raise ValueError(f"unknown kind of piece {kind} at byte {offset} of the W&B file")
        if zlib.crc32(data, zlib.crc32(bytes([kind]))) != checksum:
            raise ValueError(f"wrong checksum at byte {offset} of the W&B file")
        yield kind, data
        offset = begin + length
