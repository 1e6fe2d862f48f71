"""Configuration files of a command line, read once before the parser that trusts them."""

import inspect
import os.path
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsg.cli.config_errors import imported
from dsg.cli.configs import read_config
from dsg.errors import UserError
from dsg.io import read_yaml

_CONFIG = ("-c", "--config")
_YAML = (".yaml", ".yml")
# Settings of a module that its data module may have too: a configuration states each once.
_SHARED = ("model_name", "base_model_name", "seed")


def check_config_files(arguments: Sequence[str]) -> None:
    """Refuses a file that the parser would wait for, choke on, or read half of.

    Args:
        arguments: Options and values; values that name YAML files, such as `--model model.yaml`,
            are looked at as well.

    Raises:
        UserError: A file is missing, no regular file, not in UTF-8, no YAML, has a key twice, or,
            after `--config`, holds no mapping.
    """
    for option, value in _values(arguments):
        path = Path(value)
        inline = "\n" in value or "{" in value
        if option in _CONFIG and not inline:
            read_config(path)
        elif value.endswith(_YAML) and not inline and path.exists():
            read_yaml(path)


def with_shared(arguments: Sequence[str]) -> list[str]:
    """A command line on which the data's settings that follow from the model's are spelled out.

    Not by `link_arguments` of the parser, which would overwrite a second value that differs: the
    tokenizer of a changed model's original may be meant (`check_inputs` knows which are allowed).

    Raises:
        UserError: A setting is given twice, and the values differ; or the facts asked for are those
            of another embedded world than the model's.
    """
    given = dict(_settings(arguments))
    added = []
    for place, path in (("data", "data.init_args"), ("data.of", "data.init_args.of.init_args")):
        kind = imported(str(given.get(f"{place}.class_path") or given.get(place) or "builtins"))
        accepted = inspect.signature(kind).parameters if callable(kind) else ()
        for name in _SHARED:
            value, second = given.get(f"model.{name}"), given.get(f"{place}.{name}")
            if value is None or name not in accepted:
                continue
            if second is None:
                added.append(f"--{path}.{name}={value}")
            elif str(second) != str(value) and name != "model_name":
                raise UserError(
                    f"`{name}` of the data must be that of the model, {value!r}, got {second!r}; "
                    "give it once, to the model."
                )
        if callable(kind) and kind.__module__.startswith("datamodules.tiny_world"):
            _check_world(given, place)
    return [*arguments, *added]


def _check_world(given: Mapping[str, Any], place: str) -> None:
    """Refuses questions about a world that the model was not trained on."""
    name = given.get("model.model_name") or given.get(f"{place}.model_name")
    seeds = (given.get("model.seed"), given.get(f"{place}.seed"))
    seed = next((seed for seed in seeds if seed is not None), None)
    trained = re.match(r"tiny_world:(\d+)", str(name))
    if trained and seed is not None and str(seed) != trained[1]:
        raise UserError(
            f"`seed` must be that of the model's world, {trained[1]} of {name!r}, got {seed!r}: "
            f"another world has other facts; give `model_name: tiny_world:{seed}/model` too."
        )


def _settings(arguments: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Each setting of a command line by its dotted key without `init_args`, the last one wins."""
    for option, value in _values(arguments):
        key, is_file = option.removeprefix("--"), os.path.isfile(value)
        if option in _CONFIG:
            yield from _flat("", read_config(Path(value)) if is_file else {})
        elif value.endswith(_YAML) and is_file:
            yield from _flat(f"{key}.", read_yaml(Path(value)))
        else:
            yield key.replace(".init_args", ""), value


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    for name, inner in value.items() if isinstance(value, Mapping) else ():
        yield f"{prefix}{name}", inner
        yield from _flat(prefix if name == "init_args" else f"{prefix}{name}.", inner)


def _values(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each value with the option before it, whether an equals sign or a space is between them."""
    option = ""
    for word in arguments:
        if not word.startswith("-"):
            yield option, word
        else:
            option, equals, value = word.partition("=")
            if equals:
                yield option, value
