import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from rich.console import Console

from dsg.errors import UserError
from dsg.io.results import row, write_results
from dsg.report import build_report, results_table, save_overview_png
from dsg.report.files import Densities
from dsg.report.findings import findings
from dsg.report.measurements import Measurements, interval_note
from tests.report_data import HOSTILE, measured_rows, write_run, write_side_files

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


def accuracy(method, domain, share, n=400, **fields):
    half = 0.04
    return row(
        method=method,
        domain=domain,
        metric="accuracy",
        value=share,
        n=n,
        low=max(0.0, share - half),
        high=min(1.0, share + half),
        **{"guard": "on" if method == "dsg" else "none", "protocol": "cloze", **fields},
    )


def sentences(rows, side):
    return [found.text for found in findings(Measurements(rows)) if found.side == side]


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


def test_cells_over_seeds_by_hand():
    def over(*values):
        rows = [accuracy("dsg", "near", value, seed=seed) for seed, value in enumerate(values)]
        return Measurements(rows).cell(metric="accuracy")

    assert (over(0.5).low, over(0.5).high, over(0.5).num_seeds) == (0.46, 0.54, 1)
    two = over(0.5, 0.6)
    assert (two.value, two.low, two.high, two.num_seeds) == (0.55, 0.5, 0.6, 2)
    three = over(0.5, 0.6, 0.7)  # t(2) = 4.3027, standard error 0.1 / sqrt 3
    assert three.low == pytest.approx(0.6 - 4.3027 * 0.057735, abs=1e-4)
    assert over(0.9, 1.0, 1.0).high == 1.0
    assert "Student t" in interval_note(3)


def test_cells_prefer_test_facts_and_the_overall_protocol():
    rows = [
        accuracy("dsg", "near", 0.1, split="validation"),
        accuracy("dsg", "near", 0.2, split="test", protocol="cloze_question"),
        accuracy("dsg", "near", 0.3, split="test"),
    ]
    assert Measurements(rows).cell(domain="near").value == 0.3


def test_of_several_epochs_the_last_counts():
    rows = [accuracy("rmu", "near", 0.1 * epoch, epoch=epoch) for epoch in (0, 2, 1)]
    assert Measurements(rows).cell(domain="near").value == 0.2


def test_validation_facts_stay_out_of_the_table_unless_there_is_nothing_else(tmp_path):
    validation = [accuracy("dsg", "forget", 0.111, split="validation")]
    test = [accuracy("base", "forget", 0.99, split="test")]
    write_results(tmp_path, validation + test)
    assert "11.1%" not in build_report(tmp_path).read_text(encoding="utf-8")
    write_results(tmp_path, validation)
    text = build_report(tmp_path).read_text(encoding="utf-8")
    assert "11.1%" in text
    assert "Validation facts only" in text


def test_below_chance_is_flagged_from_all_seeds_together():
    rows = [accuracy("dsg", "forget", 0.18, n=60, seed=seed) for seed in range(4)]
    assert not Measurements(rows[:1]).cell().below_chance
    assert Measurements(rows).cell().below_chance


def test_runs_of_a_grid_get_a_table_each_and_parts_of_one_run_share_one():
    grid = [accuracy("dsg", "near", 0.1 * i, experiment=f"grid{i}") for i in range(3)]
    assert [title for title, _ in Measurements(grid).groups()] == ["grid0", "grid1", "grid2"]
    parts = [accuracy("dsg", "near", 0.1, experiment="a"), accuracy("rmu", "near", 0.1)]
    assert len(Measurements(parts).groups()) == 1


BASE = [accuracy("base", "forget", 0.99), accuracy("base", "retain", 0.99)]


def test_headline_says_where_rmu_wins_with_both_numbers():
    ours = [accuracy("dsg", "forget", 0.25), accuracy("dsg", "retain", 0.96)]
    theirs = [accuracy("rmu", "forget", 0.40), accuracy("rmu", "retain", 0.98)]
    rows = BASE + ours + theirs
    lost = "RMU keeps more retain accuracy than DSG: 98.0% against 96.0% (the intervals overlap)."
    assert lost in sentences(rows, "against")
    won = "DSG leaves less forget accuracy than RMU: 25.0% against 40.0%."
    assert won in sentences(rows, "for")


