"""The page: every section, self-contained, whatever the run holds."""

import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dsg.errors import UserError
from dsg.io.results import row, write_results
from dsg.report import build_report, save_overview_png
from dsg.report.build import TEMPLATE_FILE
from tests.report_data import HOSTILE, accuracy, measured_rows, write_run, write_side_files

SECTIONS = [
    "headline",
    "methods",
    "density",
    "trade-off",
    "relearning",
    "sequential",
    "features",
    "settings",
    "limits",
    "provenance",
]


VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks nesting and collects what the tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.ids, self.references, self.text = [], [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href", "srcset", "data"):
                self.references.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def sections(self):
        return [attrs["id"] for tag, attrs in self.tags if tag == "section"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    return folder


@pytest.fixture(scope="module")
def text(run_dir):
    return build_report(run_dir).read_text(encoding="utf-8")


def test_page_parses_and_has_every_section_in_order(text):
    page = Page(text)
    assert page.sections() == SECTIONS
    assert "Not measured" not in page.text
    assert len(page.ids) == len(set(page.ids))


def test_page_is_self_contained_and_accessible(text):
    page = Page(text)
    names = [tag for tag, _ in page.tags]
    assert not {"script", "link", "img", "iframe", "object"} & set(names)
    assert all(reference.startswith("#") for reference in page.references)
    assert "http" not in text
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(page.ids)
    assert ("html", {"lang": "en"}) in page.tags
    assert any(attrs.get("name") == "viewport" for _, attrs in page.tags)
    assert all(attrs["aria-label"] for tag, attrs in page.tags if tag == "svg")
    assert names.count("table") == names.count("caption") >= 4
    assert names.count("svg") == 6


def test_same_run_gives_the_same_page(run_dir, text):
    assert build_report(run_dir).read_text(encoding="utf-8") == text


def test_a_page_is_made_without_pytorch(run_dir):
    code = (
        "import sys; from dsg.report import build_report; build_report(sys.argv[1]);"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code, run_dir], check=False).returncode == 0


def test_the_template_is_part_of_an_installed_package():
    settings = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["*"]
    assert any(fnmatch(TEMPLATE_FILE, pattern) for pattern in patterns)


def test_hostile_text_stays_text(tmp_path):
    rows = measured_rows()
    rows += [{**fields, "method": HOSTILE} for fields in rows if fields["method"] == "rmu"]
    rows += [{**fields, "domain": "a $x_1$ <b>"} for fields in rows if fields["domain"] == "near"]
    write_results(tmp_path, rows)
    write_side_files(tmp_path, hostile=HOSTILE)
    text = build_report(tmp_path).read_text(encoding="utf-8")
    page = Page(text)
    assert "<script" not in text
    assert "<b>" not in text
    assert HOSTILE in page.text


def test_missing_parts_are_named_in_one_line_each(tmp_path):
    write_results(tmp_path, [])
    page = Page(build_report(tmp_path).read_text(encoding="utf-8"))
    assert page.sections() == SECTIONS
    assert page.text.count("Not measured in this run.") == len(SECTIONS) - 1  # limits always hold


def test_a_run_of_one_number_still_has_a_page(tmp_path):
    write_results(tmp_path, [row(method="dsg", metric="rouge_l", domain="verbmem", value=0.3)])
    page = Page(build_report(tmp_path).read_text(encoding="utf-8"))
    assert page.sections() == SECTIONS


def test_no_results_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"holds no results\.jsonl"):
        build_report(tmp_path)


@pytest.mark.parametrize(
    ("seeds", "note"), [((0, 1), "Mean of 2 seeds"), ((0, 1, 2), "Mean of 3 seeds")]
)
def test_several_seeds_are_one_row_and_the_caption_says_so(tmp_path, seeds, note):
    write_run(tmp_path, seeds)
    page = Page(build_report(tmp_path).read_text(encoding="utf-8"))
    assert note in page.text
    assert "One seed" not in page.text


def test_validation_facts_stay_out_of_the_table_unless_there_is_nothing_else(tmp_path):
    validation = [accuracy("dsg", "forget", 0.111, split="validation")]
    test = [accuracy("base", "forget", 0.99, split="test")]
    write_results(tmp_path, validation + test)
    assert "11.1%" not in build_report(tmp_path).read_text(encoding="utf-8")
    write_results(tmp_path, validation)
    text = build_report(tmp_path).read_text(encoding="utf-8")
    assert "11.1%" in text
    assert "Validation facts only" in text


def test_alignment_with_a_model_at_chance_is_not_shown(tmp_path):
    scored = accuracy("dsg", "forget", 1.0) | {"metric": "alignment", "value": 0.987}
    ours = [accuracy("dsg", "forget", 0.22), accuracy("dsg", "retain", 0.95)]
    for base, is_shown in ((0.99, True), (0.26, False)):
        unguarded = [accuracy("base", "forget", base), accuracy("base", "retain", 0.99)]
        write_results(tmp_path, [*unguarded, *ours, scored])
        assert ("0.987" in build_report(tmp_path).read_text(encoding="utf-8")) == is_shown


def test_report_of_the_synthetic_run_reports_its_losses(text):
    losses = text[text.index("Speaks against it") : text.index("Read with care")]
    for part in ("RMU keeps more retain", "does not stop shown facts", "guard then removed"):
        assert part in losses


@pytest.mark.parametrize("attacks", [True, False])
def test_overview_png(tmp_path, attacks):
    rows = [fields for fields in measured_rows() if attacks or fields["attack"] is None]
    write_results(tmp_path, rows)
    path = save_overview_png(tmp_path, tmp_path / "overview.png")
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(content[16:20], "big") == 1600
