"""Guards on disk: one safetensors file and one JSON file, both checked by hash."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dsg.errors import UserError, check_choice
from dsg.guard.edit import Clamp, Edit, Refusal
from dsg.guard.gate import CusumGate, DensityGate, Gate, OpenGate, WindowGate
from dsg.io import read_bytes, reason, whole_file

TENSORS_FILE = "guard.safetensors"
SETTINGS_FILE = "guard.json"
_FORMAT = "dynamic-sae-guardrails"
_VERSION = 3
_SETTINGS = {"hook_point", "uncounted_ids", "pad_id", "gate", "edit", "encoder", "model", "facts"}
_GATES = {gate.kind: gate for gate in (DensityGate, WindowGate, CusumGate, OpenGate)}
_EDITS = {edit.kind: edit for edit in (Clamp, Refusal)}
_Part = TypeVar("_Part", Gate, Edit)


def write_artifact(
    directory: str | Path, tensors: dict[str, Tensor], settings: dict[str, Any]
) -> None:
    """Writes tensors and settings beside what is there, and puts them in its place once both last.

    Raises:
        UserError: If the facts are not representable in JSON, or the folder cannot be written.
    """
    folder = Path(directory)
    settings = {**settings, "gate": _dict(settings["gate"]), "edit": _dict(settings["edit"])}
    blob = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
    try:
        # Once through JSON, so that the digest is that of what a reader will see.
        settings = json.loads(json.dumps(settings, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"`facts` must hold only finite numbers, strings, lists and dicts, got {error}; "
            "convert them before saving."
        ) from error
    header = {
        "format": _FORMAT,
        "format_version": _VERSION,
        "tensors_sha256": hashlib.sha256(blob).hexdigest(),
        "settings": settings,
    }
    header["sha256"] = _digest(header)
    text = json.dumps(header, indent=2, sort_keys=True)
    try:
        with whole_file(folder / TENSORS_FILE) as tensor_file:
            tensor_file.write(blob)
            tensor_file.flush()
            os.fsync(tensor_file.fileno())
            # Only now that there was room for the tensors is the JSON put in place, then they are.
            with whole_file(folder / SETTINGS_FILE) as settings_file:
                settings_file.write(f"{text}\n".encode())
    except OSError as error:
        raise UserError(
            f"`directory` must be a folder that can be written, got {str(folder)!r} "
            f"({reason(error)}), in which nothing was changed; make room there or name another."
        ) from error


def read_artifact(directory: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `write_artifact` wrote.

    The hashes find damage and careless edits; they are no signature.

    Returns:
        Tensors on the CPU and settings, with the gate and the edit as objects. What else is in
        them is not checked here but by `Guard`.

    Raises:
        UserError: If a file is missing, unreadable, altered, or not of this format and version.
    """
    folder = Path(directory)
    paths = (folder / SETTINGS_FILE, folder / TENSORS_FILE)
    try:
        text, blob = map(read_bytes, paths)
    except UserError as error:
        raise UserError(
            f"`directory` must hold {SETTINGS_FILE} and {TENSORS_FILE}, got {str(folder)!r} "
            f"({str(error).split(';')[0]}); pass the folder given to `save`."
        ) from error
    header = _parse(folder / SETTINGS_FILE, text)
    version = header.get("format_version")
    if version not in (2, _VERSION):
        raise UserError(
            f"{folder / SETTINGS_FILE} must have format_version 2 or {_VERSION}, got {version!r}; "
            "load it with the release that wrote it."
        )
    stated, settings = header.pop("sha256", None), header.get("settings")
    if not isinstance(settings, dict) or stated != _digest(header):
        raise _damaged(folder / SETTINGS_FILE)
    if version == 2:
        settings = _from_version_2(settings)
    if set(settings) != _SETTINGS:
        raise _damaged(folder / SETTINGS_FILE)
    settings["gate"] = _part("gate", _GATES, settings["gate"])
    settings["edit"] = _part("edit", _EDITS, settings["edit"])
    if header.get("tensors_sha256") != hashlib.sha256(blob).hexdigest():
        raise _damaged(folder / TENSORS_FILE)
    try:
        tensors = load(blob)
    except SafetensorError as error:
        raise _damaged(folder / TENSORS_FILE) from error
    return tensors, settings


def _dict(part: Gate | Edit) -> dict[str, Any]:
    values = {field.name: vars(part)[field.name] for field in fields(part) if field.init}
    return {"kind": part.kind, **values}


def _part(name: str, kinds: Mapping[str, type[_Part]], stored: Any) -> _Part:
    """A gate or an edit from what `_dict` made of it."""
    values = dict(stored) if isinstance(stored, dict) else {"kind": stored}
    kind = values.pop("kind", None)
    check_choice(name, kind, tuple(kinds))
    try:
        return kinds[kind](**values)
    except TypeError as error:
        raise UserError(
            f"`{name}` must have the fields of its kind {kind!r}, got {sorted(values)} ({error}); "
            "save the guard again."
        ) from error


def _from_version_2(flat: dict[str, Any]) -> dict[str, Any]:
    """Settings as they were when gate and edit were names beside their numbers."""
    kept = {name: flat[name] for name in _SETTINGS & set(flat)}
    gate: dict[str, Any] = {"kind": flat.get("gate")}
    if gate["kind"] != "token":
        gate["threshold"] = flat.get("threshold")
    if gate["kind"] == "window":
        gate["size"] = flat.get("window_size")
    if gate["kind"] == "cusum":
        gate["leak"] = flat.get("leak")
    shared = {name: flat.get(name) for name in ("residual_norm", "trigger_limit")}
    edit = {"kind": flat.get("edit"), "value": flat.get("clamp_value")}
    edit |= {"unit": flat.get("clamp_unit"), **shared}
    if edit["kind"] == "clamp":
        edit["scope"] = flat.get("clamp_scope")
    return {**kept, "gate": gate, "edit": edit}


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise _damaged(path) from error
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise UserError(
            f"{path} must be a guard of format {_FORMAT!r}, got another file; pass the folder "
            "given to `save`."
        )
    return header


def _damaged(path: Path) -> UserError:
    return UserError(
        f"{path} must be as `save` wrote it, but is damaged or was altered; save the guard again."
    )


def _digest(header: dict[str, Any]) -> str:
    canonical = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
