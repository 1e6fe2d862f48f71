"""Steering CSV: guards in the files that steered models of lm-evaluation-harness read.

Two column sets go by that name. That of the paper "Don't Forget It!" and its fork of the harness
(`latent_idx, hook_action, ...`) writes SAE activations where they are positive and keeps the SAE's
error term: a guard with an `OpenGate` and a `Clamp` of active features, or a `Refusal`.

The harness itself (`feature_index, action, ...`) runs no encoder. Its `clamp` moves every token
until its projection on the decoder row is the coefficient, its `add` adds the row to every token,
and only the last row of a hook point counts. No guard does that, so these columns are never
written, and read only where the caller wants their features under a guard's clamp.

Neither knows which tokens count: special tokens are edited like others. A guard does that only
with `uncounted_ids=[]`.
"""

import csv
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from dsg.errors import UserError
from dsg.guard.edit import Clamp, Refusal
from dsg.guard.gate import OpenGate
from dsg.guard.group import GuardLike
from dsg.io import Table, read_table, write_atomically
from dsg.lm import uncounted_token_ids
from dsg.sae import Features, describe_sae, load_sae, slice_features

if TYPE_CHECKING:
    from sae_lens import SAE

_SHARED_COLUMNS = ("steering_coefficient", "sae_id", "sae_release", "description")
_REFUSAL_COLUMNS = ("refuse_id", "clamp_value")
_REQUIRED = ("latent_idx", "steering_coefficient", "sae_id", "sae_release")
_HARNESS_REQUIRED = ("loader", "sae_release", "hookpoint", "latent_idx", "steering_coefficient")
# What the harness calls columns of the paper.
_HARNESS_NAMES = {
    "latent_idx": "feature_index",
    "hook_action": "action",
    "sae_release": "sparse_model",
}
# The harness names modules from the model without its head.
_HARNESS_LAYER = re.compile(r"(?:layers|h)\.(\d+)")


def write_steering_csv(guard: GuardLike, path: str | Path, drop_gate: bool = False) -> Path:
    """Writes the guard in the columns of "Don't Forget It!", in one atomic step.

    One row per selected feature, in activation units. An SAE that came from a folder has the folder
    for a release and no id; only this library can load it.

    Args:
        guard: Made for a named SAE, with a `Refusal` or a `Clamp` of active features.
        path: File to write; the harness wants it to end in `.csv`.
        drop_gate: Write a guard with a sequence gate without it; the descriptions say so.

    Returns:
        The file.

    Raises:
        UserError: If the format cannot say what the guard does, or the guard's SAE is unknown.
    """
    gate, edit = guard.gate, guard.edit
    if not isinstance(gate, OpenGate) and not drop_gate:
        raise UserError(
            f"`gate` must be {OpenGate.kind!r}, because a steering CSV edits every sequence, got "
            f"{gate.kind!r}; pass drop_gate=True to leave the gate out."
        )
    if isinstance(edit, Clamp) and edit.scope == "all" and guard.num_selected > 1:
        raise UserError(
            "`scope` must be 'active', because a steering CSV writes a feature only where it is "
            "active itself, got 'all'; use guard.replace(scope='active')."
        )
    if isinstance(edit, Clamp) and edit.trigger_limit > 0:
        raise UserError(
            "`trigger_limit` must be 0, because a steering CSV clamps every activation above 0, "
            f"got {edit.trigger_limit}; use guard.replace(trigger_limit=0.0)."
        )
    if edit.unit == "residual_norm" and guard.features.normalization != "none":
        raise UserError(
            "`unit` must be 'activation', because a steering CSV writes one activation whatever "
            "the token's norm, got 'residual_norm' with an SAE that rescales its input; use "
            "guard.replace(unit='activation', value=...)."
        )
    release, sae_id = _sae_name(guard)
    descriptions = guard.facts.get("steering_csv", {}).get("descriptions", {})
    dropped = "" if isinstance(gate, OpenGate) else f"{gate.kind} gate left out"
    refusal = isinstance(edit, Refusal)
    ids = guard.features.feature_ids.tolist()
    limit = [ids[-1], _text(edit.trigger_limit)] if refusal else []
    value = _text(edit.written_value)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    columns = (*(_REFUSAL_COLUMNS if refusal else ()), *_SHARED_COLUMNS)
    writer.writerow(("latent_idx", "hook_action", *columns))
    action = "clamp_refusal" if refusal else "clamp"
    for feature_id in ids[: guard.num_selected]:
        description = "; ".join(filter(None, (descriptions.get(str(feature_id)), dropped)))
        writer.writerow((feature_id, action, *limit, value, sae_id, release, description))
    return write_atomically(Path(path), file.getvalue())


