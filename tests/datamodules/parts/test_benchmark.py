"""A benchmark of one's own, as the page of the data modules shows it."""

import re
from pathlib import Path

import pytest

from dsg.errors import UserError
from dsg.io.results import read_results
from lightning_modules import EvaluationModule
from tests.datamodules.reading import read_by
from tests.lightning_modules.toy import make_trainer, save_toy

PAGE = Path(__file__).parents[3] / "datamodules" / "README.md"


@pytest.fixture
def poems(tmp_path):
    """An instance of the example on two poems of each kind."""
    save_toy(tmp_path)
    (tmp_path / "forget.txt").write_text("w0 w1 w2\n\nw3 w4")
    (tmp_path / "retain.txt").write_text("w5 w6\n\nw7 w8 w9")
    [example] = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    names: dict = {}
    exec(example, names)
    return names["Poems"](str(tmp_path / "model"), str(tmp_path))


def test_it_is_evaluated(poems, tmp_path):
    module = EvaluationModule(str(tmp_path / "model"))
    make_trainer(tmp_path / "run").test(module, poems, verbose=False)
    perplexity = {
        row["domain"]: row["n"]
        for row in read_results(tmp_path / "run")
        if row["metric"] == "perplexity"
    }
    assert perplexity == {"forget": 2, "retain": 2}


def test_it_is_unlearned(poems):
    read_by(poems, "unlearn").setup("fit")
    [pair] = poems.train_dataloader()
    assert {kind: len(pair[kind].input_ids) for kind in ("forget", "retain")} == {
        "forget": 2,
        "retain": 2,
    }


def test_what_it_does_not_train_is_refused(poems):
    message = "reads 'unlearn' for fit on 'poems', got one that reads 'finetune'"
    with pytest.raises(UserError, match=message):
        read_by(poems, "finetune").train_dataloader()
