import json
import shutil
from pathlib import Path

import pytest

from dsg.cli.demo import text, text_model, text_work
from dsg.cli.demo.pretrained import open_pretrained, parse_sae_name
from dsg.cli.demo.text_model import Sizes, TextFiles, ensure_text_model, read_training
from dsg.cli.grid.work import work
from dsg.cli.grid.workers import Outcome, Workers
from dsg.cli.main import main
from dsg.errors import UserError
from dsg.io.results import read_results, read_run_facts
from dsg.report.files import read_drawn
from tests.helpers import standard_sae, tiny_model, tiny_tokenizer
from tests.text_writer import write_both

TINY = Sizes(
    vocab_size=120,
    d_model=16,
    num_layers=3,
    d_ff=32,
    repetitions=2,
    max_rounds=2,
    d_sae=64,
    sae_samples=20_000,
)


def run_here(workers, cells):
    """Do cells in this process, where patches hold, and imports are done."""
    for cell in cells:
        cell.clear(workers._run_dir)
        cell.finish(workers._run_dir, 1.0, work(cell, workers._run_dir))
        yield Outcome(cell, None)


@pytest.fixture(scope="module")
def shared():
    """Patches that last for the whole module, as the run that all tests look at does."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(text, "SIZES", TINY)
        patches.setattr(text, "GRID", {"ratio_percentile": [70.0, 50.0], "num_features": [2]})
        patches.setattr(text, "NUM_RANDOM_DRAWS", 2)
        patches.setattr(Workers, "run", run_here)
        yield patches


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shared):
    """A folder with two files, a cache and a finished run."""
    folder = tmp_path_factory.mktemp("text")
    shared.setenv("DSG_CACHE", str(folder / "cache"))
    write_both(folder)
    with pytest.MonkeyPatch.context() as patches:
        # Two epochs of a toy do not memorise; the rows are wanted all the same.
        patches.setattr(text_work, "is_measurable", lambda *_: True)
        assert main(command(folder)) == 0
    return folder


def command(folder: Path, *options: str, run: str = "run") -> list[str]:
    files = ["--forget", str(folder / "forget.txt"), "--retain", str(folder / "retain.txt")]
    return ["demo", *files, "--run_dir", str(folder / run), "--epochs", "1", *options]


def measured(run_dir: Path, **fields: object) -> list[dict]:
    rows = read_results(run_dir)
    return [row for row in rows if all(row[key] == value for key, value in fields.items())]


def test_every_measurement_has_its_rows(folder):
    run = folder / "run"
    for dataset in ("text/memorised", "text/unseen"):
        for method, guard in (
            ("base", "none"), ("dsg", "on"), ("dsg", "off"),
            ("static_clamp", "on"), ("random", "on"),
        ):  # fmt: skip
            shared = {"dataset": dataset, "method": method, "guard": guard, "attack": None}
            for domain in ("forget", "retain"):
                [row] = measured(run, **shared, metric="perplexity", domain=domain)
                assert row["n"] == (10 if domain == "forget" else 12)
                assert row["low"] <= row["value"] <= row["high"]
                rates = measured(run, **shared, metric="trigger_rate", domain=domain)
                assert len(rates) == (guard == "on")
                spoken = measured(run, **shared, metric="rouge_l", domain=domain)
                assert len(spoken) == ((method, guard) in (
                    ("base", "none"), ("dsg", "on"), ("static_clamp", "on"),
                ))  # fmt: skip
            areas = measured(run, **shared, metric="density_auroc")
            assert len(areas) == (guard == "on")
    assert {row["experiment"] for row in read_results(run)} == {"text_demo"}
    assert {row["split"] for row in read_results(run)} == {"test"}


def test_relearning_is_measured_before_and_after(folder):
    for attack in ("relearn_full", "relearn_lora"):
        for mode in ("test_time", "train_time"):
            for guard in ("on", "off"):
                for domain in ("forget_shown", "forget_unshown", "retain"):
                    rows = measured(
                        folder / "run",
                        attack=attack,
                        mode=mode,
                        guard=guard,
                        domain=domain,
                        metric="perplexity",
                    )
                    assert [row["epoch"] for row in rows] == [0, 1]


def test_what_else_the_run_leaves(folder):
    run = folder / "run"
    drawn = read_drawn(run)
    densities = drawn.densities["dsg"]
    assert {name: len(values) for name, values in densities.domains.items()} == {
        "forget, memorised": 10, "retain, memorised": 12,
        "forget, unseen": 10, "retain, unseen": 12,
    }  # fmt: skip
    [settings] = drawn.settings
    assert settings.tried == 2
    assert set(settings.chosen) == {"ratio_percentile", "num_features"}
    assert drawn.features
    facts = read_run_facts(run)
    [forget] = facts["files"]["forget"]
    assert set(forget) == {"name", "size", "sha256"}
    assert forget["name"] == "forget.txt"
    for name in ("run.json", "results.jsonl", "report.json", "report.html", "table.csv"):
        assert str(folder) not in (run / name).read_text()
    attacks = {path.relative_to(run / "cells").parts[1] for path in run.rglob("*.wandb")}
    assert attacks == {"relearn_full", "relearn_lora"}


def test_training_stops_after_its_rounds(folder):
    files = TextFiles([folder / "forget.txt"], [folder / "retain.txt"])
    cached = ensure_text_model(files, 0, TINY, show_progress=False)
    rounds = read_training(cached)
    assert len(rounds) == TINY.max_rounds
    assert all(found["memorised"] < 2 * found["unseen"] for found in rounds)


def test_other_text_is_another_model(folder, monkeypatch):
    built = []
    monkeypatch.setattr(text_model, "_build", lambda target, *_: built.append(target.name))
    other = folder / "other.txt"
    shutil.copy(folder / "retain.txt", other)
    forget = [folder / "forget.txt"]
    ensure_text_model(TextFiles(forget, [folder / "retain.txt"]), 0, TINY)
    assert built == []  # the run's own
    other.write_text(other.read_text() + "\nmore")
    ensure_text_model(TextFiles(forget, [other]), 0, TINY)
    ensure_text_model(TextFiles(forget, [folder / "retain.txt"]), 1, TINY)
    assert len(set(built)) == 2


def test_resume_keeps_stages_and_says_what_cannot_be_measured(folder, capsys):
    run = folder / "resumed"
    shutil.copytree(folder / "run", run)
    shutil.rmtree(run / "cells" / "seed_0" / "continuation")
    before = {path: path.stat().st_mtime_ns for path in run.glob("cells/**/cell.json")}
    capsys.readouterr()
    assert main(command(folder, "--resume", run="resumed")) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "verbatim continuation is not measurable: ROUGE-L" in said
    assert f"{len(before)} cells, {len(before) - 1} finished earlier" in said
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert measured(run, metric="rouge_l") == []
    others = [row for row in read_results(folder / "run") if row["metric"] != "rouge_l"]
    assert read_results(run) == others


def test_resume_refuses_other_text(folder, capsys):
    other = folder / "changed.txt"
    other.write_text((folder / "retain.txt").read_text() + "\nmore")
    arguments = command(folder, "--resume")
    arguments[arguments.index(str(folder / "retain.txt"))] = str(other)
    assert main(arguments) == 2
    assert "--resume needs the files and options of the interrupted run" in capsys.readouterr().err
    assert (folder / "run" / "report.html").is_file()


def test_pretrained_model_and_sae(folder, capsys):
    files = TextFiles([folder / "forget.txt"], [folder / "retain.txt"])
    cached = ensure_text_model(files, 0, TINY, show_progress=False)
    pretrained = ["--model", str(cached / "model"), "--sae", str(cached / "sae")]
    capsys.readouterr()
    assert main(command(folder, *pretrained, run="pretrained")) == 0
    run = folder / "pretrained"
    assert {row["dataset"] for row in read_results(run)} == {"text/unseen"}
    assert {row["model"] for row in read_results(run)} == {"model"}
    assert measured(run, attack="relearn_full") == []
    assert measured(run, metric="rouge_l") == []
    assert len(measured(run, metric="density_auroc", method="dsg")) == 1
    assert "not measurable" in capsys.readouterr().out
    assert str(folder) not in (run / "run.json").read_text()


def test_bad_text_leaves_nothing_behind(folder, capsys):
    arguments = command(folder, run="bad")
    arguments[arguments.index(str(folder / "forget.txt"))] = str(folder / "retain.txt")
    assert main(arguments) == 2
    assert "must not share passages" in capsys.readouterr().err
    assert not (folder / "bad").exists()


def test_ctrl_c_says_how_to_go_on(folder, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Workers, "run", interrupted)
    monkeypatch.setattr("sys.argv", ["dsg", *command(folder, run="stopped")])
    assert main() == 130
    assert "continue with: dsg demo --forget" in capsys.readouterr().err
    assert (folder / "stopped" / "inputs.json").is_file()


class TestPretrained:
    @pytest.fixture
    def model(self, tmp_path):
        tiny_model().save_pretrained(tmp_path / "model")
        tiny_tokenizer().save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    def sae(self, tmp_path, hook_name, **settings):
        sae = standard_sae(**settings)
        sae.cfg.metadata.hook_name = hook_name
        sae.save_model(tmp_path / "sae")
        return str(tmp_path / "sae")

    def test_hook_point_is_the_saes(self, model, tmp_path):
        found = open_pretrained(model, self.sae(tmp_path, "blocks.1.hook_resid_post"))
        assert (found.sae, found.sae_id) == (str(tmp_path / "sae"), None)
        assert found.hook_point == "blocks.1.hook_resid_post"

    def test_sae_without_hook_point(self, model, tmp_path):
        with pytest.raises(UserError, match=r"--sae must say in its metadata where it reads"):
            open_pretrained(model, self.sae(tmp_path, None))

    def test_sae_of_a_missing_layer(self, model, tmp_path):
        with pytest.raises(UserError, match="one of the model's 3 decoder layers"):
            open_pretrained(model, self.sae(tmp_path, "blocks.9.hook_resid_post"))

    def test_sae_of_another_width(self, model, tmp_path):
        path = self.sae(tmp_path, "blocks.1.hook_resid_post", d_in=8)
        with pytest.raises(UserError, match="d_in must equal the model's residual width 16, got 8"):
            open_pretrained(model, path)

    def test_missing_model(self, tmp_path):
        path = self.sae(tmp_path, "blocks.1.hook_resid_post")
        with pytest.raises(UserError, match="`model_name` must be a Hugging Face folder"):
            open_pretrained(str(tmp_path / "gone"), path)

    def test_names_part_at_the_first_slash(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        name = "gemma-scope-2b-pt-res/layer_3/width_16k"
        assert parse_sae_name(name) == ("gemma-scope-2b-pt-res", "layer_3/width_16k")
        (tmp_path / name).mkdir(parents=True)
        assert parse_sae_name(name) == (name, None)

    @pytest.mark.parametrize("name", ["release", "/id", "release/"])
    def test_name_without_an_id(self, name):
        with pytest.raises(UserError, match="--sae must be RELEASE/ID of SAELens's list"):
            parse_sae_name(name)


def test_inputs_are_json(folder):
    path = folder / "run" / "inputs.json"
    assert json.loads(path.read_text())["config"]["epochs"] == 1
