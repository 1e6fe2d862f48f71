"""How long a run whose stages are known is likely to take yet."""

from collections.abc import Mapping


class TimeLeft:
    """Scales what the stages took elsewhere by what the finished ones take here.

    Args:
        usual: Seconds of every stage of the run on some machine, by name.
        trusted: Seconds for which that machine is believed to be like this one: so much time must
            pass before what is seen here counts as much. With 0 nothing is told before the first
            stage is finished.
    """

    def __init__(self, usual: Mapping[str, float], trusted: float) -> None:
        self._ahead = dict(usual)
        self._usual = self._here = trusted

    def finish(self, name: str, seconds: float | None) -> None:
        """Take a stage from those that are ahead.

        Args:
            name: One of `usual`; any other is left out of the account.
            seconds: What it took; None if an earlier run had finished it.
        """
        usual = self._ahead.pop(name, None)
        if usual is not None and seconds is not None:
            self._usual += usual
            self._here += seconds

    def tell(self) -> str:
        """A few words; empty where nothing is known or nothing is ahead."""
        if not self._ahead or self._usual == 0:
            return ""
        seconds = sum(self._ahead.values()) * self._here / self._usual
        if seconds < 60:
            return "less than a minute left"
        return f"about {seconds / 60:.0f} min left"
