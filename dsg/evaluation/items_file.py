"""Values of every item on disk: `items.parquet`, beside the results that were made of them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsg.errors import UserError
from dsg.evaluation.items import Item, Passage, Question, item_key
from dsg.io import ITEMS_FILE, write_parquet


def item_rows(
    guard: str,
    kind: str,
    items: Sequence[Item],
    values: Mapping[str, Any],
    texts: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """One row per item.

    Args:
        guard: State of the guard: `none`, `off` or `on`.
        kind: `questions`, `passages` or `prompts`.
        items: In the order of their ids.
        values: One number per item and column, in the same order.
        texts: What was generated, in the same order.
    """
    columns = {name: column.tolist() for name, column in values.items()}
    return [
        {
            "guard": guard,
            "kind": kind,
            "domain": item.domain,
            "pool": item.pool,
            "key": item.key or _content_key(item),
            "id": item.id,
            "fact": item.fact if isinstance(item, Question) else None,
            "text": None if texts is None else texts[place],
            **{name: column[place] for name, column in columns.items()},
        }
        for place, item in enumerate(items)
    ]


def write_items(run_dir: str | Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write `items.parquet` in one atomic step; columns that a row lacks are null."""
    return write_parquet(Path(run_dir) / ITEMS_FILE, rows)


def read_items(run_dir: str | Path) -> list[dict[str, Any]]:
    """Read the rows of `items.parquet`.

    Raises:
        UserError: There is none, or it is damaged.
    """
    import pyarrow
    import pyarrow.parquet

    path = Path(run_dir) / ITEMS_FILE
    if not path.is_file():
        raise UserError(
            f"run_dir {str(run_dir)!r} holds no {ITEMS_FILE}; give the folder of a finished "
            "evaluation (`dsg test`)."
        )
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is damaged ({reason}); run the evaluation again.") from error


def _content_key(item: Item) -> str:
    if isinstance(item, Question):
        return item_key(item.prompt, *item.options)
    return item_key(item.context, item.text) if isinstance(item, Passage) else item_key(item.text)
