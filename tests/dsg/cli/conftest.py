from pathlib import Path

import pytest
import yaml

HERE = "tests.dsg.cli.tiny_runs"


@pytest.fixture
def write_config(tmp_path, monkeypatch):
    """Write `tiny.yaml` into the working directory; keywords replace parts of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")

    def write(model="TinyModule", name="tiny.yaml", trainer=None, **init_args):
        config = {
            "model": {"class_path": f"{HERE}.{model}", "init_args": init_args},
            "data": {"class_path": f"{HERE}.TinyData"},
            "trainer": {
                "accelerator": "cpu",
                "max_epochs": 1,
                "enable_progress_bar": False,
                "logger": False,
                **(trainer or {}),
            },
        }
        Path(name).write_text(yaml.safe_dump(config))
        return name

    return write
