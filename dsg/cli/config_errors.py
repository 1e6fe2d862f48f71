"""One sentence out of jsonargparse's tree of reasons why a configuration was refused."""

import ast
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module

from dsg.errors import UserError, chain, did_you_mean

_KEY = re.compile(r'Parser key "(.+?)":?(?: (.+))?$')
_CLASS = re.compile(r"Problem with given class_path '(.+?)':?$")
_BASE = re.compile(r"Subtypes: \[<class '(?:\w+\.)*(\w+)'>")
# Lines that repeat what the lines around them say in words a user knows.
_NOISE = re.compile(
    r"Does not validate against any of the Union subtypes|Errors:$|Given value type: "
    r"|Expected a path but .* either not accessible or invalid$|Expected a <class 'NoneType'>"
)
# Entries of earlier versions.
_GONE = {"task": ", because the class of `model` decides what is read"}
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list",
    "dict": "a mapping",
}


@dataclass
class _Reason:
    """A line that says what is wrong.

    Attributes:
        depth: Its indentation: the deepest one is about what the user wrote.
        key: Dotted path of the key that it is about.
        owner: Class whose argument that key is, if it is a class's.
        base: Class of which a value had to be one.
        text: The line.
        got: The value that was given, if it is told.
    """

    depth: int
    key: str
    owner: str
    base: str
    text: str
    got: str = ""


def one_sentence(message: str, remedy: str) -> str:
    """What was wanted, at which key, what came, and what was perhaps meant.

    Args:
        message: Text of the `argparse.ArgumentError`; several indented lines.
        remedy: What to do, where there is no better advice.
    """
    reasons = _reasons(message)
    deepest = max((reason.depth for reason in reasons), default=0)
    chosen = [reason for reason in reasons if reason.depth == deepest]
    sentence = _told(chosen) if chosen else " ".join(message.split())
    return sentence if sentence.endswith("?") else f"{sentence}; {remedy}."


def one_line(error: Exception) -> str:
    """The last of an error's lines, which says what the ones before it announce."""
    return str(error).strip().splitlines()[-1].strip().rstrip(".")


def user_error_behind(error: BaseException | None) -> UserError | None:
    """The sentence of a class that refused its arguments, which jsonargparse buries when it raises.

    Args:
        error: What was raised in the end.

    Returns:
        The first `UserError` of the chain that led to it, itself included; None if there is none.
    """
    return next((each for each in chain(error) if isinstance(each, UserError)), None)


def _reasons(message: str) -> list[_Reason]:
    """All lines that say what is wrong, with the keys and classes that they lie under."""
    reasons: list[_Reason] = []
    keys: list[tuple[int, str]] = []
    owners: list[tuple[int, str]] = [(-1, "")]
    base = ""
    for line in filter(str.strip, message.splitlines()):
        text = line.strip().removeprefix("- ")
        depth = len(line) - len(line.lstrip())
        if match := _KEY.match(text):
            keys = [entry for entry in keys if entry[0] < depth] + [(depth, match[1])]
            text = match[2] or ""
        elif match := _CLASS.match(text):
            owners = [entry for entry in owners if entry[0] < depth] + [(depth, match[1])]
            continue
        if text.startswith("Given value: "):
            for reason in reasons:
                if depth <= reason.depth and not reason.got:
                    value = text.removeprefix("Given value: ")
                    nested = re.match(r"NestedArg\(.*?val=(.*)\)$", value)
                    reason.got = nested[1].strip("'") if nested else value
        elif match := _BASE.match(text):
            base = match[1]
        elif text and not _NOISE.match(text) and not text.startswith("Subtypes: "):
            inside = [owner for at, owner in owners if at < depth]
            reasons.append(_Reason(depth, _dotted(keys, owners, depth), inside[-1], base, text))
    return reasons


def _dotted(keys: list[tuple[int, str]], owners: list[tuple[int, str]], depth: int) -> str:
    """The key as a configuration has it: below a class's name its arguments are `init_args`."""
    path = ""
    for at, key in sorted([*keys, *owners[1:]]):
        if at >= depth and path:
            break
        if (at, key) in owners:
            kind = imported(key)
            path += "" if dataclasses.is_dataclass(kind) or kind is None else ".init_args"
        else:
            path += f".{key}"
    return path.removeprefix(".")


