"""The hooks of an attached guard: put in place, watched, and taken away."""

from collections.abc import Callable, Sequence

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.hooks import RemovableHandle

from dsg.errors import UserError
from dsg.guard.following import Follower
from dsg.lm import recompile


class Wiring:
    """Hooks on a model and on the modules inside it that a guard must see.

    Args:
        models: The model as it was given, and the Hugging Face model inside it.
        decoder: Its stack of decoder layers.
        layers: The guarded layers.
    """

    def __init__(
        self, models: Sequence[nn.Module], decoder: nn.Module, layers: Sequence[nn.Module]
    ) -> None:
        self._models = list(dict.fromkeys(models))
        self._decoder, self._layers = decoder, list(layers)
        self._handles: list[RemovableHandle] = []
        self._watch: RemovableHandle | None = None
        self._undo: Callable[[], None] = _nothing

    def put(self, hooks: Follower) -> None:
        """Puts the hooks in place."""
        for module in self._models:
            self._handles += [
                module.register_forward_pre_hook(hooks.before_model, with_kwargs=True),
                module.register_forward_hook(hooks.after_model, always_call=True),
            ]
        decoder, after = self._decoder, hooks.after_layer
        self._handles += [
            decoder.register_forward_pre_hook(hooks.before_decoder, with_kwargs=True),
            decoder.register_forward_hook(hooks.after_decoder, with_kwargs=True, always_call=True),
            # First of all hooks, so that `output_hidden_states` always records the edited stream.
            *(layer.register_forward_hook(after, prepend=True) for layer in self._layers),
        ]
        self._watch = register_module_module_registration_hook(self._refuse_another_decoder)
        self._undo = recompile((self._decoder, *self._layers))

    def remove(self) -> None:
        """Takes away whatever is still in place."""
        for handle in (*self._handles, *filter(None, [self._watch])):
            handle.remove()
        self._handles.clear()
        self._undo()
        self._undo = _nothing

    def check(self) -> None:
        """Refuses a model on which the hooks can see nothing.

        Raises:
            UserError: If a hook was removed, or the decoder replaced.
        """
        if not self.intact():
            raise hook_removed()
        decoder = self._models[-1].get_decoder()  # type: ignore[operator]
        if decoder is not self._decoder and not _contains(decoder, self._decoder):
            raise _decoder_replaced(decoder)

    def intact(self) -> bool:
        """Whether every hook is still where it was put."""
        hooks = [(handle.id, handle.hooks_dict_ref()) for handle in self._handles]
        return all(registered is not None and id in registered for id, registered in hooks)

    def _refuse_another_decoder(
        self, parent: nn.Module, name: str, child: nn.Module | None
    ) -> None:
        present = parent._modules.get(name)
        if (
            _contains(present, self._decoder)
            and not _contains(child, self._decoder)
            and _contains(self._models[-1], parent)
        ):
            raise _decoder_replaced(child)


def hook_removed() -> UserError:
    """The error for a guard whose hooks are not all in place."""
    return UserError(
        "a guard's hooks must stay in place while it is attached, but one was removed, so the "
        "model may have run unguarded; leave the `with` block instead of removing hooks."
    )


def _nothing() -> None:
    """No hooks are in place."""


def _contains(module: nn.Module | None, part: nn.Module) -> bool:
    return module is not None and any(part is inner for inner in module.modules())


def _decoder_replaced(other: nn.Module | None) -> UserError:
    return UserError(
        "the model's decoder must stay the one that the guard was attached to, got another "
        f"{type(other).__name__}; leave the `with` block, replace it, and attach the guard again."
    )
