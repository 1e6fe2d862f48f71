"""MUSE and TOFU, generations included, write the same bytes on one, two and three ranks."""

import pytest

from datamodules.muse import MuseData
from datamodules.tofu.data import TofuData
from lightning_modules import EvaluationModule
from tests.benchmark_folders import write_muse, write_tofu
from tests.lightning_modules.toy import guard_settings, make_trainer, save_toy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_toy(tmp_path_factory.mktemp("ranks"))
    # Neither the items nor the batches of two go round on two or three ranks.
    write_muse(folder / "muse", 3)
    write_tofu(folder / "tofu", 4)
    return folder


def evaluate(folder, benchmark, run_dir, **trainer):
    options = {"model_name": str(folder / "model"), "batch_size": 2}
    if benchmark == "muse":
        dataset = str(folder / "muse")
        data = MuseData(dataset=dataset, retrained="official", max_length=16, **options)
    else:
        data = TofuData(dataset=str(folder / "tofu"), retained="self", **options)
    module = EvaluationModule(str(folder / "model"), guard=guard_settings(folder))
    make_trainer(run_dir, **trainer).test(module, data, verbose=False)


@pytest.mark.parametrize("benchmark", ["muse", "tofu"])
def test_several_ranks_equal_one(folder, tmp_path, benchmark):
    evaluate(folder, benchmark, tmp_path / "1")
    for count in (2, 3):
        run_dir = tmp_path / str(count)
        evaluate(folder, benchmark, run_dir, devices=count, strategy="ddp_fork")
        for name in ("results.jsonl", "items.parquet"):
            assert (run_dir / name).read_bytes() == (tmp_path / "1" / name).read_bytes()
