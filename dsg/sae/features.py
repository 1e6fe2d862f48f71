"""The selected features of an SAE: what a guard reads and writes."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dsg.errors import UserError, check_choice

# SAELens's names. Both depend on the token alone, so they are exact for a few features as well.
Normalization = Literal["none", "layer_norm", "constant_norm_rescale"]

_LAYER_NORM_EPSILON = 1e-5  # SAELens's constant
# Architectures whose features compete with each other for every token.
COMPETING = ("topk", "matching_pursuit")
_PLACE_AND_ORIGIN = ("device", "metadata")


class Features(nn.Module, ABC):
    """`k` features of one SAE, as buffers: their activations and their decoder rows.

    They move between devices but keep their dtypes: `model.to(torch.bfloat16)` and Lightning's
    `bf16-true` cast every submodule, and a gate's decision must not follow the model's precision.

    Args:
        feature_ids: Ids in the SAE, unique and at least 0.
        W_dec: Decoder rows.
        normalization: What the SAE does to its input at run time, and undoes on its output.

    Raises:
        UserError: If there is no feature, ids repeat or are negative, shapes disagree, or a value
            is not finite.
    """

    feature_ids: Tensor
    W_dec: Tensor

    def __init__(
        self,
        feature_ids: Int[Tensor, " k"],
        W_dec: Float[Tensor, "k d_in"],
        normalization: Normalization,
    ) -> None:
        super().__init__()
        check_choice("normalization", normalization, get_args(Normalization))
        self.normalization: Normalization = normalization
        self._add("feature_ids", feature_ids, (W_dec.shape[0],))
        self._add("W_dec", W_dec, tuple(W_dec.shape))
        check_feature_ids(feature_ids.tolist())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Features":
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), recurse)

    @property
    def num_features(self) -> int:
        """Number of features, k."""
        return self.W_dec.shape[0]

    @property
    def d_in(self) -> int:
        """Width of the hook point."""
        return self.W_dec.shape[1]

    def on(self, device: torch.device) -> "Features":
        """These features on a device: themselves if they are there, else a copy."""
        return self if self.W_dec.device == device else copy.deepcopy(self).to(device)

    def encode(self, h: Float[Tensor, "*axes d_in"]) -> Float[Tensor, "*axes k"]:
        """Activations of the selected features, at least 0, differentiable, at least in float32.

        Raises:
            UserError: If `h` has another width.
        """
        # Autocast would run the product in half precision and move features across thresholds.
        with torch.autocast(h.device.type, enabled=False):
            return self._encode(self._normalised(h))

    def margin(self, h: Float[Tensor, "*axes d_in"]) -> Float[Tensor, "*axes k"]:
        """How far each selected feature is from firing, differentiable, at least in float32.

        In activation units: above 0 exactly where the feature is active. Where a competing feature
        is not active it is -inf, because its distance depends on all the others.

        Raises:
            UserError: If `h` has another width.
        """
        with torch.autocast(h.device.type, enabled=False):
            return self._margin(self._normalised(h))

    def output_scale(self, h: Float[Tensor, "*axes d_in"]) -> Float[Tensor, "*axes 1"] | None:
        """Units of the residual stream per unit of decoder output; None where they are the same."""
        x = h.to(torch.promote_types(h.dtype, self.W_dec.dtype))
        if self.normalization == "layer_norm":
            return x.std(-1, keepdim=True)
        if self.normalization == "constant_norm_rescale":
            return x.norm(dim=-1, keepdim=True) / self.d_in**0.5
        return None

    def _normalised(self, h: Float[Tensor, "*axes d_in"]) -> Float[Tensor, "*axes d_in"]:
        if h.shape[-1] != self.d_in:
            raise UserError(
                f"the hook point must be {self.d_in} wide like the SAE's input, got "
                f"{h.shape[-1]}; choose a decoder layer."
            )
        x = h.to(torch.promote_types(h.dtype, self.W_dec.dtype))
        if self.normalization == "layer_norm":
            x = x - x.mean(-1, keepdim=True)
            x = x / (x.std(-1, keepdim=True) + _LAYER_NORM_EPSILON)
        elif self.normalization == "constant_norm_rescale":
            x = x * (self.d_in**0.5 / x.norm(dim=-1, keepdim=True))
        return x

    @property
    @abstractmethod
    def encoder(self) -> dict[str, Any]:
        """What `rebuild_features` needs besides the state dict, representable in JSON."""

    @abstractmethod
    def _encode(self, x: Float[Tensor, "*axes d_in"]) -> Float[Tensor, "*axes k"]:
        """Activations of the selected features for normalised input."""

    def _margin(self, x: Float[Tensor, "*axes d_in"]) -> Float[Tensor, "*axes k"]:
        """Distance from firing for normalised input."""
        acts = self._encode(x)
        return acts.masked_fill(acts <= 0, -torch.inf)

    def _add(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != shape:
            raise UserError(
                f"`{name}` must have shape {shape} to fit `W_dec`, got {tuple(tensor.shape)}; "
                "take all tensors from one SAE."
            )
        if not tensor.isfinite().all():
            raise UserError(f"`{name}` must be finite, got nan or inf; check the SAE's weights.")
        self.register_buffer(name, tensor.detach())


class FeatureSlice(Features):
    """Features that do not compete: only their own encoder columns are kept.

    z = relu(p * magnitude_scale + magnitude_bias) where p + b_enc > activation_threshold, and 0
    elsewhere, with p = x @ W_enc. Standard and JumpReLU SAEs have the same bias in both places and
    no scale; a gated SAE has two biases. `b_dec` is folded into the biases where the SAE subtracts
    it from its input.

    Args:
        feature_ids: Ids in the SAE, unique and at least 0.
        W_enc: Encoder columns.
        b_enc: Encoder biases.
        activation_threshold: Pre-activation above which a feature is active, at least 0 or the
            JumpReLU's own threshold.
        W_dec: Decoder rows.
        magnitude_scale: Factor of the magnitude path; None for 1.
        magnitude_bias: Bias of the magnitude path; None for `b_enc`.
        normalization: What the SAE does to its input at run time.

    Raises:
        UserError: See `Features`.
    """

    W_enc: Tensor
    b_enc: Tensor
    activation_threshold: Tensor
    magnitude_scale: Tensor
    magnitude_bias: Tensor

    def __init__(
        self,
        feature_ids: Int[Tensor, " k"],
        W_enc: Float[Tensor, "d_in k"],
        b_enc: Float[Tensor, " k"],
        activation_threshold: Float[Tensor, " k"],
        W_dec: Float[Tensor, "k d_in"],
        magnitude_scale: Float[Tensor, " k"] | None = None,
        magnitude_bias: Float[Tensor, " k"] | None = None,
        normalization: Normalization = "none",
    ) -> None:
        super().__init__(feature_ids, W_dec, normalization)
        k, d_in = W_dec.shape
        self._add("W_enc", W_enc, (d_in, k))
        self._add("b_enc", b_enc, (k,))
        self._add("activation_threshold", activation_threshold, (k,))
        scale = torch.ones_like(b_enc) if magnitude_scale is None else magnitude_scale
        self._add("magnitude_scale", scale, (k,))
        # A copy: safetensors refuses two names for one tensor.
        bias = b_enc.clone() if magnitude_bias is None else magnitude_bias
        self._add("magnitude_bias", bias, (k,))

    @property
    def encoder(self) -> dict[str, Any]:
        """The run-time normalisation."""
        return {"kind": "slice", "normalization": self.normalization}

    def _encode(self, x: Float[Tensor, "*axes d_in"]) -> Float[Tensor, "*axes k"]:
        pre, magnitude = self._paths(x)
        active = pre + self.b_enc.to(x.dtype) > self.activation_threshold.to(x.dtype)
        return magnitude.relu() * active

    def _margin(self, x: Float[Tensor, "*axes d_in"]) -> Float[Tensor, "*axes k"]:
        pre, magnitude = self._paths(x)
        above = pre + self.b_enc.to(x.dtype) - self.activation_threshold.to(x.dtype)
        return torch.minimum(above, magnitude)

    def _paths(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pre-activation without its bias, and the magnitude that an active feature has."""
        pre = x @ self.W_enc.to(x.dtype)
        return pre, pre * self.magnitude_scale.to(x.dtype) + self.magnitude_bias.to(x.dtype)


