"""Loading sparse autoencoders, and taking the few features of one that a guard needs."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from dsg.errors import UserError
from dsg.io import hub_error, is_refusal, parse_name
from dsg.sae.features import (
    COMPETING,
    CompetingFeatures,
    Features,
    FeatureSlice,
    check_feature_ids,
)

if TYPE_CHECKING:
    from sae_lens import SAE

_CONFIG_FILE = "cfg.json"
_GEMMA_SCOPE_FILE = "params.npz"
_GEMMA_SCOPE_KEYS = {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"}
_SLICED = ("standard", "jumprelu", "gated")
_UNSAVED = "it has the form it was trained in; save it for inference, which makes a JumpReLU SAE"
_TRANSCODER = "it reads one place of the model and reconstructs another"
REFUSED = {
    "abstopk": "its activations can be negative, and a guard's features are active above 0",
    "batchtopk": _UNSAVED,
    "matryoshka_batchtopk": _UNSAVED,
    "temporal": "its activations depend on the other tokens of the sequence",
    "transcoder": _TRANSCODER,
    "skip_transcoder": _TRANSCODER,
    "jumprelu_transcoder": _TRANSCODER,
    "jumprelu_skip_transcoder": _TRANSCODER,
}
_NORMALIZATIONS = ("none", "layer_norm", "constant_norm_rescale")


def slice_features(sae: "SAE[Any]", feature_ids: Sequence[int]) -> Features:
    """Takes features out of an SAE: slices where features do not compete, else all it needs.

    Args:
        sae: An SAE of SAELens: standard, JumpReLU, gated, top-k or matching pursuit. A batch-top-k
            SAE is a JumpReLU SAE once it is saved for inference.
        feature_ids: Ids to keep, in this order.

    Raises:
        UserError: If the architecture, input normalisation or reshaping is unsupported, or an id
            is repeated or out of range.
    """
    check_supported(sae)
    check_feature_ids(list(feature_ids), sae.cfg.d_sae)
    architecture = sae.cfg.architecture()
    weights = {name: weight.detach() for name, weight in sae.named_parameters()}
    ids = torch.tensor(list(feature_ids), dtype=torch.long, device=sae.W_dec.device)
    dtype = torch.promote_types(sae.W_dec.dtype, torch.float32)
    normalization = sae.cfg.normalize_activations
    W_dec = weights["W_dec"][ids].to(dtype, copy=True)
    if architecture in COMPETING:
        config = {**sae.cfg.to_dict(), "dtype": str(dtype).removeprefix("torch.")}
        if config.get("rescale_acts_by_decoder_norm"):
            W_dec = W_dec / W_dec.norm(dim=-1, keepdim=True)
        copies = {name: weight.to(dtype, copy=True) for name, weight in weights.items()}
        return CompetingFeatures(ids, W_dec, copies, config, normalization)

    # Clones: the SAE is usually freed afterwards, and a view would keep all of it alive.
    W_enc = weights["W_enc"][:, ids].to(dtype, copy=True)
    shift = torch.zeros_like(ids, dtype=torch.float64)
    if sae.cfg.apply_b_dec_to_input:
        shift = weights["b_dec"].double() @ W_enc.double()

    def bias(name: str, scale: torch.Tensor | float = 1.0) -> torch.Tensor:
        return (weights[name][ids].double() - shift * scale).to(dtype)

    if architecture == "gated":
        scale = weights["r_mag"][ids].to(dtype).exp()
        return FeatureSlice(
            ids,
            W_enc,
            bias("b_gate"),
            torch.zeros_like(scale),
            W_dec,
            magnitude_scale=scale,
            magnitude_bias=bias("b_mag", scale.double()),
            normalization=normalization,
        )
    threshold = torch.zeros(len(ids), dtype=dtype, device=ids.device)
    if architecture == "jumprelu":
        threshold = weights["threshold"][ids].to(dtype, copy=True)
    return FeatureSlice(ids, W_enc, bias("b_enc"), threshold, W_dec, normalization=normalization)


def describe_sae(sae: "SAE[Any]") -> dict[str, Any]:
    """Where an SAE comes from and a hash of its weights, representable in JSON."""
    digest = hashlib.sha256()
    for name, weight in sorted(sae.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    metadata = sae.cfg.metadata
    return {
        "loaded_from": metadata.loaded_from,
        "architecture": sae.cfg.architecture(),
        "d_sae": sae.cfg.d_sae,
        "hook_name": metadata.hook_name,
        "model_name": metadata.model_name,
        "apply_b_dec_to_input": sae.cfg.apply_b_dec_to_input,
        "normalize_activations": sae.cfg.normalize_activations,
        "sha256": digest.hexdigest(),
    }


def load_sae(release_or_path: str, sae_id: str | None = None, device: str = "cpu") -> "SAE[Any]":
    """Loads an SAE from the hub or from disk, at least in float32.

    Args:
        release_or_path: A release of SAELens's list, a Hugging Face repository, a folder written
            by SAELens, or a folder that holds Gemma Scope's `params.npz`. `release@revision` pins
            the repository, for SAEs in either of these two forms.
        sae_id: Id within the release; not given for a folder.
        device: Where the weights go.

    Raises:
        UserError: If the folder holds no SAE, or the release cannot be loaded.
    """
    check_sae_name(release_or_path, sae_id)
    folder = Path(release_or_path)
    # SAELens takes seconds to import, and loading a guard needs none of it.
    from sae_lens import SAE

    release, revision = parse_name(release_or_path)
    try:
        if sae_id is not None and revision is None:
            sae = SAE.from_pretrained(release, sae_id, device=device)
        else:
            if sae_id is not None:
                folder = _pinned_folder(release, sae_id, revision)
            sae = _load_folder(folder, device)
    except UserError:
        raise
    # Missing files, bad names, gated repositories and lost networks all arrive as other types.
    except Exception as error:
        if sae_id is not None and is_refusal(error):
            name = _repository(release) + (f"@{revision}" if revision else "")
            raise hub_error("sae", "SAE", name, error) from error
        what = f"{release_or_path!r}" + (f" with id {sae_id!r}" if sae_id is not None else "")
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"`load_sae` found no loadable SAE at {what}; check name, files and network "
            f"({reason[:300]})."
        ) from error
    sae.cfg.metadata.loaded_from = [release_or_path, sae_id]
    return sae if sae.dtype in (torch.float32, torch.float64) else sae.to(dtype=torch.float32)


def check_sae_name(release_or_path: str, sae_id: str | None) -> None:
    """Refuses a name, as `load_sae` takes it, that can lead to no SAE, without looking it up."""
    folder = Path(release_or_path)
    if sae_id is None and not folder.is_dir():
        raise UserError(
            "`release_or_path` must be a folder that holds an SAE, or a release given together "
            f"with `sae_id`, got {release_or_path!r} alone; pass both or correct the path."
        )
    files = (_CONFIG_FILE, _GEMMA_SCOPE_FILE)
    if sae_id is None and not any((folder / name).is_file() for name in files):
        raise UserError(
            f"`load_sae` found no loadable SAE at {release_or_path!r}; name the folder that holds "
            f"{' or '.join(files)}."
        )
    if sae_id is not None and any((folder / name).is_file() for name in files):
        raise UserError(
            f"`sae_id` must be left out for an SAE's folder, got {sae_id!r} beside "
            f"{release_or_path!r}; remove it."
        )


def _load_folder(folder: Path, device: str) -> "SAE[Any]":
    from sae_lens import SAE

    if (folder / _GEMMA_SCOPE_FILE).is_file():
        return _load_gemma_scope(folder / _GEMMA_SCOPE_FILE, device)
    return SAE.load_from_disk(folder, device=device)


def _pinned_folder(release: str, sae_id: str, revision: str | None) -> Path:
    """Where an SAE lies once it is downloaded: SAELens itself takes only the newest revision."""
    from huggingface_hub import snapshot_download
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    listed = get_pretrained_saes_directory().get(release)
    path = listed.saes_map.get(sae_id, sae_id) if listed else sae_id
    root = snapshot_download(_repository(release), revision=revision, allow_patterns=[f"{path}/*"])
    return Path(root) / path


def _repository(release: str) -> str:
    """The hub repository of a release of SAELens's list; others are repositories themselves."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    listed = get_pretrained_saes_directory().get(release)
    return listed.repo_id if listed else release


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


