"""Representation misdirection for unlearning (RMU): the weight-changing baseline.

On forget text the activations at a hook point are pulled to one fixed random direction, on retain
text they are held where the original model has them. Li et al., "The WMDP Benchmark", 2024.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.func import functional_call

from dsg.errors import UserError
from dsg.hooks import decoder_of, hidden_states, resolve_hook_point
from dsg.tokens import TokenBatch


class RMULoss(NamedTuple):
    """The loss that is minimised and its two parts, before weighting."""

    total: Float[Tensor, ""]
    forget: Float[Tensor, ""]
    retain: Float[Tensor, ""]


class RMU(nn.Module):
    """The RMU objective for one model; freezes all of its weights but the chosen ones.

    The reference is the model as it is now, also when several requests follow each other: the
    original values of the chosen weights are kept, everything else is frozen anyway.

    Args:
        model: The causal LM to change, wrapped or not.
        hook_point: Decoder layer l whose output is steered, such as `blocks.2.hook_resid_post`.
        steering: Norm of the control vector, in activation units.
        alpha: Weight of the retain term.
        seed: Of the control vector, which is drawn once.
        num_layers: Layers that may change: l and the ones before it.
        target: Part of the names of the weights that may change.

    Raises:
        UserError: `hook_point` is no decoder layer, or no weight of these layers matches `target`.
    """

    control: Float[Tensor, " d_in"]

    def __init__(
        self,
        model: nn.Module,
        hook_point: str,
        *,
        steering: float = 2.0,
        alpha: float = 20.0,
        seed: int = 0,
        num_layers: int = 3,
        target: str = "mlp.down_proj",
    ) -> None:
        super().__init__()
        self.hook_point = hook_point
        self.alpha = alpha
        names = trainable_names(model, hook_point, num_layers, target)
        model.requires_grad_(False)
        decoder = decoder_of(model)
        self.trainable = tuple(names)
        for index, name in enumerate(names):
            weight = decoder.get_parameter(name).requires_grad_(True)
            # Buffers move with the module; `persistent=False` keeps checkpoints small.
            original = weight.detach().clone()
            self.register_buffer(f"original_{index}", original, persistent=False)
        d_in = decoder.get_parameter(names[-1]).shape[0]
        self.register_buffer("control", steering * control_direction(d_in, seed))

    def forward(self, model: nn.Module, forget: TokenBatch, retain: TokenBatch) -> RMULoss:
        """The loss on a forget and a retain batch; only counted tokens enter it."""
        with torch.no_grad():
            reference = self._activations(model, retain, original=True)
        forget_loss = masked_mse(self._activations(model, forget), self.control, forget.token_mask)
        retain_loss = masked_mse(self._activations(model, retain), reference, retain.token_mask)
        return RMULoss(forget_loss + self.alpha * retain_loss, forget_loss, retain_loss)

    def _activations(
        self, model: nn.Module, batch: TokenBatch, original: bool = False
    ) -> Float[Tensor, "batch seq d_in"]:
        captured: list[Tensor] = []
        layer = resolve_hook_point(model, self.hook_point)
        handle = layer.register_forward_hook(
            lambda _module, _args, output: captured.append(hidden_states(output))
        )
        weights = {
            name: self.get_buffer(f"original_{index}") for index, name in enumerate(self.trainable)
        }
        try:
            # The decoder alone: no logits are needed.
            functional_call(
                decoder_of(model),
                weights if original else {},
                kwargs={**batch.model_inputs(), "use_cache": False},
            )
        finally:
            handle.remove()
        return captured[0]


def masked_mse(
    activations: Float[Tensor, "batch seq d_in"],
    target: Float[Tensor, "batch seq d_in"] | Float[Tensor, " d_in"],
    token_mask: Bool[Tensor, "batch seq"],
) -> Float[Tensor, ""]:
    """Squared distance, averaged over `d_in` and then over the counted tokens, in float32."""
    per_token = (activations.float() - target.float()).square().mean(dim=-1)
    return per_token[token_mask].mean()


def control_direction(d_in: int, seed: int) -> Float[Tensor, " d_in"]:
    """A unit vector of uniform non-negative numbers, the same on every device and rank."""
    direction = torch.rand(d_in, generator=torch.Generator().manual_seed(seed))
    return direction / direction.norm()


def trainable_names(
    model: nn.Module, hook_point: str, num_layers: int = 3, target: str = "mlp.down_proj"
) -> list[str]:
    """Decoder weights that RMU may change: those of `num_layers` layers up to the hook point.

    Returns:
        Parameter names within the decoder, such as `layers.2.mlp.down_proj.weight`.

    Raises:
        UserError: See `RMU`.
    """
    decoder = decoder_of(model)
    layer = resolve_hook_point(model, hook_point)
    path = next((name for name, module in decoder.named_modules() if module is layer), "")
    prefix, _, index = path.rpartition(".")
    if not index.isdigit():
        raise UserError(
            f"`hook_point` must name a decoder layer for RMU, got {hook_point!r}; use a name such "
            "as 'blocks.2.hook_resid_post'."
        )
    layers = range(max(0, int(index) - num_layers + 1), int(index) + 1)
    names = [
        name
        for number in layers
        for name, _ in decoder.named_parameters()
        if name.startswith(f"{prefix}.{number}.") and target in name
    ]
    if not names:
        raise UserError(
            f"`target` must be part of a weight's name in layers {layers[0]} to {layers[-1]}, got "
            f"{target!r}; look the names up in the model's named_parameters()."
        )
    return names
