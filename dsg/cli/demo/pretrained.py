"""A pretrained model and its SAE, as the user names them on the command line."""

from dataclasses import dataclass
from pathlib import Path

from dsg.errors import UserError
from dsg.lm import check_width, load_model, resolve_hook_point
from dsg.sae import load_sae


@dataclass(frozen=True)
class PretrainedSAE:
    """An SAE that fits a model.

    Attributes:
        sae: Folder, or release of SAELens's list.
        sae_id: Id within the release; None for a folder.
        hook_point: Where it reads.
    """

    sae: str
    sae_id: str | None
    hook_point: str


def open_pretrained(model_name: str, sae_name: str) -> PretrainedSAE:
    """Load a model and an SAE once to see whether they fit.

    Args:
        model_name: Hugging Face folder or hub name.
        sae_name: Folder, or `RELEASE/ID`, parted at the first slash.

    Raises:
        UserError: One of them cannot be loaded, the SAE does not say where it reads, or the widths
            or the hook point do not fit the model.
    """
    release, sae_id = parse_sae_name(sae_name)
    model = load_model(model_name)
    sae = load_sae(release, sae_id)
    hook_point = sae.cfg.metadata.hook_name
    if not hook_point:
        raise UserError(
            f"--sae must say in its metadata where it reads (`hook_name`), but {sae_name!r} does "
            "not; save it with SAELens together with its hook_name."
        )
    check_width(model, sae.cfg.d_in)
    resolve_hook_point(model, hook_point)
    return PretrainedSAE(release, sae_id, hook_point)


def parse_sae_name(sae_name: str) -> tuple[str, str | None]:
    """Folder and None, or release and id.

    Raises:
        UserError: It is neither an existing folder nor has it a slash.
    """
    if Path(sae_name).is_dir():
        return sae_name, None
    release, slash, sae_id = sae_name.partition("/")
    if not (release and slash and sae_id):
        raise UserError(
            f"--sae must be RELEASE/ID of SAELens's list or an existing folder, got {sae_name!r}; "
            "check the spelling."
        )
    return release, sae_id
