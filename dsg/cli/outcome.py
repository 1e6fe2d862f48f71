"""The end of a run on the terminal: its numbers, and where its files lie."""

from pathlib import Path

from rich.console import Console

from dsg.io import ITEMS_FILE, RESULTS_FILE, read_results
from dsg.report import outcome_table

# What a run may leave, and what it is for; in this order.
_FILES = {
    RESULTS_FILE: "every measurement",
    ITEMS_FILE: "the values of each item, for dsg compare",
    "predictions.jsonl": "a row per text",
    "questions.json": "the questions that are kept, for `keep` of the data",
    "sweep.csv": "threshold and error rates for every number of features",
    "guard": "the guard, for `artifact`",
    "guards": "the guards",
    "model": "the model, for `model_name`",
    "answers_off.jsonl": "the answers with the guard off",
    "answers_on.jsonl": "the answers with the guard on",
    "metrics.csv": "what was logged on the way",
}


def print_outcome(run_dir: Path) -> None:
    """Print the table of a finished run and the paths of what it has left."""
    console = Console()
    has_results = (run_dir / RESULTS_FILE).is_file()
    if has_results:
        table, num_more = outcome_table(read_results(run_dir))
        if table is not None:
            console.print(table)
        if num_more:
            console.print(f"and {num_more} more measurements in {RESULTS_FILE}\n", highlight=False)
    found = {name: use for name, use in _FILES.items() if (run_dir / name).exists()}
    width = max((len(str(run_dir / name)) for name in found), default=0)
    for name, use in found.items():
        path = str(run_dir / name)
        console.print(f"{path:<{width}}  {use}", highlight=False, markup=False, soft_wrap=True)
    if has_results:
        page = f"dsg report {run_dir}"
        console.print(f"{page:<{width}}  makes a page of it", highlight=False, soft_wrap=True)
