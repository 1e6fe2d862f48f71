"""Every YAML under `configs/` is parsed and instantiated through the command line's own parser."""

import itertools
import os
import re
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from dsg.cli.configs import merged, read_config, value_at
from dsg.cli.lightning_cli import RunCLI, run_name
from tests.reproductions import RUNS

CONFIGS = Path(__file__).parents[1] / "configs"
ALL = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
PARTS = [name for name in ALL if name.startswith("parts/")]
# A grid is no configuration of its own; its tests check the ones that it is made of. Rows of the
# papers take several files.
SINGLE = [name for name in ALL if not name.startswith(("parts/", "grids/", "reproduce/"))]
RUNNABLE = [
    *SINGLE,
    *(" ".join(path.relative_to(CONFIGS).as_posix() for path in paths) for paths in RUNS.values()),
]
DSG = " ".join(path.relative_to(CONFIGS).as_posix() for path in RUNS["dsg_wmdp_bio"])

NUM_RUNNABLE = 68
# Part -> a runnable configuration that it is meant for.
PARTS_IN_USE = {
    "parts/evade.yaml": "attack/relearn_full.yaml",
    "parts/maintenance.yaml": "attack/relearn_full.yaml",
    "parts/question_text.yaml": "attack/relearn_lora.yaml",
    "parts/related_text.yaml": "attack/relearn_lora.yaml",
    "parts/stand_in.yaml": DSG,
    "parts/step_checkpoints.yaml": "attack/relearn_lora.yaml",
    "parts/train_time.yaml": "attack/relearn_lora.yaml",
    "parts/unlearn_lora.yaml": "unlearn/npo.yaml",
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Instantiating must neither read nor write anything in the working directory."""
    monkeypatch.chdir(tmp_path)
    yield
    assert os.listdir(tmp_path) == []


def instantiate(*names: str) -> RunCLI:
    arguments = [word for name in names for word in ("-c", str(CONFIGS / name))]
    with ExitStack() as stack:
        return RunCLI(
            stack,
            [*arguments, "--trainer.accelerator", "cpu"],
            run=False,
            parser_kwargs={"exit_on_error": False},
        )


def test_all_configurations_are_found():
    assert len(RUNNABLE) == NUM_RUNNABLE
    assert set(PARTS_IN_USE) == set(PARTS)


@pytest.mark.parametrize("name", RUNNABLE)
def test_runnable_configuration_is_instantiated(name):
    given = merged(read_config(CONFIGS / part) for part in name.split())
    cli = instantiate(*name.split())
    assert type(cli.model).__module__.startswith("lightning_modules.")
    assert type(cli.datamodule).__module__.startswith("datamodules.")
    assert given["model"]["class_path"].endswith(type(cli.model).__name__)
    assert given["data"]["class_path"].endswith(type(cli.datamodule).__name__)
    assert not any(parameter.requires_grad for parameter in cli.model.parameters())


@pytest.mark.parametrize("name", RUNNABLE)
def test_configuration_begins_with_the_command_that_runs_it(name):
    first, *others = name.split()
    words = first_comment(first)[0].split()
    assert words[0] == "dsg"
    assert words[1] in ("fit", "validate", "test", "predict")
    assert words[2:4] == ["-c", f"configs/{first}"]
    if others:  # the first of several data sets, perhaps
        assert words[4] == "-c"
        assert (CONFIGS.parent / words[5]).is_file()


def first_comment(name: str) -> list[str]:
    """The lines of the comment with which a file begins."""
    lines = (CONFIGS / name).read_text().splitlines()
    return [
        line.removeprefix("# ") for line in itertools.takewhile(lambda s: s.startswith("#"), lines)
    ]


@pytest.mark.parametrize("name", ALL)
def test_the_first_comment_says_what_the_file_shows_and_how_long_it_takes(name):
    lines = [line for line in first_comment(name) if not line.startswith("dsg ")]
    assert len(lines) >= 2
    assert re.search(r"\b(seconds?|minutes?|hours?|time|takes)\b", lines[-1]), lines[-1]


@pytest.mark.parametrize(("part", "runnable"), PARTS_IN_USE.items())
def test_part_changes_the_configuration_it_is_meant_for(part, runnable):
    plain, changed = instantiate(*runnable.split()), instantiate(*runnable.split(), part)
    assert changed.config.as_dict() != plain.config.as_dict()
    assert type(changed.model) is type(plain.model)


def test_runs_have_names_of_their_own():
    names = [run_name(*(CONFIGS / part for part in name.split())) for name in RUNNABLE]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("configs/evaluate/dsg.yaml", "evaluate_dsg"),
        ("/home/me/configs/dsg/configs/attack/relearn.v2.yaml", "attack_relearn.v2"),
        ("mine.yaml", "mine"),
        ("folder/mine.yaml", "mine"),
        ("fit", "fit"),
        ("configs/attack/relearn.yaml configs/parts/train_time.yaml", "attack_relearn_train_time"),
    ],
)
def test_run_name(path, expected):
    assert run_name(*map(Path, path.split())) == expected


def test_a_sequence_fulfils_its_requests_as_a_single_request_is_fulfilled():
    """The same guard; the same objective on as many texts and passes, clipped alike."""

    def values(name, *keys):
        found = yaml.safe_load((CONFIGS / name).read_text())
        return [value_at(found, key) for key in keys]

    guard = "model.init_args.guard"
    assert values("sequential/dsg.yaml", guard) == values("evaluate/dsg.yaml", guard)
    shared = (
        "model.init_args.objective",
        "model.init_args.lr",
        "trainer.gradient_clip_val",
        "data.init_args.num_train_texts",
    )
    assert values("sequential/rmu.yaml", *shared) == values("unlearn/rmu.yaml", *shared)
    passes, epochs = "data.init_args.passes", "trainer.max_epochs"
    assert values("sequential/rmu.yaml", passes) == values("unlearn/rmu.yaml", epochs)
