"""A guard: score, gate and edit at one hook point, for one forget request."""

from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dsg.errors import UserError, check_choice
from dsg.guard.artifact import read_artifact, write_artifact
from dsg.guard.attachment import Attachment, Continuation, DecisionRule, attach
from dsg.guard.edit import ClampScope, ClampUnit, Edit
from dsg.guard.gate import Evidence, GateKind, decide, fired_tokens, make_gate
from dsg.guard.steering_csv import read_steering_csv, write_steering_csv
from dsg.guard.values import check_kinds, check_numbers
from dsg.lm import ModelIdentity, TokenBatch, check_width, count_mask, read_activations
from dsg.sae import DeviceOnlyModule, Features, check_finite, rebuild_features

_SHOWN_IDS = 8


class Guard(DeviceOnlyModule):
    """Writes features in sequences whose gate statistic exceeds a threshold.

    Holds buffers only. Its dtypes stay whatever the model is cast to.

    Args:
        features: The selected features; for the edit `refusal` also, last, the one to write.
        hook_point: Module whose output is read and edited.
        uncounted_ids: Token ids that never count.
        pad_id: The tokenizer's padding id, or None.
        threshold: Statistic strictly above which a sequence is triggered (tau); in [0, 1] for a
            density, in tokens for the gate `cusum`.
        clamp_value: Value written to the features, sign included (-c).
        clamp_scope: Write `all` selected features where any is active, or only the `active` ones.
        clamp_unit: Unit of `clamp_value`: SAE activations, or multiples of `residual_norm`.
        residual_norm: Mean L2 norm of the residual stream at the hook point, above 0.
        gate: `density` (the paper), `window`, `cusum` (see `dsg.guard.gate`), or `token`: every
            sequence counts as triggered (static clamping).
        window_size: Counted tokens of a window, for the gate `window`.
        leak: Tokens that leak per counted token, in (0, 1), for the gate `cusum`.
        edit: `clamp` writes the selected features; `refusal` writes another feature wherever one of
            them is active (Refusal Clamp).
        trigger_limit: Activation above which the edit takes a feature as active, at least 0. The
            gate always counts activations above 0.
        model: The model for which the guard was made, if known.
        facts: What else is known about how it was made; must be representable in JSON.

    Raises:
        UserError: If a value is out of range or a choice unknown.
    """

    features: Features
    _threshold: Tensor
    _clamp_value: Tensor
    _uncounted_ids: Tensor

    def __init__(
        self,
        features: Features,
        *,
        hook_point: str,
        uncounted_ids: list[int],
        pad_id: int | None,
        threshold: float,
        clamp_value: float,
        clamp_scope: ClampScope = "all",
        clamp_unit: ClampUnit = "activation",
        residual_norm: float | None = None,
        gate: GateKind = "density",
        window_size: int | None = None,
        leak: float | None = None,
        edit: Edit = "clamp",
        trigger_limit: float = 0.0,
        model: ModelIdentity | None = None,
        facts: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_choice("clamp_scope", clamp_scope, get_args(ClampScope))
        check_choice("clamp_unit", clamp_unit, get_args(ClampUnit))
        check_choice("gate", gate, get_args(GateKind))
        check_choice("edit", edit, get_args(Edit))
        check_kinds(hook_point, uncounted_ids, pad_id, window_size, leak, facts)
        check_numbers(gate, threshold, clamp_value, residual_norm, trigger_limit)
        if clamp_unit == "residual_norm" and residual_norm is None:
            raise UserError(
                "`residual_norm` must be given for clamp_unit 'residual_norm', got None; measure "
                "it or use clamp_unit 'activation'."
            )
        self.rule = make_gate(gate, window_size, leak)
        if edit == "refusal" and features.num_features < 2:
            raise UserError(
                "`features` must be selected ones and last the one to write for the edit "
                "'refusal', got one feature; add its id."
            )
        self.features = features
        self.hook_point = hook_point
        self.pad_id = pad_id
        self.clamp_scope: ClampScope = clamp_scope
        self.clamp_unit: ClampUnit = clamp_unit
        self.residual_norm = residual_norm
        self.gate: GateKind = gate
        self.window_size = window_size
        self.leak = leak
        self.edit: Edit = edit
        self.trigger_limit = trigger_limit
        self.model = model
        self.facts = dict(facts or {})
        self.register_buffer("_threshold", torch.tensor(threshold, dtype=torch.float64))
        self.register_buffer("_clamp_value", torch.tensor(clamp_value, dtype=torch.float64))
        self.register_buffer(
            "_uncounted_ids", torch.tensor(sorted(uncounted_ids), dtype=torch.int64)
        )

    def __repr__(self) -> str:
        ids = self.feature_ids
        shown = ", ".join(map(str, ids[:_SHOWN_IDS])) + ", ..." * (len(ids) > _SHOWN_IDS)
        gate = "no gate" if self.gate == "token" else f"gate {self.gate}"
        if self.gate == "window":
            gate += f" of {self.window_size} tokens"
        if self.gate == "cusum":
            gate += f" with leak {self.leak:.4g}"
        if self.gate != "token":
            gate += f" > {self.threshold:.4g}"
        unit = " residual norms" if self.clamp_unit == "residual_norm" else ""
        written = f"{self.clamp_scope} to {self.clamp_value:g}{unit}"
        if self.refusal_id is not None:
            written = f"feature {self.refusal_id} to {self.clamp_value:g}{unit}"
        features = f"{len(ids)} features [{shown}] at {self.hook_point}"
        return f"Guard({features}, {gate}, {self.edit} {written})"

    @property
    def feature_ids(self) -> list[int]:
        """Ids of the selected features, most important first."""
        return self.features.feature_ids.tolist()[: self.num_selected]

    @property
    def refusal_id(self) -> int | None:
        """Id of the feature that the edit `refusal` writes; None for the edit `clamp`."""
        return self.features.feature_ids.tolist()[-1] if self.edit == "refusal" else None

    @property
    def num_selected(self) -> int:
        """Number of selected features, on which the gate looks."""
        return self.features.num_features - (self.edit == "refusal")

    @property
    def threshold(self) -> float:
        """Statistic strictly above which a sequence is triggered (tau)."""
        return self._threshold.item()

    @property
    def clamp_value(self) -> float:
        """Value written to the features, in `clamp_unit`, sign included."""
        return self._clamp_value.item()

    @property
    def written_value(self) -> float:
        """`clamp_value` as an activation, or for `residual_norm` in units of the residual stream.

        They are the same where the SAE does not rescale its input.
        """
        if self.clamp_unit == "activation" or self.residual_norm is None:
            return self.clamp_value
        return self.clamp_value * self.residual_norm

    @property
    def uncounted_ids(self) -> list[int]:
        """Token ids that never count, ascending."""
        return self._uncounted_ids.tolist()

    def density(
        self,
        model: nn.Module,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"] | None = None,
        token_mask: Bool[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, " batch"]:
        """Density (rho) of each sequence in the unedited model, in [0, 1], float64.

        Args:
            model: The language model, with or without guards attached.
            input_ids: Token ids.
            attention_mask: 1 for real tokens; without it only outer pads are padding.
            token_mask: Counted tokens, if the guard's own rule is not to be used.

        Raises:
            UserError: If the guard does not fit the model.
        """
        return self._read(model, input_ids, attention_mask, token_mask).density

    def statistic(
        self,
        model: nn.Module,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"] | None = None,
        token_mask: Bool[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, " batch"]:
        """The gate's statistic of each sequence in the unedited model, float64.

        For the gates `density` and `token` it is the density. Arguments and errors are those of
        `density`.
        """
        return self._read(model, input_ids, attention_mask, token_mask).statistic

    def replace(self, **changes: Any) -> "Guard":
        """A guard with some settings changed that shares this guard's features.

        Args:
            changes: Any keyword argument of `Guard`.
        """
        return Guard(self.features, **{**self._settings(), **changes})

    def attached(
        self,
        model: nn.Module,
        decision: DecisionRule = "sequence",
        continuation: Continuation = "running",
    ) -> AbstractContextManager[Attachment]:
        """Guards the model inside a `with` block; see `dsg.guard.attachment.attach`."""
        return attach([self], model, decision, continuation)

    def save(self, directory: str | Path) -> None:
        """Writes the guard as safetensors and JSON.

        Args:
            directory: Created if missing; an older guard in it is replaced.
        """
        settings = {**self._settings(), "model": asdict(self.model) if self.model else None}
        tensors = self.features.state_dict()
        write_artifact(directory, tensors, {**settings, "encoder": self.features.encoder})

    @classmethod
    def load(cls, directory: str | Path) -> "Guard":
        """Reads a guard written by `save`, onto the CPU.

        Raises:
            UserError: If the artifact is missing, damaged, altered or of another program.
        """
        tensors, settings = read_artifact(directory)
        features = rebuild_features(tensors, settings.pop("encoder"))
        model = settings.pop("model")
        return cls(features, model=ModelIdentity.read(model), **settings)

    to_steering_csv = write_steering_csv

    @classmethod
    def from_steering_csv(cls, path: str | Path, sae: Any = None, **options: Any) -> "Guard":
        """The guard that a steering CSV describes; see `read_steering_csv`."""
        features, settings = read_steering_csv(path, sae, **options)
        return cls(features, **settings)

    def _read(
        self,
        model: nn.Module,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"] | None,
        token_mask: Bool[Tensor, "batch seq"] | None,
    ) -> Evidence:
        check_width(model, self.features.d_in)
        if token_mask is None:
            token_mask = count_mask(input_ids, attention_mask, self.uncounted_ids, self.pad_id)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        batch = TokenBatch(input_ids, attention_mask, token_mask)
        h = read_activations(model, self.hook_point, batch)
        counted = token_mask.to(h.device)
        check_finite(h, counted, self.hook_point)
        selected = self.features.on(h.device).encode(h)[..., : self.num_selected]
        everything = torch.ones_like(counted)
        fired = fired_tokens(selected, counted)
        return decide(self.rule, fired, counted, everything, 1.0, running=False)[1]

    def _settings(self) -> dict[str, Any]:
        return {
            "hook_point": self.hook_point,
            "uncounted_ids": self.uncounted_ids,
            "pad_id": self.pad_id,
            "threshold": self.threshold,
            "clamp_value": self.clamp_value,
            "clamp_scope": self.clamp_scope,
            "clamp_unit": self.clamp_unit,
            "residual_norm": self.residual_norm,
            "gate": self.gate,
            "window_size": self.window_size,
            "leak": self.leak,
            "edit": self.edit,
            "trigger_limit": self.trigger_limit,
            "model": self.model,
            "facts": self.facts,
        }
