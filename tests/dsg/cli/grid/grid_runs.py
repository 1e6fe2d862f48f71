"""Modules of a few numbers that write results, for the grids of the tests."""

from pathlib import Path

from dsg.io.results import row, write_results
from tests.dsg.cli.tiny_runs import TinyModule


class MeasuringModule(TinyModule):
    """Measures its own settings, so that a table can be checked by hand."""

    def __init__(self, lr: float = 0.1, seed: int = 0):
        super().__init__(lr)
        self.seed = seed

    def on_fit_end(self) -> None:
        weight = self.linear.weight.item()
        fields = {"domain": "forget", "protocol": "cloze", "method": "tiny"}
        rows = [
            row(metric="accuracy", value=self.lr + self.seed, **fields),
            row(metric="weight", value=weight, **fields),
        ]
        write_results(Path(str(self.trainer.default_root_dir)), rows)