def _told(reasons: list[_Reason]) -> str:
    reason = reasons[0]
    key = f"`{reason.key.removesuffix('.init_args')}`" if reason.key else "the command line"
    choices = list(dict.fromkeys(choice for each in reasons for choice in _choices(each.text)))
    types = [_type(each.text) for each in reasons if not _choices(each.text)]
    if all(types):
        if choices:
            types.append("one of " * (len(choices) > 1) + ", ".join(map(repr, choices)))
        got = reason.text.partition("Got value: ")[2] or reason.got
        return f"{key} must be {' or '.join(types)}, got {got!r}{did_you_mean(got, choices)}"
    for pattern, tell in _TOLD:
        if match := re.search(pattern, reason.text):
            return tell(key, reason, match)
    return reason.text if key == "the command line" else f"{key}: {reason.text}"


def _type(text: str) -> str:
    """What a type is called; empty for another kind of line."""
    match = re.match(r"Expected a <class '(?:\w+\.)*(\w+)'>", text)
    return _TYPES.get(match[1], match[1]) if match else ""


def _choices(text: str) -> list[str]:
    match = re.match(r"Expected a typing\.Literal(\[.*?\])(?:\. Got value|$)", text)
    return [str(choice) for choice in ast.literal_eval(match[1])] if match else []


def _no_entry(key: str, reason: _Reason, match: re.Match[str]) -> str:
    name = match[1]
    if reason.owner:
        near = _GONE.get(name) or did_you_mean(name, _arguments(reason.owner))
        return f"{key} ({reason.owner}) has no entry {name!r}{near}"
    near = did_you_mean(name.removeprefix("--"), _run_options())
    return f"there is no option {name!r}{near}"


def _no_class(key: str, _: _Reason, match: re.Match[str]) -> str:
    module, name = match[1], match[2]
    owner = imported(module)
    near = did_you_mean(name, getattr(owner, "__all__", dir(owner)))
    return f"{key} names a class that there is not, {module} has no {name!r}{near}"


def _no_module(key: str, _: _Reason, match: re.Match[str]) -> str:
    return f"{key} names a class of the module {match[1]!r}, which cannot be found"


def _other_class(key: str, reason: _Reason, match: re.Match[str]) -> str:
    given = match[1] or reason.got
    wanted = match[2] or reason.base
    return f"{key} must be a {wanted}, by its dotted path or as a mapping, got {given!r}"


def _missing(key: str, reason: _Reason, match: re.Match[str]) -> str:
    place = f"{key} ({reason.owner})" if reason.owner else key
    return f"{place} must give {match[1]}, got none"


_TOLD: list[tuple[str, Callable[[str, _Reason, re.Match[str]], str]]] = [
    (r"Option '(.+?)' is not accepted", _no_entry),
    (r"does not accept option '(.+?)'", _no_entry),
    (r"unrecognized arguments: (\S+)", _no_entry),
    (r"module '(.+?)' has no attribute '(.+?)'", _no_class),
    (r"No module named '(.+?)'", _no_module),
    (r"Import path ?(\S*) does not correspond to a subclass of (\w+)", _other_class),
    (r"Expected a dot import path string: (.+?)()$", _other_class),
    (r"Unexpected import path format: (.+?)()$", _other_class),
    (r"the following arguments are required: (.+)", _missing),
]


def _arguments(class_path: str) -> Iterable[str]:
    """Arguments of a class or function; those that `**` passes on to a base class included."""
    kind = imported(class_path)
    names: list[str] = []
    for owner in kind.__mro__ if isinstance(kind, type) else [kind] if callable(kind) else []:
        parameters = inspect.signature(owner).parameters
        names += parameters
        if not any(item.kind is item.VAR_KEYWORD for item in parameters.values()):
            break
    return names


def _run_options() -> list[str]:
    from lightning.pytorch import Trainer

    own = ("config", "seed_everything", "run_dir", "overwrite", "resume", "print_config", "model")
    own += ("data", "trainer", "ckpt_path")
    return [*own, *(f"trainer.{name}" for name in inspect.signature(Trainer).parameters)]


def imported(path: str) -> object:
    """What a dotted path leads to; None if that is nothing."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name, None) if module else import_module(path)
    except ImportError:
        return None
