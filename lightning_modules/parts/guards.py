"""Makes a run's guard from its settings and its data module's texts."""

from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import lightning
from transformers import PreTrainedModel

from dsg.errors import UserError
from dsg.guard import Guard, GuardBuilder, GuardSettings
from dsg.io import short_name
from dsg.lm import ModelIdentity
from dsg.sae import load_sae
from dsg.selection import guard_texts
from lightning_modules.parts.protocols import GUARD_DATA, GuardData, data_of

if TYPE_CHECKING:
    from sae_lens import SAE


def make_guard(
    settings: GuardSettings, model: PreTrainedModel, trainer: lightning.Trainer
) -> Guard:
    """Make the guard for the forget texts of the trainer's data module.

    Args:
        settings: Which guard to make, or which saved one to load.
        model: The unguarded model; moved to the trainer's device.
        trainer: Supplies the data module.
    """
    if settings.artifact is not None:
        return saved_guard(settings)
    return guard_of(guard_maker(settings, model, trainer), data_of(trainer, *GUARD_DATA))


def saved_guard(settings: GuardSettings) -> Guard:
    """Load a guard, which must be what the settings beside its folder say.

    Raises:
        UserError: There is none that can be read, or a setting beside it says otherwise and would
            be ignored.
    """
    assert settings.artifact is not None
    guard = Guard.load(settings.artifact)
    made = {**guard.facts.get("settings", {}), "hook_point": guard.hook_point}
    for field in fields(GuardSettings):
        given = getattr(settings, field.name)
        # The SAE may lie elsewhere now; a default may not have been given.
        if field.name in ("sae", "sae_id", "artifact") or given == field.default:
            continue
        if given != made.get(field.name):
            raise UserError(
                f"`{field.name}` must be left out beside `artifact`, or say what the guard in "
                f"{settings.artifact!r} was made with, {made.get(field.name)!r}, got {given!r}; "
                "remove it, or leave `artifact` out to make another guard."
            )
    return guard


def method_of(guard: Guard | None) -> str:
    """How results call a guard that is not given another name: by the method that made it."""
    if guard is None:
        return "base"
    return str(guard.facts.get("settings", {}).get("method", "guard"))


def guard_of(maker: GuardBuilder, data: GuardData) -> Guard:
    """Make the guard for what a data module wants forgotten now.

    Every rank makes it from all texts, so it does not depend on their number. As in
    `dsg.build_guard`, a quarter of the forget texts (by hash) is held out of the selection.

    Args:
        maker: Made by `guard_maker` from the same data module.
        data: Whose forget texts may have changed since, as from one request to the next.
    """
    settings = maker.settings
    texts = guard_texts(data, near=_is_near(settings), forget=settings.parts().selection != "ids")
    maker.calibration_texts = texts["retain_calibration"]
    forget = {name: texts[name] for name in ("forget_selection", "forget_heldout")}
    return maker.make(maker.statistics(texts["forget_selection"]), forget)


def remaking_settings(settings: GuardSettings, guard: Guard) -> GuardSettings:
    """How to make a guard again, as when the model has changed since.

    Args:
        settings: How the run makes or loads its guard; its SAE is used.
        guard: That guard.

    Raises:
        UserError: A saved guard does not tell how it was made.
    """
    if settings.artifact is None:
        return settings
    stored = guard.facts.get("settings")
    if stored is None:
        raise UserError(
            f"the guard in {settings.artifact!r} must tell the settings it was made with so that "
            "it can be made again, but it does not; leave `artifact` out and give them here."
        )
    sae = {"sae": settings.sae, "sae_id": settings.sae_id}
    return GuardSettings(**{**stored, **sae, "artifact": None})


def describe(model: PreTrainedModel, guard: Guard | None) -> dict[str, Any]:
    """The origin and the settings of a model and its guard, for `run.json`."""
    identity = asdict(ModelIdentity.of(model))
    facts: dict[str, Any] = {"model": {**identity, "name": short_name(identity["name"])}}
    if guard is not None:
        facts["guard"] = {
            "feature_ids": guard.feature_ids,
            "gate": guard.gate.kind,
            "threshold": guard.threshold,
            "edit": guard.edit.kind,
            "clamp_value": guard.clamp_value,
            **guard.facts,
        }
    return facts


def guard_maker(
    settings: GuardSettings, model: PreTrainedModel, trainer: lightning.Trainer
) -> GuardBuilder:
    """What makes guards for several requests; collects the retain statistics at once."""
    if settings.artifact is not None:
        raise UserError(
            "`artifact` must be left out where a guard is made for each request, got "
            f"{settings.artifact!r}; remove it."
        )
    data: Any = data_of(trainer, *GUARD_DATA)
    device = trainer.strategy.root_device
    model.to(device)  # pyright: ignore[reportArgumentType]
    trainer.precision_plugin.convert_module(model)  # as it will be guarded
    sae = load_sae(settings.sae, settings.sae_id, device=str(device))
    return maker_from(settings, model, sae, data)


def maker_from(
    settings: GuardSettings, model: PreTrainedModel, sae: "SAE[Any]", data: GuardData
) -> GuardBuilder:
    """What makes guards from a data module's texts."""
    return GuardBuilder(
        settings,
        model,
        data.tokenizer,
        sae,
        data.retain_texts(),
        data.calibration_texts(near=_is_near(settings)),
        data.heldout_texts(),
    )


def _is_near(settings: GuardSettings) -> bool:
    return settings.method == "dsg_near"
