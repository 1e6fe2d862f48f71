"""Files of all kinds for the table of bad inputs: good ones, and every way to spoil one."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import torch
import yaml

from dsg.guard.edit import Clamp
from dsg.guard.gate import DensityGate, OpenGate
from dsg.guard.guard import Guard
from dsg.sae.loading import slice_features
from tests.choice_data import choice_rows, save_choice_model, write_rows
from tests.helpers import D_MODEL, HOOK_POINT, WORDS, standard_sae
from tests.report_data import write_run

MODEL = "w/model"
GUARD: dict[str, Any] = {
    "hook_point": HOOK_POINT,
    "sae": "w/sae",
    "num_features": 3,
    "ratio_percentile": 50.0,
    "batch_size": 8,
}
# A name too long for every file system.
LONG = "x" * 300


def write_world(folder: Path) -> Path:
    """Fill a folder; rows name what is in it as `w/...`."""
    folder.mkdir()
    save_choice_model(folder / "model")
    sae = standard_sae()
    sae.cfg.metadata.hook_name = HOOK_POINT
    sae.save_model(folder / "sae")
    save_choice_model(folder / "other_model", seed=1)
    standard_sae(d_in=D_MODEL * 2).save_model(folder / "wide_sae")
    _guard(sae, gate=OpenGate()).save(folder / "token_guard")
    _guard(sae).save(folder / "guard")
    write_rows(folder / "forget.jsonl", choice_rows(12, seed=1))
    write_rows(folder / "retain.jsonl", choice_rows(12, seed=2))
    _write_texts(folder)
    _write_spoilt(folder)
    _write_configs(folder)
    write_run(folder / "run")
    return folder


def _guard(sae: Any, **changes: Any) -> Guard:
    settings: dict[str, Any] = {
        "hook_point": HOOK_POINT,
        "uncounted_ids": [0, 1, 2],
        "pad_id": 0,
        "gate": DensityGate(0.5),
        "edit": Clamp(-5.0),
        "facts": {"settings": {**GUARD, "method": "dsg"}},
        **changes,
    }
    return Guard(slice_features(sae, [1, 2, 3]), **settings)


def _write_texts(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)

    def passages(num: int, words: list[str]) -> list[str]:
        drawn = torch.randint(len(words), (num, 70), generator=generator).tolist()
        return [" ".join(words[index] for index in row) for row in drawn]

    forget, retain = passages(50, WORDS[:12]), passages(100, WORDS[12:])
    (folder / "forget.txt").write_text("\n\n".join(forget))
    (folder / "retain.txt").write_text("\n\n".join(retain))
    (folder / "short.txt").write_text("w1 w2 w3")
    for name, texts in (("forget_corpus", forget), ("retain_corpus", retain)):
        lines = (json.dumps({"text": text}) for text in texts)
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    for name, text in (("one_text", forget[0]), ("two_texts", f"{retain[0]}\n{retain[1]}")):
        lines = (json.dumps({"text": line}) for line in text.split("\n"))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))


def _write_spoilt(folder: Path) -> None:
    for ending in ("txt", "jsonl", "json", "csv", "parquet", "yaml"):
        (folder / f"empty.{ending}").write_bytes(b"")
        (folder / f"binary.{ending}").write_bytes(bytes(range(256)) * 4)
        (folder / f"latin.{ending}").write_bytes("text: Grüße\n".encode("latin-1"))
        os.mkfifo(folder / f"fifo.{ending}")
        (folder / f"folder.{ending}").mkdir()
    (folder / "empty").mkdir()
    (folder / "numbers.jsonl").write_text("1\n2\n")
    (folder / "torn.jsonl").write_text('{"text": "w1"}\n{"text": "w')
    (folder / "no_text.jsonl").write_text('{"words": "w1"}\n')
    (folder / "object.json").write_text('{"text": "w1"}')
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "deep.jsonl").write_text("[" * 100_000)
    (folder / "huge_number.jsonl").write_text('{"text": ' + "9" * 5000 + "}")
    (folder / "header.csv").write_text("question,choices\n")
    (folder / "wide_cell.csv").write_text(f"question\n{'x' * (csv.field_size_limit() + 1)}\n")
    (folder / "zero.csv").write_bytes(b"question\nw1\0\n")
    (folder / "list.yaml").write_text("- 1\n")
    (folder / "broken.yaml").write_text("trainer: [1\n")
    (folder / "tab.yaml").write_text("trainer:\n\tmax_epochs: 1\n")
    (folder / "zero.yaml").write_bytes(b"trainer: \0\n")
    (folder / "deep.yaml").write_text("[" * 5000)
    (folder / "twice.yaml").write_text("seed_everything: 1\nseed_everything: 2\n")
    for name, row in {
        "three_choices": {"choices": ["w1", "w2", "w3"]},
        "no_answer": {"answer": None},
        "answer_7": {"answer": 7},
        "blank_question": {"question": " "},
    }.items():
        good = {"question": "w1 w2", "choices": ["w1", "w2", "w3", "w4"], "answer": 0}
        (folder / f"{name}.jsonl").write_text(json.dumps({**good, **row}))
    for name, content in {
        "bad_results": "not json\n",
        "foreign_results": '{"a": 1}\n',
        "latin_results": b'{"a": "\xfc"}\n',
        "empty_results": "",
        "deep_results": "[" * 100_000,
    }.items():
        (folder / name).mkdir()
        path = folder / name / "results.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for name, file, content in (
        ("bad_facts", "run.json", b"{"),
        ("latin_facts", "run.json", b'{"a": "\xfc"}'),
        ("list_facts", "run.json", b"[]"),
        ("bad_densities", "report.json", b"{"),
        ("foreign_densities", "report.json", b'{"densities": {"dsg": 3}}'),
        ("latin_features", "report.json", b'["\xfc"]'),
        ("foreign_features", "report.json", b'{"features": [{"a": 1}]}'),
        ("list_settings", "report.json", b'{"settings": [1]}'),
        ("page_is_folder", "report.html", None),
        ("bad_items", "items.parquet", b"PAR1"),
    ):
        write_run(folder / name)
        path = folder / name / file
        if content is None:
            path.mkdir()
        else:
            path.write_bytes(content)


def _write_configs(folder: Path) -> None:
    evaluation = {
        "trainer": {
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "max_epochs": 1,
        },
        "model": {
            "class_path": "lightning_modules.EvaluationModule",
            "init_args": {"model_name": MODEL},
        },
        "data": {
            "class_path": "datamodules.multiple_choice.data.MultipleChoiceData",
            "init_args": {
                "model_name": MODEL,
                "forget": ["w/forget.jsonl"],
                "retain": ["w/retain.jsonl"],
                "corpora": {
                    "forget": [{"source": "w/forget_corpus.jsonl"}],
                    "retain": [{"source": "w/retain_corpus.jsonl"}],
                },
            },
        },
    }
    _write_yaml(folder / "base.yaml", evaluation)
    evaluation["model"]["init_args"]["guard"] = GUARD
    _write_yaml(folder / "guard.yaml", evaluation)
    select = {
        **evaluation,
        "model": {
            "class_path": "lightning_modules.SelectionModule",
            "init_args": {"model_name": MODEL, "guard": GUARD},
        },
    }
    select["data"] = {
        "class_path": "datamodules.multiple_choice.data.MultipleChoiceData",
        "init_args": evaluation["data"]["init_args"],
    }
    _write_yaml(folder / "select.yaml", select)
    _write_yaml(
        folder / "unlearn.yaml",
        {
            **evaluation,
            "model": {
                "class_path": "lightning_modules.UnlearningModule",
                "init_args": {
                    "model_name": MODEL,
                    "objective": {"class_path": "dsg.objectives.NPO"},
                    "reference": "frozen_copy",
                },
            },
            "data": {
                "class_path": "datamodules.multiple_choice.data.MultipleChoiceData",
                "init_args": evaluation["data"]["init_args"],
            },
        },
    )
    texts = {
        "class_path": "datamodules.TextFilesData",
        "init_args": {
            "model_name": MODEL,
            "forget_files": ["w/forget.txt"],
            "retain_files": ["w/retain.txt"],
        },
    }
    _write_yaml(folder / "texts.yaml", {**evaluation, "data": texts})
    sweep = {"command": "test", "config": "base.yaml", "seeds": [0]}
    _write_yaml(folder / "grid.yaml", sweep)
    for name, change in {
        "grid_command": {"command": "evaluate"},
        "grid_config": {"config": "missing.yaml"},
        "grid_latin_config": {"config": "latin.yaml"},
        "grid_fifo_config": {"config": "fifo.yaml"},
        "grid_seeds": {"seeds": [0, 0]},
        "grid_negative_seed": {"seeds": [-1]},
        "grid_huge_seed": {"seeds": [2**32]},
        "grid_text_seed": {"seeds": ["a"]},
        "grid_no_seeds": {"seeds": []},
        "grid_unknown": {"seedz": [1]},
        "grid_value": {"grid": {"model.init_args.seed": 3}},
        "grid_key": {"grid": {"model.init_args.sead": [3]}},
        "grid_list": {"grid": [1]},
        "grid_nowhere": {"grid": {"model.class_path.x": [3]}},
    }.items():
        _write_yaml(folder / f"{name}.yaml", {**sweep, **change})
    method = {"config": "guard.yaml", "grid": {"model.init_args.guard.clamp_value": [-1.0, -2.0]}}
    benchmark = {
        "seeds": [0],
        "tries": 2,
        "methods": {"base": {"config": "base.yaml"}, "dsg": method},
    }
    for name, change in {
        "bench_base": {},
        "bench_tries": {"tries": 3},
        "bench_entry": {"methods": {"dsg": {**method, "gird": {}}}},
        "bench_attacked": {"attacks": {}, "attacked": ["rmu"]},
        "bench_epochs": {"epochs": 0},
        "bench_domain": {"forget_domains": ["pathogens"]},
        "bench_methods": {"methods": 3},
        "bench_no_methods": {"methods": {}},
        "bench_negative_seed": {"seeds": [-1]},
        "bench_lr": {
            "attacks": {"a": {"config": "base.yaml", "lr": [0.0]}},
            "attacked": ["dsg_test_time"],
        },
        "bench_nan_lr": {
            "attacks": {"a": {"config": "base.yaml", "lr": [float("nan")]}},
            "attacked": ["dsg_test_time"],
        },
    }.items():
        _write_yaml(folder / f"{name}.yaml", {**benchmark, **change})


def _write_yaml(path: Path, content: Any) -> None:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
