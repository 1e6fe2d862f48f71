"""One sentence out of jsonargparse's tree of reasons why a configuration was refused."""

import re

from dsg.errors import UserError

# Lines that repeat what the lines around them say in words a user knows.
_NOISE = re.compile(
    r"Does not validate against any of the Union subtypes|Subtypes: |Errors:$"
    r"|Given value type: |Given value: |- Expected a <class 'NoneType'>"
)


def one_sentence(message: str) -> str:
    """Shorten a parser's error to the path to the key, what was wanted and what came.

    Args:
        message: Text of the `argparse.ArgumentError`; several indented lines.
    """
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    kept = [line.removeprefix("- ").rstrip(":") for line in lines if not _NOISE.match(line)]
    sentence = re.sub(r"a <class '(?:\w+\.)*(\w+)'>", r"\1", ": ".join(kept))
    got = [line.removeprefix("Given value: ") for line in lines if line.startswith("Given value: ")]
    if got and "Expected" in sentence and "Got value" not in sentence:
        sentence += f". Got value: {got[0]}"
    return sentence.replace("Parser key", "key")


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
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error
