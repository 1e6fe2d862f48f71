"""Representation misdirection for unlearning (RMU): the weight-changing baseline.

On forget text the activations at a hook point are pulled to one fixed random direction, on retain
text they are held where the original model has them. Li et al., "The WMDP Benchmark", 2024.
"""

from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.func import functional_call

from dsg.errors import UserError
from dsg.lm import Reference, TokenBatch, decoder_of, hidden_size, hidden_states, resolve_hook_point
from dsg.objectives.objective import Objective
from dsg.objectives.terms import Loss, check_not_negative, check_positive, weighted


class RMU(Objective):
    """MSE(activations(forget), control vector) + alpha * MSE(activations(retain), original ones).

    Needs no other reference than the chosen weights as `prepare` found them, which it keeps;
    everything else is frozen. They stay the reference when several requests follow each other.

    Args:
        hook_point: Decoder layer l whose output is steered, such as `blocks.2.hook_resid_post`.
        steering: Norm of the control vector, in activation units, > 0.
        alpha: Weight of the retain term, >= 0.
        num_layers: Layers that may change, >= 1: l and the ones before it.
        target: Part of the names of the weights that may change.
        control_seed: Of the control vector, which is drawn once.

    Raises:
        UserError: A number is out of its range.
    """

    name: ClassVar[str] = "rmu"

    def __init__(
        self,
        hook_point: str,
        *,
        steering: float = 2.0,
        alpha: float = 20.0,
        num_layers: int = 3,
        target: str = "mlp.down_proj",
        control_seed: int = 0,
    ) -> None:
        check_positive(steering=steering, num_layers=num_layers)
        check_not_negative(alpha=alpha)
        self.hook_point = hook_point
        self.steering = steering
        self.alpha = alpha
        self.num_layers = num_layers
        self.target = target
        self.control_seed = control_seed
        self.original: dict[str, Tensor] = {}
        self.control = torch.empty(0)

    def prepare(self, model: nn.Module) -> None:
        """Freeze all weights but the chosen ones and keep those as they are.

        With an adapter, the chosen weights are those that the adapter puts into these layers.

        Raises:
            UserError: `hook_point` is no decoder layer, no weight of these layers matches `target`,
                or all that do are frozen.
        """
        names = trainable_names(model, self.hook_point, self.num_layers, self.target)
        decoder = decoder_of(model)
        chosen = {name: decoder.get_parameter(name) for name in names}
        chosen = {name: weight for name, weight in chosen.items() if weight.requires_grad}
        if not chosen:
            raise UserError(
                f"`target` must match weights that are trained, got {self.target!r}, which matches "
                f"frozen ones such as {names[0]!r}; with LoRA, choose `lora_targets` in these "
                "layers."
            )
        model.requires_grad_(False)
        for weight in chosen.values():
            weight.requires_grad_(True)
        self.original = {name: weight.detach().clone() for name, weight in chosen.items()}
        self.control = self.steering * control_direction(hidden_size(model), self.control_seed)

    def __call__(
        self,
        model: nn.Module,
        forget: TokenBatch,
        retain: TokenBatch,
        *,
        reference: Reference | None = None,
        step: int | None = None,
    ) -> Loss:
        """The loss on a forget and a retain batch; only counted tokens enter it."""
        del reference, step
        with torch.no_grad():
            original = self._activations(model, retain, original=True)
        steered = self._activations(model, forget)
        # Nothing else moves what was kept: a Trainer only moves what is registered.
        self.control = self.control.to(steered.device)
        forget_loss = masked_mse(steered, self.control, forget.token_mask)
        retain_loss = masked_mse(self._activations(model, retain), original, retain.token_mask)
        return weighted(forget_loss, retain_loss, 1.0, self.alpha)

    def _activations(
        self, model: nn.Module, batch: TokenBatch, original: bool = False
    ) -> Float[Tensor, "batch seq d_in"]:
        captured: list[Tensor] = []
        layer = resolve_hook_point(model, self.hook_point)
        handle = layer.register_forward_hook(
            lambda _module, _args, output: captured.append(hidden_states(output))
        )
        device = batch.input_ids.device
        self.original = {name: weight.to(device) for name, weight in self.original.items()}
        try:
            # The decoder alone: no logits are needed.
            functional_call(
                decoder_of(model),
                self.original if original else {},
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
