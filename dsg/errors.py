"""The one exception type that the command line turns into a single sentence."""


class UserError(ValueError):
    """A mistake the user can mend.

    The message is one sentence: what was given, what was wanted, what came, and the remedy.
    """


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuses a value that is not among the choices.

    Raises:
        UserError: If it is not.
    """
    if value not in choices:
        raise UserError(f"`{name}` must be one of {list(choices)}, got {value!r}; choose one.")
