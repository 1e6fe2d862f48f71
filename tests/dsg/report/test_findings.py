"""Sentences fall as the numbers do, for the guard and against it."""

import pytest

from dsg.io.results import row
from dsg.report.findings import findings
from dsg.report.measurements import Measurements
from tests.report_data import accuracy


def sentences(rows, side):
    return [found.text for found in findings(Measurements(rows)) if found.side == side]


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
