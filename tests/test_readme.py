"""What the README names exists, and its Python example uses the real interface."""

import inspect
import re
from pathlib import Path

import dsg

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_configuration_that_is_named_exists():
    named = set(re.findall(r"configs/[\w/]+\.yaml", README))
    assert len(named) >= 8
    assert all((ROOT / path).is_file() for path in named)


def test_every_file_of_the_tree_exists():
    tree = README.split("## The tree")[1].split("```")[1]
    folder, seen = "", 0
    for line in tree.splitlines():
        if not line.strip():
            continue
        names = re.split(r"\s{2,}", line.strip())[0].split(", ")
        if not line.startswith(" "):
            folder = names[0]
            names = [""]
        for name in names:
            found = list((ROOT / folder).glob(name)) if name else [ROOT / folder]
            assert found, f"{folder}{name}"
            assert all(path.exists() for path in found)
            seen += 1
    assert seen > 20


def test_pictures_exist():
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert pictures
    assert all((ROOT / path).is_file() for path in pictures)


def test_the_example_passes_arguments_that_exist():
    example = README.split("## From Python")[1].split("```python")[1].split("```")[0]
    used = set(re.findall(r"(\w+)=", example.split("build_guard(")[1].split(")")[0]))
    assert used <= set(inspect.signature(dsg.build_guard).parameters)
    for name in re.findall(r"dsg\.(\w+)", example):
        assert hasattr(dsg, name)
    for name in re.findall(r"guard\.(\w+)", example):
        if name not in ("feature_ids", "threshold", "clamp_value"):
            assert callable(getattr(dsg.Guard, name))
        else:
            assert isinstance(getattr(dsg.Guard, name), property)
