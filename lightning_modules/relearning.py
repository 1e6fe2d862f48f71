"""Relearning attack as a `fit` run: an attacker fine-tunes the model to get the knowledge back."""

from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from dsg.attacks import Attacker, Drift, Task
from dsg.errors import UserError
from dsg.evaluation import PassageBatch
from dsg.guard import Guard, GuardSettings, guarded
from dsg.lm import TokenBatch, finite_loss, load_model, unwrap
from lightning_modules.parts.guards import make_guard, method_of, remaking_settings
from lightning_modules.parts.measured_training import MeasuredTraining
from lightning_modules.parts.protocols import EVALUATION_DATA, Split, data_of, val_loaders
from lightning_modules.parts.training import Trainable


class RelearningModule(Trainable, MeasuredTraining):
    """Fine-tunes a model on the attacker's text; measures before it and after every epoch.

    The data module's `train_dataloader` yields `TokenBatch`es. The guard, if any, is made from the
    raw model before the attack and is then fixed. Every evaluation scores the model with the guard
    off (whoever holds the weights can remove it) and on (the model is served behind an interface),
    and how far the activations at the hook point have drifted.

    A checkpoint holds what the attack changed; `validate` with one evaluates the attacked model, an
    adapter unmerged.

    Args:
        model_name: Hugging Face folder or hub name of the model to attack; an adapter is merged.
        guard: How to make the guard; None only with mode `none`.
        mode: `test_time`: the attacker trains the raw model. `train_time`: the guard is in the
            forward pass during training too. `none`: there is no guard.
        attacker: What the attacker minimises; None is next-token cross-entropy.
        maintenance: After every epoch also select features and calibrate anew on the attacked
            model, with the guard's settings, and report that guard beside the fixed one, as method
            `<method>_maintained`.
        lr: Learning rate of AdamW, constant, above 0.
        base_model_name: The model against which the alignment score is computed; needed if the
            attacked model's weights were changed to forget, None for the attacked model itself.
        hook_point: Where drift is measured; None takes the guard's. Without a guard either nothing
            is measured.
        settings: Those of `Trainable` and the labels of `Run`.

    Raises:
        UserError: `mode` and `guard` contradict each other, what needs a guard has none, or `lr` is
            not above 0.
    """

    kind = "relearning"
    reads = "relearn"

    def __init__(
        self,
        model_name: str,
        guard: GuardSettings | None = None,
        mode: Literal["none", "test_time", "train_time"] = "none",
        attacker: Attacker | None = None,
        maintenance: bool = False,
        lr: float = 2e-4,
        base_model_name: str | None = None,
        hook_point: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(model_name=model_name, guard=guard, lr=lr, **settings)
        if (guard is None) != (mode == "none"):
            raise UserError(
                f"`mode` must be 'none' exactly if `guard` is missing, got mode {mode!r} "
                f"{'without' if guard is None else 'with'} a guard; change one of them."
            )
        self.attacker = attacker or Task()
        for option, needs_guard in (
            ("attacker", self.attacker.needs_guard),
            ("maintenance", maintenance),
        ):
            if needs_guard and guard is None:
                raise UserError(
                    f"`guard` must be given for this `{option}`, got None; add one, or leave "
                    f"`{option}` out."
                )
        self.mode = mode
        self.maintenance = maintenance
        self.base_model_name = base_model_name
        self.hook_point = hook_point or (guard.hook_point if guard else None)
        self.drift: Drift | None = None
        self._remaking: GuardSettings | None = None

    def prepare(self, model: PreTrainedModel) -> nn.Module:
        """Make the guard from the raw model, and only then prepare the attack."""
        if self.base_model_name is not None:
            self.base_model = load_model(self.base_model_name)
        if self.guard_settings is not None:
            self.guard = make_guard(self.guard_settings, model, self.trainer)
            if self.maintenance:
                self._remaking = remaking_settings(self.guard_settings, self.guard)
        self.method = self.method or method_of(self.guard)
        if self.hook_point is not None:
            self.drift = self._remember(model, self.hook_point)
        return self.make_trainable(model)

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Float[Tensor, ""]:
        """The attacker's loss."""
        del batch_idx
        in_loop = self.guard if self.mode == "train_time" else None
        with guarded(unwrap(self.model), in_loop) as forward:
            loss = self.attacker(forward, batch, self.guard)
        finite_loss(loss.total, self.global_step)
        size = len(batch.input_ids)
        self.log("train/loss", loss.total, prog_bar=True, batch_size=size)
        self.log_dict({f"train/{name}": part for name, part in loss.parts.items()}, batch_size=size)
        return loss.total

    def begin(self, split: Split, **options: Any) -> None:
        """Begin an evaluation, of the drift and of a guard made anew as well."""
        base_model = self.base_model if self.measurer.baseline is None else None
        further = {"base_model": base_model, "further": self._maintained(), "drift": self.drift}
        super().begin(split, **further, **options)

    def labels(self) -> dict[str, Any]:
        """The columns of the results that stay the same during a run."""
        mode = None if self.mode == "none" else self.mode
        return {**super().labels(), "mode": mode, "attack": self._attack_name()}

    def _remember(self, model: PreTrainedModel, hook_point: str) -> Drift:
        """The activations before the attack; now, because a checkpoint is loaded hereafter."""
        drift = Drift(hook_point)
        for loader in val_loaders(data_of(self.trainer, *EVALUATION_DATA)):
            for batch in loader:
                if not isinstance(batch, PassageBatch):
                    break
                drift.remember(model, batch)
        return drift

    def _maintained(self) -> dict[str, Guard]:
        """The guard made anew from the attacked model; before the attack it is the fixed one."""
        if self._remaking is None or self.guard is None:
            return {}
        if self.epochs == 0:
            return {"maintained": self.guard}
        guard = make_guard(self._remaking, unwrap(self.model), self.trainer)
        return {"maintained": guard.to(self.device)}

    def _attack_name(self) -> str:
        """The attack's weights, and its text and objective where they are not the default."""
        text = getattr(data_of(self.trainer), "attack_text", "forget")
        parts = ("relearn", self.adapter, "" if text == "forget" else text, self.attacker.name)
        return "_".join(part for part in parts if part)
