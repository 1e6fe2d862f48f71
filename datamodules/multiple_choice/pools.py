"""Which sets of questions are to be forgotten and which retained."""

from collections.abc import Mapping, Sequence
from typing import Literal

from dsg.errors import UserError

Pool = Literal["forget", "retain"]


def check_names(names: Mapping[Pool, Sequence[str]]) -> None:
    """Refuses a run without questions, and a set that is to be forgotten and retained.

    Raises:
        UserError: It is one.
    """
    if not any(names.values()):
        raise UserError("`forget` or `retain` must name a set of questions, got none; name one.")
    both = sorted({*names["forget"]} & {*names["retain"]})
    if both:
        raise UserError(
            f"`forget` and `retain` must not share a set, got {', '.join(both)} in both; remove it "
            "from one of them."
        )


def check_unused(subject: str, pool: Pool, pools: Mapping[str, Pool]) -> None:
    """Refuses a set whose results could be taken for those of another set or pool.

    Args:
        subject: Its name.
        pool: Its pool.
        pools: Those of the sets read before.

    Raises:
        UserError: The name is taken.
    """
    if subject in pools or (subject in ("forget", "retain") and subject != pool):
        raise UserError(
            f"every set must have a name of its own, got {subject!r} in `{pool}` where that name "
            "is taken; rename the file or its subject."
        )