def read_steering_csv(
    path: str | Path,
    sae: "SAE[Any] | None" = None,
    *,
    tokenizer: PreTrainedTokenizerBase,
    hook_point: str | None = None,
    reinterpret: bool = False,
) -> tuple[Features, dict[str, Any]]:
    """The guard that a steering CSV describes, with an `OpenGate`.

    Special tokens stay uncounted, as in every guard; `guard.replace(uncounted_ids=[])` edits them
    as the harness does.

    Args:
        path: A file in the columns of "Don't Forget It!" or of lm-evaluation-harness.
        sae: The SAE; without it, the one that the file names is loaded.
        tokenizer: The model's tokenizer, which knows the special tokens.
        hook_point: Where to read and edit; without it, where the file or else the SAE says.
        reinterpret: Read the harness's `clamp` as a guard's clamp, which is another edit: where a
            feature is active, its activation becomes the coefficient.

    Returns:
        The features on the CPU, and the further arguments of `Guard`.

    Raises:
        UserError: If the file is unreadable or incomplete, its rows disagree, their action is no
            guard's, or a feature is not in the SAE.
    """
    table = _open(Path(path))
    refusal = _action(table, reinterpret=reinterpret) == "clamp_refusal"
    ids = table.integers("latent_idx")
    descriptions = dict(zip(map(str, ids), table.texts("description"), strict=True))
    value = table.one("steering_coefficient", table.numbers("steering_coefficient"))
    if refusal:
        ids = [*ids, table.one("refuse_id", table.integers("refuse_id"))]
        limit = table.one("clamp_value", table.numbers("clamp_value"))
        edit = Refusal(value, trigger_limit=limit)
    else:
        edit = Clamp(value, "active")
    release, sae_id = (table.one(name, table.texts(name)) for name in ("sae_release", "sae_id"))
    place = _hook_point(table)
    if sae is None:
        sae = _load(table, release, sae_id)
    name = [release, sae_id] if release else sae.cfg.metadata.loaded_from
    hook_point = hook_point or place or sae.cfg.metadata.hook_name
    if not isinstance(hook_point, str):
        raise UserError(
            f"`hook_point` must be given, because neither {path} nor its SAE names one, got None; "
            "pass for example 'blocks.7.hook_resid_post'."
        )
    pad_id = tokenizer.pad_token_id
    return slice_features(sae, ids).on(torch.device("cpu")), {
        "hook_point": hook_point,
        "uncounted_ids": uncounted_token_ids(tokenizer),
        "pad_id": pad_id if isinstance(pad_id, int) else None,
        "gate": OpenGate(),
        "edit": edit,
        "facts": {
            "sae": describe_sae(sae),
            "steering_csv": {"sae": name, "descriptions": descriptions},
        },
    }


def _open(path: Path) -> Table:
    """The file under the paper's column names, whichever set it has."""
    table = read_table(path)
    if _HARNESS_NAMES["latent_idx"] in table.rows[0]:
        table = replace(table, aliases=_HARNESS_NAMES)
    table.require(_HARNESS_REQUIRED if table.aliases else _REQUIRED)
    return table


def _action(table: Table, *, reinterpret: bool) -> str:
    """The file's action, if a guard does the like."""
    action = table.one("hook_action", table.texts("hook_action")) or "add"
    wanted = ["clamp"] if table.aliases else ["clamp", "clamp_refusal"]
    if action not in wanted:
        raise UserError(
            f"`{table.name('hook_action')}` in {table.path} must be one of {wanted}, got "
            f"{action!r}, which no guard does; change the rows."
        )
    if table.aliases and not reinterpret:
        raise UserError(
            f"`action` in {table.path} is the harness's 'clamp', which moves every token whether "
            "or not the feature is active, as no guard does; pass reinterpret=True to clamp active "
            "features instead."
        )
    if action == "clamp_refusal":
        table.require(_REFUSAL_COLUMNS)
    return action


def _hook_point(table: Table) -> str | None:
    hook_point = table.one("hookpoint", table.texts("hookpoint"))
    layer = _HARNESS_LAYER.fullmatch(hook_point)
    return f"blocks.{layer[1]}.hook_resid_post" if layer else hook_point or None


def _load(table: Table, release: str, sae_id: str) -> "SAE[Any]":
    loader = table.one("loader", table.texts("loader")) or "sae_lens"
    if loader != "sae_lens":
        raise UserError(
            f"`sae` must be given for {table.path}, because its loader {loader!r} is not that of "
            "SAELens, got None; pass the SAE."
        )
    return load_sae(release, sae_id or None)


def _sae_name(guard: GuardLike) -> tuple[str, str]:
    """Release and id of the guard's SAE; the id is empty for a folder."""
    facts = guard.facts
    name = facts.get("steering_csv", {}).get("sae") or facts.get("sae", {}).get("loaded_from")
    if not name or not name[0]:
        raise UserError(
            "`facts` must name the guard's SAE, because a steering CSV refers to it, got none; "
            "use guard.replace(facts={**guard.facts, 'sae': {'loaded_from': [release, sae_id]}})."
        )
    return name[0], name[1] or ""


def _text(number: float) -> str:
    """The shortest text that reads as exactly this number."""
    return repr(number).removesuffix(".0")
