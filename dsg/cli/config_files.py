"""Configuration files of a command line, read once before the parser that trusts them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from dsg.cli.grid.overrides import read_config
from dsg.io import read_yaml

_CONFIG = ("-c", "--config")
_YAML = (".yaml", ".yml")


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
