"""The settings of a guard: whether they make sense."""

from collections.abc import Collection, Mapping
from numbers import Integral, Real
from typing import Any

from dsg.errors import UserError


def check_kinds(
    hook_point: Any,
    uncounted_ids: Any,
    pad_id: Any,
    window_size: Any,
    leak: Any,
    facts: Any,
) -> None:
    """Refuses settings that are of another kind than those of a guard, as in an edited file.

    Raises:
        UserError: If one is.
    """
    ids = uncounted_ids if isinstance(uncounted_ids, Collection) else [None]
    wanted = {
        "hook_point": ("a name", hook_point, isinstance(hook_point, str)),
        "uncounted_ids": ("a list of token ids", uncounted_ids, all(map(_is_id, ids))),
        "pad_id": ("a token id or None", pad_id, pad_id is None or _is_id(pad_id)),
        "window_size": ("a number", window_size, window_size is None or _is_number(window_size)),
        "leak": ("a number", leak, leak is None or _is_number(leak)),
        "facts": ("a mapping", facts, facts is None or isinstance(facts, Mapping)),
    }
    for name, (kind, value, fits) in wanted.items():
        if not fits:
            raise UserError(f"`{name}` must be {kind}, got {value!r}; correct it.")


def check_numbers(
    gate: str, threshold: Any, clamp_value: Any, residual_norm: Any, trigger_limit: Any
) -> None:
    """Refuses numbers that are none, or out of range.

    Raises:
        UserError: If one is.
    """
    highest, infinity = float("inf") if gate == "cusum" else 1.0, float("inf")
    if not _is_number(threshold) or not 0.0 <= threshold <= highest or threshold == infinity:
        wanted = "finite and at least 0" if gate == "cusum" else "a density in [0, 1]"
        raise UserError(
            f"`threshold` must be {wanted} for the gate {gate!r}, got {threshold!r}; calibrate it "
            "on retain text."
        )
    if not _is_number(clamp_value) or not abs(clamp_value) < infinity:
        raise UserError(f"`clamp_value` must be a finite number, got {clamp_value!r}; try -500.0.")
    if not _is_number(trigger_limit) or not 0.0 <= trigger_limit < infinity:
        raise UserError(
            f"`trigger_limit` must be finite and at least 0, got {trigger_limit!r}; 0 takes every "
            "active feature."
        )
    if residual_norm is not None and not (
        _is_number(residual_norm) and 0.0 < residual_norm < infinity
    ):
        raise UserError(
            f"`residual_norm` must be finite and above 0, got {residual_norm!r}; measure it on "
            "text."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_id(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
