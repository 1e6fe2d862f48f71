"""Loading sparse autoencoders and cutting out the few features that a guard needs."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsg.errors import UserError

if TYPE_CHECKING:
    from sae_lens import SAE

_GEMMA_SCOPE_FILE = "params.npz"
_GEMMA_SCOPE_KEYS = {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"}
_REFUSED = {
    "topk": "whether a feature is active depends on all other features of the token",
    "batchtopk": "which features are active depends on the other tokens of the batch",
    "matryoshka_batchtopk": "which features are active depends on the other tokens of the batch",
    "gated": "its activations come from two encoder paths",
    "transcoder": "it reads one place of the model and reconstructs another",
    "skip_transcoder": "it reads one place of the model and reconstructs another",
}
# Factors that SAELens folds into the weights, so that nothing is left to do at run time.
_FOLDED_NORMALIZATIONS = ("none", None, "expected_average_only_in")


class DeviceOnlyModule(nn.Module):
    """A module of buffers that moves between devices but keeps its dtypes.

    `model.to(torch.bfloat16)` and Lightning's `bf16-true` cast every submodule; a gate's decision
    must not follow the model's precision.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DeviceOnlyModule":
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor.new_empty(0)).device)

        return super()._apply(move, recurse)


class FeatureSlice(DeviceOnlyModule):
    """Encoder and decoder of `k` selected features, as buffers.

    `b_dec` is folded into `b_enc` where the SAE subtracts it from its input.

    Args:
        feature_ids: Ids in the SAE, unique and at least 0.
        W_enc: Encoder columns.
        b_enc: Encoder biases.
        activation_threshold: Pre-activation above which a feature is active, at least 0 or the
            JumpReLU's own threshold.
        W_dec: Decoder rows.

    Raises:
        UserError: If there is no feature, ids repeat or are negative, shapes disagree, or a value
            is not finite.
    """

    feature_ids: Tensor
    W_enc: Tensor
    b_enc: Tensor
    activation_threshold: Tensor
    W_dec: Tensor

    def __init__(
        self,
        feature_ids: Int[Tensor, " k"],
        W_enc: Float[Tensor, "d_in k"],
        b_enc: Float[Tensor, " k"],
        activation_threshold: Float[Tensor, " k"],
        W_dec: Float[Tensor, "k d_in"],
    ) -> None:
        super().__init__()
        k, d_in = W_dec.shape
        wanted = {
            "feature_ids": (feature_ids, (k,)),
            "W_enc": (W_enc, (d_in, k)),
            "b_enc": (b_enc, (k,)),
            "activation_threshold": (activation_threshold, (k,)),
            "W_dec": (W_dec, (k, d_in)),
        }
        for name, (tensor, shape) in wanted.items():
            if tuple(tensor.shape) != shape:
                raise UserError(
                    f"`{name}` must have shape {shape} to fit `W_dec`, got "
                    f"{tuple(tensor.shape)}; slice all tensors from one SAE."
                )
            if not tensor.isfinite().all():
                raise UserError(
                    f"`{name}` must be finite, got nan or inf; check the SAE's weights."
                )
            self.register_buffer(name, tensor.detach())
        _check_ids(feature_ids.tolist())

    @property
    def num_features(self) -> int:
        """Number of features, k."""
        return self.W_dec.shape[0]

    @property
    def d_in(self) -> int:
        """Width of the hook point."""
        return self.W_dec.shape[1]

    def on(self, device: torch.device) -> "FeatureSlice":
        """This slice on a device: itself if it is there, else a copy."""
        return self if self.W_dec.device == device else copy.deepcopy(self).to(device)

    def encode(self, h: Float[Tensor, "*axes d_in"]) -> Float[Tensor, "*axes k"]:
        """Activations of the selected features, differentiable, at least in float32.

        Args:
            h: Hook-point activations of any float dtype.

        Returns:
            Activations, at least 0, in the wider of float32, this slice's dtype and `h`'s.
        """
        dtype = torch.promote_types(h.dtype, self.W_enc.dtype)
        # Autocast would run the product in half precision and move features across thresholds.
        with torch.autocast(h.device.type, enabled=False):
            pre = h.to(dtype) @ self.W_enc.to(dtype) + self.b_enc.to(dtype)
            return pre.relu() * (pre > self.activation_threshold.to(dtype))


