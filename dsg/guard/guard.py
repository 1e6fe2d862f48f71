"""A guard: score, gate and edit at one hook point, for one forget request; and several at once."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, fields, replace
from numbers import Integral
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dsg.errors import UserError, check_choice
from dsg.guard.artifact import read_artifact, write_artifact
from dsg.guard.attachment import Attachment, Continuation, DecisionRule
from dsg.guard.edit import Edit, Refusal
from dsg.guard.gate import Evidence, Gate, decide
from dsg.guard.group import Policy, check_same_sae
from dsg.guard.steering_csv import read_steering_csv, write_steering_csv
from dsg.lm import ModelIdentity, TokenBatch, check_width, count_mask, read_activations
from dsg.sae import Features, check_finite, rebuild_features

_SHOWN_IDS = 8


class Guard(nn.Module):
    """Writes features in sequences whose gate statistic exceeds a threshold.

    Holds no parameters, and its dtypes stay whatever the model is cast to.

    Args:
        features: The selected features; for the edit `Refusal` also, last, the one to write.
        hook_point: Module whose output is read and edited.
        uncounted_ids: Token ids that never count.
        pad_id: The tokenizer's padding id, or None.
        gate: Which sequences are edited; see `dsg.guard.gate`.
        edit: What is written there; see `dsg.guard.edit`.
        model: The model for which the guard was made, if known.
        facts: What else is known about how it was made; must be representable in JSON.

    Raises:
        UserError: If an argument is of another kind, or the edit needs more features.
    """

    features: Features

    def __init__(
        self,
        features: Features,
        *,
        hook_point: str,
        uncounted_ids: Collection[int],
        pad_id: int | None,
        gate: Gate,
        edit: Edit,
        model: ModelIdentity | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        _check_kinds(hook_point, uncounted_ids, pad_id, facts)
        if features.num_features <= edit.num_further:
            raise UserError(
                "`features` must be selected ones and last the one to write for the edit "
                f"{edit.kind!r}, got one feature; add its id."
            )
        self.features = features
        self.hook_point = hook_point
        self.uncounted_ids = sorted(uncounted_ids)
        self.pad_id = pad_id
        self.gate = gate
        self.edit = edit
        self.model = model
        self.facts = dict(facts or {})

    def __repr__(self) -> str:
        ids = self.feature_ids
        shown = ", ".join(map(str, ids[:_SHOWN_IDS])) + ", ..." * (len(ids) > _SHOWN_IDS)
        features = f"{len(ids)} features [{shown}] at {self.hook_point}"
        return f"Guard({features}, {self.gate}, {self.edit})"

    @property
    def feature_ids(self) -> list[int]:
        """Ids of the selected features, most important first."""
        return self.features.feature_ids.tolist()[: self.num_selected]

    @property
    def refusal_id(self) -> int | None:
        """Id of the feature that the edit `Refusal` writes; None for other edits."""
        is_refusal = isinstance(self.edit, Refusal)
        return self.features.feature_ids.tolist()[-1] if is_refusal else None

    @property
    def num_selected(self) -> int:
        """Number of selected features, on which the gate looks."""
        return self.features.num_features - self.edit.num_further

    @property
    def threshold(self) -> float:
        """Statistic strictly above which a sequence is triggered (tau)."""
        return self.gate.threshold

    @property
    def clamp_value(self) -> float:
        """Value written to the features, in the unit of the edit, sign included."""
        return self.edit.value

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
        """The gate's statistic of each sequence in the unedited model, float64; see `density`."""
        return self._read(model, input_ids, attention_mask, token_mask).statistic

    def replace(self, **changes: Any) -> "Guard":
        """A guard with some settings changed that shares this guard's features.

        Args:
            changes: Arguments of `Guard`, or fields of its gate and its edit by their own names:
                `guard.replace(threshold=0.1, value=-20.0)`.
        """
        settings = {**self._settings(), **changes}
        for part in ("gate", "edit"):
            names = {field.name for field in fields(settings[part])} & set(changes)
            settings[part] = replace(settings[part], **{name: settings.pop(name) for name in names})
        return Guard(self.features, **settings)

    def attached(
        self,
        model: nn.Module,
        decision: DecisionRule = "sequence",
        continuation: Continuation = "running",
    ) -> Attachment:
        """Guards the model inside a `with` block; see `dsg.guard.attachment.Attachment`."""
        return Attachment([self], model, decision, continuation)

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
        """Reads a guard written by `save`, now or in an earlier format, onto the CPU.

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
        h = read_activations(model, self.hook_point, batch)  # [batch, seq, d_in]
        counted = token_mask.to(h.device)
        check_finite(h, counted, self.hook_point)
        selected = self.features.on(h.device).encode(h)[..., : self.num_selected]
        return decide(self.gate, selected > 0, counted, running=False)[1]

    def _settings(self) -> dict[str, Any]:
        names = ("hook_point", "uncounted_ids", "pad_id", "gate", "edit", "model", "facts")
        return {name: vars(self)[name] for name in names}


class GuardStack(nn.Module):
    """Guards of one or several hook points, whose decisions do not depend on each other there.

    All guards of a hook point read the same unedited stream; those of later layers read what
    earlier ones have edited. Where several would write the same feature of the same token, the
    oldest of those that write there does, once.

    Args:
        guards: Oldest first.
        policy: Who edits a sequence: each guard by its `own` decision, all of them once `any` has
            decided so, or once a `majority` has; guards of layers that are yet to run have no vote.

    Raises:
        UserError: If guards of one hook point come from different SAEs, or the policy is unknown.
    """

    def __init__(self, guards: Iterable[Guard] = (), policy: Policy = "own") -> None:
        super().__init__()
        check_choice("policy", policy, get_args(Policy))
        self.policy: Policy = policy
        self._guards = nn.ModuleList()
        for guard in guards:
            self.append(guard)

    @property
    def guards(self) -> list[Guard]:
        """The guards, oldest first."""
        return [guard for guard in self._guards if isinstance(guard, Guard)]

    def __len__(self) -> int:
        return len(self._guards)

    def append(self, guard: Guard) -> None:
        """Adds a guard, as the youngest.

        Raises:
            UserError: If it does not fit the others.
        """
        for other in self.guards:
            if other.hook_point == guard.hook_point:
                check_same_sae(other, guard)
        self._guards.append(guard)

    def attached(
        self,
        model: nn.Module,
        decision: DecisionRule = "sequence",
        continuation: Continuation = "running",
    ) -> Attachment:
        """Guards the model inside a `with` block; see `dsg.guard.attachment.Attachment`."""
        return Attachment(self.guards, model, decision, continuation, self.policy)


def _check_kinds(hook_point: Any, uncounted_ids: Any, pad_id: Any, facts: Any) -> None:
    """Refuses settings that are of another kind than those of a guard, as in an edited file."""
    ids = uncounted_ids if isinstance(uncounted_ids, Collection) else [None]
    wanted = {
        "hook_point": ("a name", hook_point, isinstance(hook_point, str)),
        "uncounted_ids": ("a list of token ids", uncounted_ids, all(map(_is_id, ids))),
        "pad_id": ("a token id or None", pad_id, pad_id is None or _is_id(pad_id)),
        "facts": ("a mapping", facts, facts is None or isinstance(facts, Mapping)),
    }
    for name, (kind, value, fits) in wanted.items():
        if not fits:
            raise UserError(f"`{name}` must be {kind}, got {value!r}; correct it.")


def _is_id(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
