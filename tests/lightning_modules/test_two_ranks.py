"""Several gloo processes write the same bytes as one.

The processes are forked, because starting Python and importing everything twice takes longer than
all the runs together.
"""

import pytest

from dsg.io.results import read_results
from lightning_modules import EvaluationModule, RelearningModule, SequentialModule
from tests.lightning_modules.toy import ToyData, guard_settings, make_trainer


def evaluate(toy, run_dir, **trainer):
    # 15 questions and 7 passages in batches of 4: the last batch of either is incomplete.
    module = EvaluationModule(str(toy / "model"), guard=guard_settings(toy))
    make_trainer(run_dir, **trainer).test(module, ToyData(), verbose=False)


def evaluate_more_ranks_than_batches(toy, run_dir, **trainer):
    module = EvaluationModule(str(toy / "model"), guard=guard_settings(toy))
    make_trainer(run_dir, **trainer).test(module, ToyData(batch_size=99), verbose=False)


def fulfil_requests(toy, run_dir, **trainer):
    # Three batches per request: the second rank has none in the last round.
    module = SequentialModule(str(toy / "model"), guard=guard_settings(toy))
    trainer["reload_dataloaders_every_n_epochs"] = 1
    make_trainer(run_dir, **trainer).fit(module, ToyData("requests"))


@pytest.mark.parametrize("run", [evaluate, evaluate_more_ranks_than_batches, fulfil_requests])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_several_ranks_equal_one(toy, tmp_path, run, num_ranks):
    run(toy, tmp_path / "one")
    run(toy, tmp_path / "several", devices=num_ranks, strategy="ddp_fork")
    one, several = (tmp_path / name / "results.jsonl" for name in ("one", "several"))
    assert one.read_bytes() == several.read_bytes()


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_attacks_run_on_two_ranks_and_begin_at_the_same_state(toy, tmp_path, adapter):
    rows = []
    for num_ranks in (1, 2):
        run_dir = tmp_path / str(num_ranks)
        module = RelearningModule(
            str(toy / "model"), guard_settings(toy), mode="train_time", adapter=adapter
        )
        trainer = {"devices": 2, "strategy": "ddp_fork"} if num_ranks == 2 else {}
        make_trainer(run_dir, **trainer).fit(module, ToyData())
        rows.append(read_results(run_dir))
    one, two = ([row for row in found if row["epoch"] == 0] for found in rows)
    assert one == two
    assert {row["epoch"] for row in rows[1]} == {0, 1, 2}
    assert rows[0] != rows[1]  # other batches, fewer steps: only what is not trained is the same
