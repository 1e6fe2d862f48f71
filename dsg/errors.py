"""The one exception type that the command line turns into a single sentence."""


class UserError(ValueError):
    """A mistake the user can mend.

    The message is one sentence: what was given, what was wanted, what came, and the remedy.
    """