def check_supported(sae: "SAE[Any]") -> None:
    """Refuses an SAE that a guard cannot use, by name and with the reason.

    Raises:
        UserError: If architecture, input normalisation or reshaping is unsupported, or a weight is
            not finite.
    """
    architecture = sae.cfg.architecture()
    if architecture not in (*_SLICED, *COMPETING):
        reason = REFUSED.get(architecture, "its encoder is not known")
        raise UserError(
            f"the SAE's architecture must be one of {', '.join((*_SLICED, *COMPETING))}, got "
            f"{architecture!r}, which a guard cannot use because {reason}; use another SAE."
        )
    if sae.cfg.normalize_activations not in _NORMALIZATIONS:
        raise UserError(
            "the SAE's normalize_activations must be none, layer_norm or constant_norm_rescale, "
            f"got {sae.cfg.normalize_activations!r}, whose statistics are in no weight of it; fold "
            "it into the weights with SAELens's fold_activation_... methods."
        )
    relu = architecture in COMPETING or isinstance(sae.activation_fn, nn.ReLU)
    if sae.cfg.reshape_activations != "none" or not relu:
        raise UserError(
            "the SAE must read the residual stream through a ReLU, got reshape_activations "
            f"{sae.cfg.reshape_activations!r} and {type(sae.activation_fn).__name__}; use an SAE "
            "of a residual-stream hook point."
        )
    spoilt = [name for name, weight in sae.named_parameters() if not weight.isfinite().all()]
    if spoilt:
        raise UserError(
            f"the SAE's weights must be finite, got nan or inf in {', '.join(spoilt)}; load it "
            "again."
        )
