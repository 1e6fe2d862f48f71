"""The reproduction configurations end to end, on tiny stand-ins in the hub's layouts."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from datamodules.multiple_choice.rows import read_sets
from dsg.cli.configs import merged, read_config
from dsg.cli.lightning_cli import run_name
from dsg.cli.main import main
from dsg.evaluation.benchmarks.multiple_choice.permutations import VARIANTS
from dsg.evaluation.benchmarks.multiple_choice.question_filter import (
    FILTER_FILE,
    FilteredModel,
    filter_content,
)
from dsg.evaluation.benchmarks.multiple_choice.subjects import expand_sets
from dsg.io.results import read_results, row, write_results
from dsg.lm import load_config
from tests.benchmark_folders import write_muse
from tests.hub_folders import (
    write_bio_forget,
    write_corpora,
    write_gemma,
    write_gemma_scope,
    write_mmlu,
    write_wikitext,
    write_wmdp,
)
from tests.reproductions import FOLDER, RUNS

STAND_IN = FOLDER.parent / "parts" / "stand_in.yaml"
NUM_MUSE = 5
MODELS = (
    "google/gemma-2-2b",
    "google/gemma-2-2b-it",
    "runs/finetune_muse_target/model",
    "runs/finetune_muse_books_target/model",
)
QUICK = ("--trainer.logger", "false", "--trainer.enable_progress_bar", "false")


def config(name: str) -> dict:
    return merged(map(read_config, RUNS[name]))


def chosen(module: str, data: str) -> list[str]:
    """The configurations that run this kind of module on this kind of data."""
    names = {name: (config(name)["model"], config(name)["data"]) for name in RUNS}
    return [
        name
        for name, (model, source) in names.items()
        if model["class_path"].endswith(module) and source["class_path"].endswith(data)
    ]


ASKED = chosen("EvaluationModule", "ChoiceData")
GUARDED_MUSE = chosen("EvaluationModule", "MuseData")
UNLEARNED = chosen("UnlearningModule", "ChoiceData")
UNLEARNED_MUSE = chosen("UnlearningModule", "MuseData")
ATTACKED = chosen("RelearningModule", "ChoiceData")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What lies in the working directory: hub names as folders, the SAE, and earlier runs."""
    root = tmp_path_factory.mktemp("hub")
    gemma = write_gemma(root / MODELS[0])
    for name in MODELS[1:]:
        shutil.copytree(gemma, root / name)
    write_gemma_scope(root / "stand_in/sae")
    write_wmdp(root / "cais/wmdp", num=12)
    write_mmlu(root / "cais/mmlu", num=8)
    write_corpora(root / "cais/wmdp-corpora")
    write_bio_forget(root / "cais/wmdp-bio-forget-corpus")
    write_wikitext(root / "Salesforce/wikitext")
    for corpus in ("news", "books"):
        write_muse(root / f"muse-bench/MUSE-{corpus.title()}", num=NUM_MUSE)
        measured = {"dataset": f"muse_{corpus}", "domain": "forget", "split": "test"}
        auc = {"metric": "min_k_auc", "value": 0.5, "n": 2 * NUM_MUSE}
        write_results(
            root / f"runs/muse_{corpus}_retrained",
            [row(experiment="evaluation", guard="none", **measured, **auc)],
        )
    return root


@pytest.fixture
def here(folders, monkeypatch):
    monkeypatch.chdir(folders)
    return folders


@pytest.fixture
def question_filter(here):
    """The file of a filter run in which the model knew all questions but the first of each set."""
    names = ["wmdp-bio", "wmdp-cyber", *expand_sets("retain", ["utility_bio", "college_biology"])]
    sets = read_sets(names)
    correct, number = {}, 0
    for rows in sets.values():
        for place, _ in enumerate(rows):
            correct |= {number * VARIANTS + variant: place > 0 for variant in range(VARIANTS)}
            number += 1
    model = FilteredModel.of(MODELS[1], load_config(MODELS[1]))
    folder = here / "runs/select_question_filter"
    folder.mkdir(exist_ok=True)
    content = filter_content(model, "dsg", sets, correct)
    (folder / FILTER_FILE).write_text(json.dumps(content))
    return content


def run(command: str, name: str, *options: str, parts: Sequence[Path] = ()) -> list[dict]:
    paths = [word for path in (*RUNS[name], *parts) for word in ("-c", str(path))]
    arguments = (*options, "--trainer.accelerator", "cpu", *QUICK, "--overwrite")
    assert main([command, *paths, *arguments]) == 0
    return read_results(folder(name, *parts))


def folder(name: str, *parts: Path) -> Path:
    return Path("runs", run_name(*RUNS[name], *parts))


def test_every_file_is_run():
    used = {path for paths in RUNS.values() for path in paths}
    assert used == set(FOLDER.rglob("*.yaml"))


