"""Hooks and `torch.compile`: graphs that were compiled before a hook came never see it."""

import threading
import types
import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import nn

_Function = TypeVar("_Function", bound=Callable[..., Any])

_uses: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def never_compiled(function: _Function) -> _Function:
    """A function that runs as it is written, also when it is called from a compiled one."""
    return torch.compiler.disable(function)  # type: ignore[return-value]


def uncompiled(module: nn.Module) -> nn.Module:
    """The module inside one that `torch.compile` returned; others as they are."""
    return dict(module.named_children()).get("_orig_mod", module)


def recompile(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """Sets aside what was compiled before with these modules in it, until the result is called.

    Graphs do not watch for hooks, but they do watch whether a module has a `forward` of its own.
    The one that it gets here is its class's.

    Args:
        modules: Those that have been given hooks; one with another `forward` stays as it is.

    Returns:
        What takes the forwards away again, once nobody else needs them; to be called once.
    """
    inside = [uncompiled(module) for module in modules]
    with _lock:
        for module in inside:
            _uses[module] = _uses.get(module, 0) + 1
            if "forward" not in vars(module):
                vars(module)["forward"] = types.MethodType(type(module).forward, module)

    def undo() -> None:
        with _lock:
            for module in inside:
                _uses[module] -= 1
                own = vars(module).get("forward")
                of_class = types.MethodType(type(module).forward, module)
                if _uses[module] == 0 and own == of_class:
                    del vars(module)["forward"]

    return undo
