"""Configurations: read, laid over each other, changed by dotted keys; names in them."""

import copy
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from dsg.errors import UserError
from dsg.io import read_yaml

Config = dict[str, Any]

_BENCHMARK = re.compile(r"^tiny_world:(\d+)/")


def read_config(path: Path) -> Config:
    """Read a runnable configuration.

    Raises:
        UserError: There is none, or it is no mapping.
    """
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{str(path)!r} must hold a mapping, got {content!r}; mend it.")
    return content


def merged(configs: Iterable[Mapping[str, Any]]) -> Config:
    """Configurations laid over each other, the last on top, as several `-c` are."""
    result: Config = {}
    for config in configs:
        for name, value in config.items():
            below = result.get(name)
            both = isinstance(below, Mapping) and isinstance(value, Mapping)
            result[name] = merged([below, value]) if both else copy.deepcopy(value)  # type: ignore
    return result


def combinations(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """All combinations of a grid's values, the last name varying fastest."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def changed(config: Mapping[str, Any], values: Mapping[str, Any]) -> Config:
    """A copy of a configuration with other values.

    Args:
        config: Nested mappings.
        values: New values by dotted key; missing mappings on the way are made.

    Raises:
        UserError: A key leads through something that is no mapping.
    """
    copied = copy.deepcopy(dict(config))
    for key, value in values.items():
        *parents, last = key.split(".")
        place = copied
        for parent in parents:
            inner = place.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise UserError(
                    f"The key {key!r} of a grid must lead through mappings, got {inner!r} at "
                    f"{parent!r}; mend the key."
                )
            place = inner
        place[last] = copy.deepcopy(value)
    return copied


def value_at(config: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key, None if there is none."""
    place: Any = config
    for part in key.split("."):
        if not isinstance(place, Mapping) or part not in place:
            return None
        place = place[part]
    return place


def with_seed(config: Mapping[str, Any], seed: int) -> Config:
    """The run of another seed: every `seed` in it, the global one, and the embedded benchmark's."""
    seeded = _seeded(config, seed)
    return {**seeded, "seed_everything": seed}


def benchmark_seeds(config: Any) -> set[int]:
    """Seeds of the embedded benchmarks that a configuration names."""
    return {
        int(match[1])
        for value in _leaves(config)
        if isinstance(value, str) and (match := _BENCHMARK.match(value))
    }


def map_strings(config: Any, change: Callable[[str], str]) -> Any:
    """A copy in which every string is what `change` makes of it."""
    if isinstance(config, str):
        return change(config)
    if isinstance(config, Mapping):
        return {name: map_strings(value, change) for name, value in config.items()}
    if isinstance(config, list):
        return [map_strings(value, change) for value in config]
    if isinstance(config, Namespace):
        copied = Namespace()
        vars(copied).update(map_strings(vars(config), change))
        return copied
    return config


def label(values: Mapping[str, Any]) -> str:
    """A name of a combination for people and for folders, such as `lr=0.001,alpha=20`.

    Keys lose their paths; where two of them end alike, as much of the path stays as tells them
    apart.
    """
    names = _short_names(list(values))
    parts = [f"{names[key]}={_shown(value)}" for key, value in values.items()]
    return re.sub(r"[^\w.,=+-]+", "_", ",".join(parts)) or "default"


def _seeded(value: Any, seed: int) -> Any:
    if isinstance(value, Mapping):
        return {
            name: seed if name == "seed" and not isinstance(item, Mapping) else _seeded(item, seed)
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [_seeded(item, seed) for item in value]
    if isinstance(value, str):
        return _BENCHMARK.sub(f"tiny_world:{seed}/", value)
    return value


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    names = {}
    for key in keys:
        parts = key.split(".")
        for length in range(1, len(parts) + 1):
            short = ".".join(parts[-length:])
            if sum(f".{other}".endswith(f".{short}") for other in keys) == 1:
                break
        names[key] = short
    return names


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def resolve_benchmark(value: str) -> str:
    """Replace `tiny_world:SEED/model` or `tiny_world:SEED/sae` by the folder that holds it.

    The embedded benchmark is trained if the cache does not hold it yet.

    Raises:
        UserError: The value begins like one of the two but is neither.
    """
    if not value.startswith("tiny_world:"):
        return value
    match = re.fullmatch(r"tiny_world:(\d+)/(model|sae)", value)
    if match is None:
        raise UserError(
            f"The embedded benchmark is named tiny_world:SEED/model or tiny_world:SEED/sae, "
            f"got {value!r}; mend the configuration."
        )
    from lightning.pytorch.utilities.seed import isolate_rng

    from dsg.cli.tiny_world import ensure_tiny_world

    # Training it draws random numbers; a run must not depend on whether the cache was warm.
    with isolate_rng():
        return str(ensure_tiny_world(int(match[1])) / match[2])