def test_the_rows_of_the_tables_are_there():
    def wmdp(*methods: str) -> set[str]:
        return {f"{method}_wmdp_{data}" for data in ("bio", "cyber") for method in methods}

    assert wmdp("dsg", "farrell") <= set(ASKED)
    assert wmdp("ga", "npo", "rmu", "scrub", "ssd") == set(UNLEARNED)
    assert set(GUARDED_MUSE) == {"dsg_muse_books", "dsg_muse_news"}
    baselines = ("ga", "grad_diff", "npo", "rmu", "simnpo")
    assert set(UNLEARNED_MUSE) == {f"muse_{method}_muse_news" for method in baselines}
    assert set(ATTACKED) == {"relearn_full_wmdp_bio", "relearn_rmu_wmdp_bio"}
    parts = (ASKED, GUARDED_MUSE, UNLEARNED, UNLEARNED_MUSE, ATTACKED)
    assert sorted(name for part in parts for name in part) == sorted(RUNS)


@pytest.mark.usefixtures("question_filter")
@pytest.mark.parametrize("name", ASKED)
def test_questions(name):
    rows = run("test", name, parts=[STAND_IN])
    given = config(name)
    [forget] = given["data"]["init_args"]["forget"]
    facts = json.loads((folder(name, STAND_IN) / "run.json").read_text())
    assert {row["guard"] for row in rows} == {"on", "off"}
    assert {row["experiment"] for row in rows} == {given["model"]["init_args"]["experiment"]}
    values = {
        (row["guard"], row["metric"]): (row["value"], row["n"])
        for row in rows
        if row["domain"] == forget
    }
    kept = 12 - ("keep" in given["data"]["init_args"])
    assert facts["data"]["sets"][forget]["n"] == kept
    assert 0 < values["on", "accuracy"][1] < kept  # the reported half
    if given["model"]["init_args"]["guard"]["method"] != "dsg":  # edits every sequence
        assert values["on", "trigger_rate"][0] == 1.0
        assert values["on", "correct_probability"] != values["off", "correct_probability"]
    # One file has put the SAE's stand-in there and changed nothing else.
    settings = given["model"]["init_args"]["guard"]
    used = facts["config"]["model"]["init_args"]["guard"]
    assert {key: used[key] for key in settings} == {
        **settings,
        "sae": "stand_in/sae",
        "sae_id": None,
    }


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", GUARDED_MUSE)
def test_muse(name):
    rows = run("test", name, parts=[STAND_IN])
    values = {(row["guard"], row["domain"], row["metric"]): row["value"] for row in rows}
    for guard in ("off", "on"):
        for domain, metric in (
            ("forget", "verbmem"),
            ("forget", "knowmem"),
            ("retain", "knowmem"),
            ("forget", "privleak"),
        ):
            assert values[guard, domain, metric] is not None


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", UNLEARNED_MUSE)
def test_unlearning_muse(name):
    rows = run("fit", name, "--trainer.max_epochs", "1")
    assert {row["epoch"] for row in rows} == {0, 1}
    assert {row["metric"] for row in rows} >= {"verbmem", "knowmem", "privleak"}
    assert (folder(name) / "model/config.json").is_file()


@pytest.mark.usefixtures("question_filter")
@pytest.mark.parametrize("name", UNLEARNED)
def test_unlearning_on_questions(name):
    given = config(name)
    rows = run("fit", name, "--trainer.limit_train_batches", "2")
    probabilities = measured(rows, "none", given["data"]["init_args"]["forget"])
    assert set(probabilities) == {0.0, 1.0}
    assert probabilities[0.0] != probabilities[1.0]
    assert {row["split"] for row in rows} == {"test"}
    facts = json.loads((folder(name) / "run.json").read_text())
    assert facts["data"]["training"]["forget"] == {
        key: facts["data"]["corpora"]["forget"][0][key] for key in ("n", "sha256")
    }
    assert (folder(name) / "model/config.json").is_file()


@pytest.mark.usefixtures("question_filter")
@pytest.mark.parametrize("name", ATTACKED)
def test_relearning(name):
    if name == "relearn_rmu_wmdp_bio" and not (folder("rmu_wmdp_bio") / "model").is_dir():
        run("fit", "rmu_wmdp_bio", "--trainer.limit_train_batches", "2")
    guarded = "guard" in config(name)["model"]["init_args"]
    parts = [STAND_IN] if guarded else []
    rows = run("fit", name, "--trainer.max_epochs", "2", parts=parts)
    assert {row["attack"] for row in rows} == {"relearn_full_questions"}
    for guard in ("off", "on") if guarded else ("none",):
        forget = measured(rows, guard, ["wmdp-bio"])
        assert set(forget) == {0.0, 1.0, 2.0}
        assert len(set(forget.values())) == 3
    facts = json.loads((folder(name, *parts) / "run.json").read_text())
    # All questions, also the one that the filter left out.
    assert facts["data"]["training"]["questions"]["n"] == 12


def measured(rows: list[dict], guard: str, domains: list[str]) -> dict[float, float]:
    """Probability of the right answers after each epoch, in one state of the guard."""
    return {
        row["epoch"]: row["value"]
        for row in rows
        if row["metric"] == "correct_probability"
        and row["guard"] == guard
        and row["domain"] in domains
    }
