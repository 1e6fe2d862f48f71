"""The shape of the code: rooms, who may import whom, what lies at the top, how long a file is."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("dsg", "lightning_modules", "datamodules")
MAX_LINES = 400
# Word lists of the embedded benchmark: data, which splitting would not make clearer.
LONG_DATA = {"datamodules/tiny_world/words.py"}
MAX_ENTRIES = 12

TOP_LEVEL = {
    *PACKAGES,
    "configs",
    "tests",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "CITATION.cff",
    "constraints.txt",
    ".gitignore",
    ".pre-commit-config.yaml",
    ".ci",
    ".github",
}

# Rooms in the order of the data. A room imports only what stands on an earlier line; rooms of the
# same line do not import each other.
FLOORS = [
    {"errors"},
    {"intervals"},
    {"io"},
    {"lm"},
    {"sae"},
    {"selection"},
    {"guard"},
    {"objectives", "evaluation"},
    {"attacks"},
    {"report", "lightning_modules", "datamodules"},
    {"cli"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
LIGHTNING = {"lightning", "pytorch_lightning"}
MAY_KNOW_LIGHTNING = {"cli", "lightning_modules", "datamodules"}


def module_name(path: str) -> str:
    """`dsg/guard/__init__.pyi` -> `dsg.guard`."""
    return path.rsplit(".", 1)[0].replace("/", ".").removesuffix(".__init__")


def source_files() -> list[str]:
    """All source files and the stubs that list a package's names."""
    return sorted(
        path.relative_to(ROOT).as_posix()
        for name in PACKAGES
        for suffix in ("*.py", "*.pyi")
        for path in (ROOT / name).rglob(suffix)
    )


def imported_modules(source: str, path: str) -> Iterator[str]:
    """Every module that a file imports, in functions and for types too, under its full name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = path.split("/")[: -node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def room_of(module: str) -> str | None:
    """The room of one of the project's modules; None for others, and for the front door `dsg`."""
    package, _, rest = module.partition(".")
    if package != "dsg":
        return package if package in PACKAGES else None
    return rest.partition(".")[0] or None


def violations(source: str, path: str) -> list[str]:
    """What a file imports from a room that it must not know."""
    here = room_of(module_name(path))
    if here in (None, "__main__"):  # the front door and the command only pass on
        here = "cli"
    forbidden = {"tests"} if here in MAY_KNOW_LIGHTNING else {"tests", *LIGHTNING}

    def is_wrong(module: str) -> bool:
        room = room_of(module)
        above = room in FLOOR and room != here and FLOOR[room] >= FLOOR[here]
        return above or module.partition(".")[0] in forbidden

    return list(filter(is_wrong, imported_modules(source, path)))


@pytest.mark.parametrize("path", source_files())
def test_import_directions(path):
    assert not violations((ROOT / path).read_text(), path)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("dsg/guard/guard.py", "import lightning.pytorch as pl"),
        ("dsg/guard/guard.py", "def f():\n    from datamodules.tiny_world import World"),
        ("dsg/guard/guard.py", "from dsg import cli"),
        ("dsg/guard/guard.py", "from ..cli.main import main"),
        ("dsg/guard/guard.py", "if TYPE_CHECKING:\n    from dsg.evaluation import Item"),
        ("dsg/objectives/npo.py", "from dsg.evaluation import Item"),
        ("dsg/lm/tokens.py", "from dsg.sae import load_sae"),
        ("dsg/report/html.py", "from ..cli import main"),
        ("dsg/report/html.py", "import lightning"),
        ("lightning_modules/evaluation.py", "import datamodules"),
        ("lightning_modules/evaluation.py", "from dsg.report import build_report"),
        ("datamodules/texts.py", "from lightning_modules import EvaluationModule"),
        ("datamodules/texts.py", "from tests import helpers"),
    ],
)
def test_the_law_is_enforced(path, source):
    assert violations(source, path)


def test_what_the_law_allows():
    assert not violations("import lightning\nimport datamodules", "dsg/cli/world.py")
    assert not violations("import lightning_utilities\nfrom . import gate", "dsg/guard/guard.py")
    assert not violations("from dsg.cli.main import main", "dsg/__main__.py")
    assert not violations("from dsg.guard import Guard", "dsg/attacks/evade.py")


def test_every_room_has_its_floor():
    entries = {path.name.removesuffix(".py") for path in (ROOT / "dsg").iterdir()}
    rooms = {name for name in entries if not name.startswith(("__", "py.", "README"))}
    assert rooms | set(PACKAGES[1:]) == set(FLOOR)
    assert len(rooms) <= MAX_ENTRIES


def circles(arrows: Mapping[str, set[str]]) -> list[list[str]]:
    """Sets of modules that import each other, directly or through others."""
    reached: dict[str, set[str]] = {}
    for start in arrows:
        seen, waiting = set(), [start]
        while waiting:
            new = arrows.get(waiting.pop(), set()) - seen
            seen |= new
            waiting += new
        reached[start] = seen
    together = [
        sorted(other for other in reached[start] if start in reached[other])
        for start in arrows
        if start in reached[start]
    ]
    return sorted({tuple(circle): circle for circle in together}.values())


def test_a_circle_is_seen():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == [["b", "c"]]


def test_nothing_goes_round_in_circles():
    files = source_files()
    modules = {module_name(path) for path in files}
    arrows: dict[str, set[str]] = {}
    for path in files:
        # The front door names what lies behind it, and nobody behind it goes through it.
        if module_name(path) == "dsg":
            continue
        found = set(imported_modules((ROOT / path).read_text(), path)) & modules
        arrows.setdefault(module_name(path), set()).update(found - {module_name(path)})
    # `from package import module` reads the package only on the way to the module.
    for here, targets in arrows.items():
        arrows[here] = {target for target in targets if not here.startswith(f"{target}.")}
    assert not circles(arrows)


def test_rooms_say_what_they_are():
    for path in (ROOT / "dsg").rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


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
