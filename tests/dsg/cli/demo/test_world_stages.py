"""Stages of the demonstration run what was chosen, as it was chosen."""

from types import SimpleNamespace

import pytest

from datamodules import TinyWorldData, TinyWorldRequests
from datamodules.tiny_world.texts import TinyWorldTexts
from dsg.cli.demo import world_stages
from dsg.cli.demo.world_demo import METHODS
from dsg.cli.demo.world_stages import Cell, sequence
from dsg.report.measurements import method_name
from dsg.selection.splits import guard_texts

RMU = {"steering": 60.0, "lr": 3e-3, "epochs": 2}


class Recorder:
    """Stands for the trainers of a context: notes how each was made and what it was given."""

    def __init__(self, tmp_path):
        self.cell = Cell(tmp_path, 0, "pathogen")
        self.runs = []

    def trainer(self, folder, name, **options):
        del folder, name

        def fit(module, datamodule):
            self.runs.append(SimpleNamespace(options=options, module=module, data=datamodule))

        return SimpleNamespace(fit=fit)


@pytest.fixture
def context(tmp_path):
    return Recorder(tmp_path)


def test_rmu_in_a_sequence_trains_as_it_was_tuned(context, tmp_path):
    settings = {key: RMU[key] for key in ("steering", "lr")}
    world_stages._unlearn(context, tmp_path, "rmu", RMU["epochs"], settings)
    sequence(context, "rmu", RMU, tmp_path)
    tuned, sequential = context.runs
    assert tuned.options["gradient_clip_val"] is not None
    assert sequential.options["gradient_clip_val"] == tuned.options["gradient_clip_val"]
    assert sequential.data.num_train_texts == tuned.data.num_train_texts
    assert sequential.data.passes == tuned.options["max_epochs"]
    assert sequential.module.lr == tuned.module.lr
    assert vars(sequential.module.objective).keys() == vars(tuned.module.objective).keys()
    assert sequential.module.objective.steering == tuned.module.objective.steering


def test_guards_are_chosen_from_the_texts_that_a_request_has(context, tmp_path, monkeypatch):
    read = []

    def statistics(texts):
        read.append(texts)
        raise StopIteration

    monkeypatch.setattr(TinyWorldData, "setup", lambda *_: None)
    for name in ("load_model", "load_sae", "question_loader"):
        monkeypatch.setattr(world_stages, name, lambda *_: [])
    maker = SimpleNamespace(statistics=statistics)
    monkeypatch.setattr(world_stages, "maker_from", lambda *_: maker)
    with pytest.raises(StopIteration):
        world_stages.tune_guards(context, tmp_path)
    requests = TinyWorldRequests(str(tmp_path), seed=0)
    assert read == [guard_texts(requests, near=False)["forget_selection"]]


def test_the_demo_shows_a_threshold_from_documents_beside_that_from_question_shaped_texts():
    texts = TinyWorldTexts(0, "pathogen")
    documents, short = texts.calibration_documents(), texts.calibration_texts()
    assert len(documents) == len(short)
    # A document states four facts, a question-shaped text breaks off in the first one.
    assert all(text.count(" .") >= 4 for text in documents)
    assert all(text.count(" .") < 3 for text in short)
    assert "dsg_documents" in METHODS
    assert method_name("dsg_documents") == "DSG, threshold from documents"