class CompetingFeatures(Features):
    """Features whose activity depends on all others of the token: the whole encoder is kept.

    Activations come from SAELens, in the precision of the weights.

    Args:
        feature_ids: Ids in the SAE, unique and at least 0.
        W_dec: Decoder rows as they enter the reconstruction.
        weights: All weights of the SAE, by SAELens's names.
        config: The SAE's configuration as SAELens writes it.
        normalization: What the SAE does to its input at run time.

    Raises:
        UserError: See `Features`; or configuration and weights do not belong together.
    """

    def __init__(
        self,
        feature_ids: Int[Tensor, " k"],
        W_dec: Float[Tensor, "k d_in"],
        weights: Mapping[str, Tensor],
        config: Mapping[str, Any],
        normalization: Normalization = "none",
    ) -> None:
        super().__init__(feature_ids, W_dec, normalization)
        check_choice("architecture", str(config.get("architecture")), COMPETING)
        kept = {name: config[name] for name in config if name not in _PLACE_AND_ORIGIN}
        # The input arrives normalised.
        self.config = {**kept, "normalize_activations": "none"}
        self.sae = _sae_of_buffers(self.config, weights)

    @property
    def encoder(self) -> dict[str, Any]:
        """The SAE's configuration and the run-time normalisation."""
        return {"kind": "competing", "normalization": self.normalization, "sae": self.config}

    def _encode(self, x: Float[Tensor, "*axes d_in"]) -> Float[Tensor, "*axes k"]:
        # Matching pursuit needs a batch axis.
        acts = self.sae.encode(x.reshape(-1, self.d_in))[..., self.feature_ids]
        return acts.reshape(*x.shape[:-1], -1)


