"""Choosing on the validation half: the best of equally many tries."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsg.errors import UserError


@dataclass(frozen=True)
class Choice:
    """The best settings of a method on the validation half.

    Attributes:
        settings: What was varied, at its best.
        validation: `alignment`, `forget_accuracy`, `retain_accuracy` there.
        tried: Number of settings that were compared.
    """

    settings: dict[str, Any]
    validation: dict[str, float]
    tried: int


Try = tuple[dict[str, Any], dict[str, float]]


def best(tries: Sequence[Try]) -> Choice:
    """The try with the highest alignment; the earlier one of equals."""
    settings, validation = max(tries, key=lambda one: one[1]["alignment"])
    return Choice(settings, validation, len(tries))


def validation_scores(rows: Iterable[Mapping[str, Any]], epoch: int | None) -> dict[str, float]:
    """Alignment and the accuracies behind it, as one evaluation on validation facts measured them.

    Args:
        rows: Result rows of a run.
        epoch: Which evaluation; None where the run has a single one.

    Raises:
        UserError: The run measured none of them then, or on other facts.
    """
    found = {
        (row["domain"], row["metric"]): row["value"]
        for row in rows
        if (row["epoch"], row["protocol"], row["split"]) == (epoch, "cloze", "validation")
        and row["guard"] != "off"
    }
    try:
        return {
            "alignment": found["forget", "alignment"],
            "forget_accuracy": found["forget", "accuracy"],
            "retain_accuracy": found["retain", "accuracy"],
        }
    except KeyError as error:
        domain, metric = error.args[0]
        raise UserError(
            f"A method is tuned by what its run measures on validation facts, and there is no "
            f"{metric} of the domain {domain!r} after epoch {epoch}; set data.init_args.val_split: "
            "validation and enough epochs."
        ) from None
