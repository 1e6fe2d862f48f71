"""Which model a guard was made for."""

import logging
from dataclasses import dataclass
from typing import Any

from torch import nn

from dsg.errors import UserError
from dsg.io import noted_revision
from dsg.lm.hooks import num_embeddings, unwrap

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelIdentity:
    """What is known about a model, without its weights.

    Attributes:
        name: Folder or hub name it was loaded from.
        revision: Commit on the hub, if it came from there.
        model_type: Architecture's name in Transformers.
        num_layers: Decoder layers.
        hidden_size: Width of the residual stream.
        vocab_size: Rows of the input embedding.
    """

    name: str
    revision: str | None
    model_type: str
    num_layers: int
    hidden_size: int
    vocab_size: int

    @classmethod
    def of(cls, model: nn.Module) -> "ModelIdentity":
        """The identity of a Hugging Face model, possibly wrapped."""
        inner = unwrap(model)
        text = inner.config.get_text_config()
        return cls(
            name=inner.config.name_or_path or type(inner).__name__,
            revision=noted_revision(inner.config),
            model_type=inner.config.model_type,
            num_layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            vocab_size=num_embeddings(model),
        )

    @classmethod
    def read(cls, fields: dict[str, Any] | None) -> "ModelIdentity | None":
        """The identity in an artifact; None if none was known.

        Raises:
            UserError: If the fields are others.
        """
        try:
            return cls(**fields) if fields else None
        except TypeError as error:
            raise UserError(
                f"`model` must be a model's identity, got {fields!r} ({error}); save the guard "
                "again."
            ) from error

    def check(self, model: nn.Module) -> None:
        """Refuses another architecture; another name alone is logged.

        A guard has to work on copies of its model that an attacker has fine-tuned and saved under
        another name, so the name cannot decide.

        Raises:
            UserError: If architecture, width, number of layers or vocabulary differ.
        """
        other = ModelIdentity.of(model)
        for name in ("model_type", "hidden_size", "num_layers", "vocab_size"):
            wanted, got = vars(self)[name], vars(other)[name]
            if wanted != got:
                raise UserError(
                    f"`model` must have {name} {wanted!r} like {self.name!r}, for which the guard "
                    f"was made, got {got!r}; build a guard for this model."
                )
        if other.name != self.name:
            logger.info("guard made for %s is attached to %s", self.name, other.name)