def rebuild_features(tensors: Mapping[str, Tensor], encoder: Mapping[str, Any]) -> Features:
    """Features from their state dict and what `encoder` returned.

    Raises:
        UserError: If they do not belong together.
    """
    try:
        if encoder["kind"] == "slice":
            return FeatureSlice(**tensors, normalization=encoder["normalization"])
        weights = {name[4:]: tensor for name, tensor in tensors.items() if name.startswith("sae.")}
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith("sae.")}
        normalization = encoder["normalization"]
        return CompetingFeatures(
            **own, weights=weights, config=encoder["sae"], normalization=normalization
        )
    except (KeyError, TypeError) as error:
        raise UserError(
            f"the tensors {sorted(tensors)} must be those of a guard's features, but they do not "
            f"fit its encoder ({error}); save the guard again."
        ) from error


def check_finite(
    h: Float[Tensor, "batch seq d_in"], counted: Bool[Tensor, "batch seq"], hook_point: str
) -> None:
    """Refuses activations from which a gate could decide nothing; padding may hold anything.

    Raises:
        UserError: If a counted token's activations are not finite.
    """
    # A sum shows every nan and inf at a fraction of the cost of looking at each number.
    finite = h.sum(-1, dtype=torch.promote_types(h.dtype, torch.float32)).isfinite()
    if not (finite | ~counted).all():
        raise UserError(
            f"the activations at {hook_point!r} must be finite, got nan or inf in "
            f"{int((~finite & counted).sum())} tokens; check the model's weights and precision."
        )


def check_feature_ids(feature_ids: Sequence[int], d_sae: int | None = None) -> None:
    """Refuses ids that repeat, are missing altogether, or are out of range.

    Raises:
        UserError: If they do.
    """
    bound = f" and below d_sae {d_sae}" if d_sae is not None else ""
    bad = [i for i in feature_ids if i < 0 or (d_sae is not None and i >= d_sae)]
    if not feature_ids or bad or len(set(feature_ids)) != len(feature_ids):
        raise UserError(
            f"`feature_ids` must be at least one id, unique, not negative{bound}, got "
            f"{bad or list(feature_ids)}; correct the list."
        )


def _sae_of_buffers(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Any:
    # SAELens takes seconds to import, and other guards need none of it.
    from sae_lens.registry import get_sae_class

    sae_class, config_class = get_sae_class(config["architecture"])
    sae: Any = sae_class(config_class.from_dict({**config, "device": "cpu"}))
    if set(weights) != set(dict(sae.named_parameters())):
        raise UserError(
            f"an SAE of architecture {config['architecture']!r} must have the weights "
            f"{sorted(dict(sae.named_parameters()))}, got {sorted(weights)}; save the guard again."
        )
    for name, parameter in list(sae.named_parameters()):
        weight = weights[name]
        if weight.shape != parameter.shape or not weight.isfinite().all():
            raise UserError(
                f"`{name}` must be finite and of shape {list(parameter.shape)}, got shape "
                f"{list(weight.shape)}; check the SAE's weights."
            )
        # A guard trains nothing: optimizers and DDP must find no parameter in it.
        delattr(sae, name)
        sae.register_buffer(name, weight.detach())
    return sae
