"""The shape of the code: who may import whom, what lies at the top, how long a file may be."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("dsg", "lightning_modules", "datamodules")
MAX_LINES = 400
# Word lists of the embedded benchmark: data, which splitting would not make clearer.
LONG_DATA = {"datamodules/tiny_world/words.py"}

TOP_LEVEL = {
    *PACKAGES,
    "configs",
    "tests",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "constraints.txt",
    ".gitignore",
    ".ci",
    ".github",
}

# Prefix of a file's path -> what it must not import. The longest matching prefix counts.
LIGHTNING = ("lightning", "pytorch_lightning")
FORBIDDEN = {
    "dsg/": (*LIGHTNING, "lightning_modules", "datamodules", "dsg.cli", "tests"),
    "dsg/cli/": ("tests",),
    "dsg/__main__.py": (*LIGHTNING, "lightning_modules", "datamodules", "tests"),
    "lightning_modules/": ("datamodules", "dsg.cli", "tests"),
    "datamodules/": ("lightning_modules", "dsg.cli", "tests"),
}


def source_files() -> list[str]:
    return sorted(
        path.relative_to(ROOT).as_posix()
        for name in PACKAGES
        for path in (ROOT / name).rglob("*.py")
    )


def imported_modules(source: str, path: str) -> Iterator[str]:
    """Every module that a file imports, inside functions too, under its full name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = path.split("/")[: -node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def violations(source: str, path: str) -> list[str]:
    prefix = max((prefix for prefix in FORBIDDEN if path.startswith(prefix)), key=len)
    return [
        module
        for module in imported_modules(source, path)
        if any(module == name or module.startswith(f"{name}.") for name in FORBIDDEN[prefix])
    ]


@pytest.mark.parametrize("path", source_files())
def test_import_directions(path):
    assert not violations((ROOT / path).read_text(), path)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("dsg/guard/guard.py", "import lightning.pytorch as pl"),
        ("dsg/guard/guard.py", "def f():\n    from datamodules.tiny_world.world import World"),
        ("dsg/guard/guard.py", "from dsg import cli"),
        ("dsg/guard/guard.py", "from .cli.main import main"),
        ("dsg/report/html.py", "from ..cli import main"),
        ("dsg/__main__.py", "import lightning"),
        ("lightning_modules/evaluation.py", "import datamodules"),
        ("datamodules/texts.py", "from lightning_modules import EvaluationModule"),
        ("datamodules/texts.py", "from tests import helpers"),
    ],
)
def test_the_law_is_enforced(path, source):
    assert violations(source, path)


def test_what_the_law_allows():
    assert not violations("import lightning\nimport datamodules", "dsg/cli/world.py")
    assert not violations("import lightning_utilities\nfrom . import sae", "dsg/guard/guard.py")
    assert not violations("from dsg.cli.main import main", "dsg/__main__.py")


def test_top_level_is_fixed():
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    found = {line.strip('"').split("/")[0] for line in listing.stdout.splitlines()}
    assert not found - TOP_LEVEL
    assert not TOP_LEVEL - found - {".github"}


@pytest.mark.parametrize("path", source_files())
def test_files_are_short(path):
    if path not in LONG_DATA:
        assert len((ROOT / path).read_text().splitlines()) <= MAX_LINES


def test_only_the_command_line_prints():
    for path in source_files():
        if path.startswith("dsg/cli/"):
            continue
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            is_print = isinstance(called, ast.Name) and called.id == "print"
            assert not is_print, f"{path}, line {getattr(node, 'lineno', 0)}: print"


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, dsg; assert not {'torch', 'transformers', 'sae_lens'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