def test_headline_turns_when_the_numbers_turn():
    ours = [accuracy("dsg", "forget", 0.60), accuracy("dsg", "retain", 0.99)]
    theirs = [accuracy("rmu", "forget", 0.30), accuracy("rmu", "retain", 0.50)]
    against = " ".join(sentences(BASE + ours + theirs, "against"))
    assert "RMU leaves less forget accuracy than DSG: 30.0% against 60.0%" in against
    assert "still above chance" in against
    assert "DSG keeps more retain accuracy than RMU" in " ".join(
        sentences(BASE + ours + theirs, "for")
    )


def test_forgetting_below_chance_earns_nothing_and_is_flagged():
    ours = [accuracy("dsg", "forget", 0.24), accuracy("dsg", "retain", 0.9)]
    theirs = [accuracy("static_clamp", "forget", 0.10), accuracy("static_clamp", "retain", 0.9)]
    found = findings(Measurements(BASE + ours + theirs))
    assert not any("less forget accuracy" in finding.text for finding in found)
    assert any(
        finding.side == "caution" and "Static clamp 10.0%" in finding.text for finding in found
    )


def test_random_features_that_do_as_well_count_against_the_guard():
    ours = [accuracy("dsg", "forget", 0.25), accuracy("dsg", "retain", 0.9)]
    control = [accuracy("random", "forget", 0.27)]
    assert "no clear difference" in " ".join(sentences(BASE + ours + control, "against"))


IGNORANT = [accuracy("base", "forget", 0.26), accuracy("base", "retain", 0.99)]
OURS = [accuracy("dsg", "forget", 0.22), accuracy("dsg", "retain", 0.95)]


def test_a_model_that_never_knew_anything_is_no_success_of_the_guard():
    theirs = [accuracy("rmu", "forget", 0.4), accuracy("random", "forget", 0.5)]
    attacked = {"attack": "relearn_full", "epoch": 5}
    after = [accuracy("dsg", "forget_shown", 0.2, mode="test_time", **attacked)]
    found = findings(Measurements(IGNORANT + OURS + theirs + after))
    assert [each.text for each in found if each.side == "for"] == []
    assert found[0].side == "caution"
    assert "no guard the model is at chance on forget questions: 26.0%" in found[0].text
    assert "nothing that could be forgotten" in found[0].text
    # What the guard costs elsewhere is told all the same.
    assert any("costs retain accuracy" in each.text for each in found)


def test_a_model_without_utility_has_none_to_keep():
    base = [accuracy("base", "forget", 0.99), accuracy("base", "retain", 0.24)]
    theirs = [accuracy("rmu", "forget", 0.4), accuracy("rmu", "retain", 0.23)]
    found = findings(Measurements(base + OURS + theirs))
    assert not any("retain accuracy" in each.text for each in found)
    assert any("at chance on retain questions" in each.text for each in found)
    assert any("of the forget questions" in each.text for each in found)


def test_a_sequence_alone_is_read_beside_its_own_beginning():
    rows = [
        accuracy(method, domain, value, guard="none", request=request)
        for method, kept in (("dsg", 0.25), ("rmu", 0.24))
        for request, domain, value in ((0, "retain", 0.26), (3, "retain", kept))
    ]
    assert not any("keeps more" in each.text for each in findings(Measurements(rows)))


def test_alignment_with_a_model_at_chance_is_not_shown(tmp_path):
    scored = accuracy("dsg", "forget", 1.0) | {"metric": "alignment", "value": 0.987}
    for base, is_shown in ((BASE, True), (IGNORANT, False)):
        write_results(tmp_path, [*base, *OURS, scored])
        assert ("0.987" in build_report(tmp_path).read_text(encoding="utf-8")) == is_shown


@pytest.mark.parametrize(
    ("shown", "side", "verb"),
    [(0.99, "against", "does not stop"), (0.25, "for", "holds back"), (0.45, "for", "only partly")],
)
def test_train_time_verdict_follows_the_shown_facts(shown, side, verb):
    attacked = {"attack": "relearn_full", "epoch": 5}
    rows = [
        accuracy("base", "forget_shown", 0.99, **attacked),
        accuracy("dsg", "forget_shown", shown, mode="train_time", **attacked),
    ]
    said = [text for text in sentences(rows, side) if "on meanwhile" in text]
    assert len(said) == 1
    assert f"{verb}" in said[0]


def test_report_of_the_synthetic_run_reports_its_losses(text):
    losses = text[text.index("Speaks against it") : text.index("Read with care")]
    for part in ("RMU keeps more retain", "does not stop shown facts", "guard then removed"):
        assert part in losses