def slice_features(sae: "SAE[Any]", feature_ids: Sequence[int]) -> FeatureSlice:
    """Cuts features out of a standard or JumpReLU SAE.

    Args:
        sae: An SAE of SAELens.
        feature_ids: Ids to keep, in this order.

    Raises:
        UserError: If the architecture, input normalisation or reshaping is unsupported, or an id
            is repeated or out of range.
    """
    _check_supported(sae)
    _check_ids(list(feature_ids), sae.cfg.d_sae)
    ids = torch.tensor(list(feature_ids), dtype=torch.long, device=sae.W_enc.device)
    dtype = torch.promote_types(sae.W_enc.dtype, torch.float32)
    # Clones: the SAE is usually freed afterwards, and a view would keep all of it alive.
    W_enc = sae.W_enc.detach()[:, ids].to(dtype, copy=True)
    b_enc = getattr(sae, "b_enc").detach()[ids].to(dtype, copy=True)  # noqa: B009
    if sae.cfg.apply_b_dec_to_input:
        b_enc = (b_enc.double() - sae.b_dec.detach().double() @ W_enc.double()).to(dtype)
    threshold = torch.zeros_like(b_enc)
    if sae.cfg.architecture() == "jumprelu":
        threshold = getattr(sae, "threshold").detach()[ids].to(dtype, copy=True)  # noqa: B009
    return FeatureSlice(
        feature_ids=ids,
        W_enc=W_enc,
        b_enc=b_enc,
        activation_threshold=threshold,
        W_dec=sae.W_dec.detach()[ids].to(dtype, copy=True),
    )


def load_sae(release_or_path: str, sae_id: str | None = None, device: str = "cpu") -> "SAE[Any]":
    """Loads an SAE from the hub or from disk, at least in float32.

    Args:
        release_or_path: A release of SAELens's list, a Hugging Face repository, a folder written
            by SAELens, or a folder that holds Gemma Scope's `params.npz`.
        sae_id: Id within the release; not given for a folder.
        device: Where the weights go.

    Raises:
        UserError: If the folder holds no SAE, or the release cannot be loaded.
    """
    folder = Path(release_or_path)
    if sae_id is None and not folder.is_dir():
        raise UserError(
            "`release_or_path` must be a folder that holds an SAE, or a release given together "
            f"with `sae_id`, got {release_or_path!r} alone; pass both or correct the path."
        )
    # SAELens takes seconds to import, and loading a guard needs none of it.
    from sae_lens import SAE

    try:
        if sae_id is not None:
            sae = SAE.from_pretrained(release_or_path, sae_id, device=device)
        elif (folder / _GEMMA_SCOPE_FILE).is_file():
            sae = _load_gemma_scope(folder / _GEMMA_SCOPE_FILE, device)
        else:
            sae = SAE.load_from_disk(folder, device=device)
    except UserError:
        raise
    # Missing files, bad names, gated repositories and lost networks all arrive as other types.
    except Exception as error:
        what = f"{release_or_path!r}" + (f" with id {sae_id!r}" if sae_id is not None else "")
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"`load_sae` found no loadable SAE at {what}; check name, files and network "
            f"({reason[:300]})."
        ) from error
    return sae if sae.dtype in (torch.float32, torch.float64) else sae.to(dtype=torch.float32)


def _load_gemma_scope(path: Path, device: str) -> "SAE[Any]":
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    with np.load(path, allow_pickle=False) as arrays:
        missing = _GEMMA_SCOPE_KEYS - set(arrays.files)
        if missing:
            raise UserError(
                f"{path} must hold the arrays {sorted(_GEMMA_SCOPE_KEYS)}, misses "
                f"{sorted(missing)}; download the file again."
            )
        weights = {key: torch.from_numpy(arrays[key]).float() for key in _GEMMA_SCOPE_KEYS}
    d_in, d_sae = weights["W_enc"].shape
    # Gemma Scope encodes the raw residual: b_dec belongs to the reconstruction only.
    config = JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae, device=device, apply_b_dec_to_input=False)
    sae = JumpReLUSAE(config)
    sae.load_state_dict(weights)
    return sae


def _check_supported(sae: "SAE[Any]") -> None:
    architecture = sae.cfg.architecture()
    if architecture not in ("standard", "jumprelu"):
        reason = _REFUSED.get(architecture, "its encoder is not one matrix, bias and threshold")
        raise UserError(
            f"the SAE's architecture must be standard or jumprelu, got {architecture!r}, which "
            f"cannot be sliced because {reason}; use a standard or JumpReLU SAE."
        )
    if sae.cfg.normalize_activations not in _FOLDED_NORMALIZATIONS:
        raise UserError(
            "the SAE's normalize_activations must be 'none' or folded into its weights, got "
            f"{sae.cfg.normalize_activations!r}, which depends on each token; use another SAE."
        )
    if sae.cfg.reshape_activations != "none" or not isinstance(sae.activation_fn, nn.ReLU):
        raise UserError(
            "the SAE must read the residual stream through a ReLU, got reshape_activations "
            f"{sae.cfg.reshape_activations!r} and {type(sae.activation_fn).__name__}; use an SAE "
            "of a residual-stream hook point."
        )


def _check_ids(feature_ids: list[int], d_sae: int | None = None) -> None:
    bound = f" and below d_sae {d_sae}" if d_sae is not None else ""
    bad = [i for i in feature_ids if i < 0 or (d_sae is not None and i >= d_sae)]
    if not feature_ids or bad or len(set(feature_ids)) != len(feature_ids):
        raise UserError(
            f"`feature_ids` must be at least one id, unique, not negative{bound}, got "
            f"{bad or feature_ids}; correct the list."
        )
