"""Features of top-k and matching-pursuit SAEs, which compete with each other for every token."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from dsg.errors import UserError, check_choice
from dsg.sae.features import Features, FeatureSlice, Normalization

COMPETING = ("topk", "matching_pursuit")

_PLACE_AND_ORIGIN = ("device", "metadata")


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