def test_terminal_table(run_dir):
    console = Console(width=100, record=True, file=None, quiet=True)
    with console.capture() as captured:
        console.quiet = False
        console.print(results_table(run_dir))
    lines = captured.get().splitlines()
    clamp = next(line for line in lines if "Static clamp" in line)
    assert "<1" in clamp
    assert len([line for line in lines if "DSG" in line]) == 2
    assert max(map(len, lines)) <= 100


def test_the_terminal_table_of_several_seeds_fits_80_columns(tmp_path):
    write_run(tmp_path, seeds=(0, 1, 2))
    console = Console(width=80)
    with console.capture() as captured:
        console.print(results_table(tmp_path))
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.strip().startswith("RMU ") for line in lines)  # words are whole
    assert any(line.strip().startswith("Random ") for line in lines)
    clamp = next(line for line in lines if "Static clamp" in line)
    assert "3/3" in clamp


@pytest.mark.parametrize("attacks", [True, False])
def test_overview_png(tmp_path, attacks):
    rows = [fields for fields in measured_rows() if attacks or fields["attack"] is None]
    write_results(tmp_path, rows)
    path = save_overview_png(tmp_path, tmp_path / "overview.png")
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(content[16:20], "big") == 1600


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("values", [[0.0], [0.3, 0.3, 0.7], [1.0, 0.0]])
def test_histograms_count_as_the_gate_does(threshold, values):
    from dsg.report.charts import density_histograms

    figure = density_histograms(Densities(threshold, {"forget": values}))
    share = sum(value > threshold for value in values) / len(values)
    (axes,) = figure.axes
    assert f"{share:.0%} of {len(values)} trigger" in axes.get_title(loc="left")
    left = sum(bar.get_height() for bar in axes.patches if bar.get_x() < threshold - 1e-9)
    if threshold > 0:
        assert left == pytest.approx(100 * (1 - share))
    assert sum(bar.get_height() for bar in axes.patches) == pytest.approx(100)


def test_questions_that_data_sets_share_count_once_and_each_below_chance_is_seen():
    """Three requests ask the same 144 retain facts; what each is to forget is its own."""
    shared = {"metric": "accuracy", "protocol": "cloze", "split": "test", "method": "dsg"}
    sizes = {"forget": 36, "near": 36, "retain": 144}
    rows = [
        row(**shared, dataset=f"world/{name}", seed=seed, domain=domain, n=n, value=value)
        for name, value in (("a", 0.05), ("b", 0.3), ("c", 0.3))
        for seed in range(5)
        for domain, n in sizes.items()
    ]
    group = Measurements(rows).comparisons()[-1][1]
    cells = {domain: group.cell(domain=domain) for domain in sizes}
    assert {domain: cell.n for domain, cell in cells.items()} == {
        "forget": 108,
        "near": 36,
        "retain": 144,
    }
    forget = cells["forget"]
    assert (forget.num_below_chance, forget.num_runs) == (5, 15)
    [each] = [f for f in findings(Measurements(rows)) if "below chance" in f.text]
    assert each.side == "caution"
    assert "DSG 21.7% (in 5 of 15 runs)" in each.text


def test_the_table_says_in_how_many_cells_accuracy_is_below_chance(tmp_path):
    values = enumerate((0.05, 0.3, 0.3))
    rows = [accuracy("dsg", "forget", value, n=36, seed=seed) for seed, value in values]
    write_results(tmp_path, rows)
    assert "below chance in 1 of 3" in build_report(tmp_path).read_text(encoding="utf-8")
    console = Console(width=100)
    with console.capture() as captured:
        console.print(results_table(tmp_path))
    assert "1/3" in captured.get()


def test_several_datasets_get_a_mean_row_of_their_own():
    shared = {"model": "m", "domain": "forget", "metric": "accuracy", "protocol": "cloze"}
    values = {("a", 0): 0.2, ("b", 0): 0.4, ("a", 1): 0.1, ("b", 1): 0.1}
    rows = [
        row(**shared, method=method, dataset=dataset, seed=seed, split="test", value=value, n=10)
        for (dataset, seed), value in values.items()
        for method in ("base", "dsg")
    ]
    comparisons = Measurements(rows).comparisons()
    assert [title for title, _ in comparisons] == ["m, a", "m, b", "mean of 2 data sets"]
    cell = comparisons[-1][1].cell(method="dsg", metric="accuracy", domain="forget")
    assert cell is not None
    assert (cell.num_seeds, cell.n) == (2, 20)
    assert (cell.num_below_chance, cell.num_runs) == (0, 4)
    assert cell.value == pytest.approx(0.2)  # seed 0: 0.3, seed 1: 0.1
    assert (cell.low, cell.high) == pytest.approx((0.1, 0.3))
