"""What the READMEs name exists, their trees match, and the example of the front page runs."""

import inspect
import re
from pathlib import Path

import pytest
import torch

import dsg
from tests.helpers import random_ids, standard_sae, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
FRONT = ROOT / "README.md"
PAGES = sorted(
    [FRONT, *(ROOT / ".github").glob("*.md")]
    + [
        path
        for name in ("configs", "dsg", "datamodules", "lightning_modules")
        for path in (ROOT / name).rglob("README.md")
    ]
)
each_page = pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix()
)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_package_has_a_page():
    named = {page.parent.relative_to(ROOT).as_posix() for page in PAGES}
    wanted = {
        ".",
        "configs",
        "configs/grids",
        "configs/reproduce",
        "datamodules",
        "lightning_modules",
    }
    assert wanted | {"dsg", "dsg/guard", "dsg/attacks", "dsg/evaluation"} <= named


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@each_page
def test_every_file_that_is_named_exists(page):
    text = page.read_text(encoding="utf-8")
    for path in set(re.findall(r"configs/[\w/]+\.yaml", text)):
        assert (ROOT / path).is_file(), path
    for name in set(re.findall(r"`([\w/]+\.py)`", text)) - {"mine.py"}:
        assert (page.parent / name).is_file() or (ROOT / name).is_file(), name


def test_the_front_page_is_short_and_shows_code_early():
    lines = FRONT.read_text(encoding="utf-8").splitlines()
    assert len(lines) < 200
    assert lines.index("```python") < 60


def test_the_rooms_of_the_front_page_are_the_folders():
    tree = FRONT.read_text(encoding="utf-8").split("## The rooms")[1].split("```")[1]
    rooms = set(re.findall(r"^  (\w+)/ ", tree, flags=re.M))
    folders = {path.parent.name for path in (ROOT / "dsg").glob("*/__init__.py")}
    assert rooms == folders
    for folder in re.findall(r"^(\w+)/ ", tree, flags=re.M):
        assert (ROOT / folder).is_dir()


def test_the_table_of_files_is_complete():
    page = (ROOT / "dsg" / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([\w/]+\.py)` \|", page, flags=re.M)
    files = {path.relative_to(ROOT / "dsg").as_posix() for path in (ROOT / "dsg").rglob("*.py")}
    assert len(listed) == len(set(listed))
    assert set(listed) == {name for name in files if not name.endswith("__.py")}


def test_the_example_runs(tmp_path, monkeypatch):
    example = FRONT.read_text(encoding="utf-8").split("```python")[1].split("```")[0]
    used = set(re.findall(r"(\w+)=", example.split("build_guard(")[1].split(")")[0]))
    assert used <= set(inspect.signature(dsg.build_guard).parameters)
    ids = random_ids(2, 6)
    texts = [
        f"w{i % 26} w{i // 26} " + " ".join(f"w{(i * j) % 26}" for j in range(6)) for i in range(60)
    ]
    parts = {
        "model": tiny_model(num_layers=5),
        "tokenizer": tiny_tokenizer(),
        "forget_texts": texts[:20],
        "retain_texts": texts[20:],
        "batch": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
    }
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dsg, "load_sae", lambda *_: standard_sae(), raising=False)
    exec(example, parts)
    assert (tmp_path / "guards" / "bio").is_dir()
    assert len(parts["guard"].feature_ids) <= 20
