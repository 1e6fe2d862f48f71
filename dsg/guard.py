"""A guard: score, gate and edit at one hook point, for one forget request."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dsg.artifact import read_artifact, write_artifact
from dsg.attachment import Attachment, Continuation, DecisionRule, attach
from dsg.edit import ClampScope
from dsg.errors import UserError, check_choice
from dsg.gate import density, fired_tokens
from dsg.hooks import check_width, read_activations
from dsg.sae import DeviceOnlyModule, FeatureSlice
from dsg.tokens import TokenBatch, count_mask

ClampUnit = Literal["activation", "residual_norm"]
Gate = Literal["density", "token"]


class Guard(DeviceOnlyModule):
    """Clamps selected features in sequences whose density exceeds a threshold.

    Holds buffers only. Its dtypes stay whatever the model is cast to.

    Args:
        features: The selected features.
        hook_point: Module whose output is read and edited.
        uncounted_ids: Token ids that never count.
        pad_id: The tokenizer's padding id, or None.
        threshold: Density strictly above which a sequence is triggered, in [0, 1] (tau).
        clamp_value: Value written to the features, sign included (-c).
        clamp_scope: Write `all` selected features where any is active, or only the `active` ones.
        clamp_unit: Unit of `clamp_value`: SAE activations, or multiples of `residual_norm`.
        residual_norm: Mean L2 norm of the residual stream at the hook point, above 0.
        gate: `density`, or `token`: every sequence counts as triggered (static clamping).
        facts: What is known about how the guard was made; must be representable in JSON.

    Raises:
        UserError: If a value is out of range or a choice unknown.
    """

    features: FeatureSlice
    _threshold: Tensor
    _clamp_value: Tensor
    _uncounted_ids: Tensor

    def __init__(
        self,
        features: FeatureSlice,
        *,
        hook_point: str,
        uncounted_ids: list[int],
        pad_id: int | None,
        threshold: float,
        clamp_value: float,
        clamp_scope: ClampScope = "all",
        clamp_unit: ClampUnit = "activation",
        residual_norm: float | None = None,
        gate: Gate = "density",
        facts: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_choice("clamp_scope", clamp_scope, get_args(ClampScope))
        check_choice("clamp_unit", clamp_unit, get_args(ClampUnit))
        check_choice("gate", gate, get_args(Gate))
        if not 0.0 <= threshold <= 1.0:
            raise UserError(
                f"`threshold` must be a density in [0, 1], got {threshold}; calibrate it on retain "
                "text."
            )
        if not abs(clamp_value) < float("inf"):
            raise UserError(f"`clamp_value` must be finite, got {clamp_value}; try -500.0.")
        if residual_norm is not None and not 0.0 < residual_norm < float("inf"):
            raise UserError(
                f"`residual_norm` must be finite and above 0, got {residual_norm}; measure it on "
                "text."
            )
        if clamp_unit == "residual_norm" and residual_norm is None:
            raise UserError(
                "`residual_norm` must be given for clamp_unit 'residual_norm', got None; measure "
                "it or use clamp_unit 'activation'."
            )
        self.features = features
        self.hook_point = hook_point
        self.pad_id = pad_id
        self.clamp_scope: ClampScope = clamp_scope
        self.clamp_unit: ClampUnit = clamp_unit
        self.residual_norm = residual_norm
        self.gate: Gate = gate
        self.facts = dict(facts or {})
        self.register_buffer("_threshold", torch.tensor(threshold, dtype=torch.float64))
        self.register_buffer("_clamp_value", torch.tensor(clamp_value, dtype=torch.float64))
        self.register_buffer(
            "_uncounted_ids", torch.tensor(sorted(uncounted_ids), dtype=torch.int64)
        )

    @property
    def feature_ids(self) -> list[int]:
        """Ids of the selected features, most important first."""
        return self.features.feature_ids.tolist()

    @property
    def threshold(self) -> float:
        """Density strictly above which a sequence is triggered (tau)."""
        return self._threshold.item()

    @property
    def clamp_value(self) -> float:
        """Value written to the features, in `clamp_unit`, sign included."""
        return self._clamp_value.item()

    @property
    def activation_value(self) -> float:
        """`clamp_value` in activation units."""
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
        check_width(model, self.features.d_in)
        if token_mask is None:
            token_mask = count_mask(input_ids, attention_mask, self.uncounted_ids, self.pad_id)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        batch = TokenBatch(input_ids, attention_mask, token_mask)
        h = read_activations(model, self.hook_point, batch)
        token_mask = token_mask.to(h.device)
        fired = fired_tokens(self.features.on(h.device).encode(h), token_mask)
        return density(fired.sum(1), token_mask.sum(1))

    def replace(self, **changes: Any) -> "Guard":
        """A guard with some settings changed that shares this guard's feature slice.

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
        """Guards the model inside a `with` block; see `dsg.attachment.attach`."""
        return attach([self], model, decision, continuation)

    def save(self, directory: str | Path) -> None:
        """Writes the guard as safetensors and JSON.

        Args:
            directory: Created if missing; an older guard in it is replaced.
        """
        write_artifact(directory, dict(self.features.named_buffers()), self._settings())

    @classmethod
    def load(cls, directory: str | Path) -> "Guard":
        """Reads a guard written by `save`, onto the CPU.

        Raises:
            UserError: If the artifact is missing, damaged, altered or of another program.
        """
        tensors, settings = read_artifact(directory)
        return cls(FeatureSlice(**tensors), **settings)

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
            "facts": self.facts,
        }
