import pytest

from dsg.errors import UserError
from dsg.evaluation.compare import choose, compare_runs
from dsg.evaluation.items_file import write_items
from dsg.evaluation.paired import mcnemar, sign_flip


def write(folder, rows):
    write_items(folder, rows)
    return folder


def question(key, correct, guard="on", domain="forget", **values):
    row = {"guard": guard, "kind": "questions", "domain": domain, "key": key, "id": 0}
    return {**row, "correct": float(correct), "margin": correct - 0.25, "chosen": 3.0, **values}


def passage(key, nll_sum, num_tokens):
    row = {"guard": "on", "kind": "passages", "domain": "near", "key": key, "id": 0}
    return {**row, "nll_sum": nll_sum, "num_tokens": num_tokens, "density": None}


def two_runs(folder):
    first = [question(f"q{index}", index < 6) for index in range(10)]
    first += [question("first only", 1), passage("p", 6.0, 3.0), passage("q", 4.0, 4.0)]
    # In another order, with other ids.
    second = [passage("q", 8.0, 4.0), passage("p", 3.0, 3.0)]
    second += [question(f"q{index}", index < 2, id=7) for index in reversed(range(10))]
    return write(folder / "a", first), write(folder / "b", second)


def test_items_are_paired_by_key(tmp_path):
    found, [overlap] = compare_runs(*two_runs(tmp_path))
    tests = {(c.kind, c.domain, c.metric): c.test for c in found}
    assert set(tests) == {
        ("questions", "forget", "correct"),
        ("questions", "forget", "margin"),
        ("passages", "near", "nll_per_token"),
    }
    right = [float(index < 6) for index in range(10)], [float(index < 2) for index in range(10)]
    assert tests["questions", "forget", "correct"] == mcnemar(*right)
    assert tests["questions", "forget", "correct"].p == pytest.approx(2 / 16)
    assert tests["passages", "near", "nll_per_token"] == sign_flip([2.0, 1.0], [1.0, 2.0])
    assert (overlap.both, overlap.first_only, overlap.second_only) == (12, 1, 0)


def test_wordings_of_one_fact_are_one_pair(tmp_path):
    """Ten facts asked twice are no twenty answers."""

    def run(name, known):
        rows = [question(f"q{i}{form}", i < known, fact=i) for i in range(10) for form in "ab"]
        rows += [question("own", 1.0), question("half", 1.0, fact=10)]
        rows += [question("other half", 0.0, fact=10)]
        return write(tmp_path / name, rows)

    found, [overlap] = compare_runs(run("a", 6), run("b", 2))
    [correct] = [c.test for c in found if c.metric == "correct"]
    first = [float(i < 6) for i in range(10)] + [1.0, 0.5]
    second = [float(i < 2) for i in range(10)] + [1.0, 0.5]
    expected = sign_flip(first, second)
    assert correct.n == 12
    assert (correct.first, correct.second) == pytest.approx((expected.first, expected.second))
    assert correct.p == pytest.approx(expected.p)
    assert overlap.both == 23
    assert {c.metric for c in found} == {"correct", "margin"}


def test_the_same_run_with_itself(tmp_path):
    rows = [question(f"q{i}", i < 3, guard) for i in range(4) for guard in ("off", "on")]
    found, overlaps = compare_runs(write(tmp_path, rows), tmp_path)
    assert {comparison.guards for comparison in found} == {("off", "off"), ("on", "on")}
    assert all(comparison.test.p == 1.0 for comparison in found)
    assert [overlap.both for overlap in overlaps] == [4, 4]


def test_two_states_of_one_run(tmp_path):
    rows = [question(f"q{i}", 1, "off") for i in range(4)]
    rows += [question(f"q{i}", 0, "on") for i in range(4)]
    found, _ = compare_runs(write(tmp_path, rows), tmp_path, guards=("off", "on"))
    [correct] = [comparison for comparison in found if comparison.metric == "correct"]
    assert (correct.guards, correct.test.difference) == (("off", "on"), -1.0)


def test_an_item_without_a_value_leaves_that_metric(tmp_path):
    first = write(tmp_path / "a", [question("x", 1), question("y", 1, margin=float("nan"))])
    found, [overlap] = compare_runs(first, first)
    assert {comparison.metric: comparison.test.n for comparison in found} == {
        "correct": 2,
        "margin": 1,
    }
    assert overlap.both == 2


def test_runs_that_share_nothing(tmp_path):
    first = write(tmp_path / "a", [question("x", 1)])
    with pytest.raises(UserError, match=r"got 1 and 2 of which none is the same"):
        compare_runs(first, write(tmp_path / "b", [question("y", 1), question("z", 1)]))
    with pytest.raises(UserError, match=r"got \['on'\] in .* \['none'\] in .*--guard_a"):
        compare_runs(first, write(tmp_path / "c", [question("x", 1, "none")]))
    with pytest.raises(UserError, match="states of the guard"):
        compare_runs(first, first, guards=("on", "off"))


def test_items_that_cannot_be_told_apart(tmp_path):
    twice = write(tmp_path / "a", [question("x", 1), question("x", 0)])
    with pytest.raises(UserError, match="twice"):
        compare_runs(twice, twice)
    nameless = write(tmp_path / "b", [question("", 1)])
    with pytest.raises(UserError, match="must have a key"):
        compare_runs(nameless, nameless)
    with pytest.raises(UserError, match=r"holds no items\.parquet"):
        compare_runs(nameless.parent / "c", nameless)


def test_pools_are_compared_beside_their_domains(tmp_path):
    rows = [question("x", 1, domain="age", pool="retain"), question("x", 1, domain="history")]
    rows[1]["pool"] = "retain"
    other = [{**row, "correct": 0.0} for row in rows]
    found, _ = compare_runs(write(tmp_path / "a", rows), write(tmp_path / "b", other))
    sizes = {c.domain: c.test.n for c in found if c.metric == "correct"}
    assert sizes == {"age": 1, "history": 1, "retain": 2}


def test_a_domain_that_is_a_whole_pool_is_compared_once(tmp_path):
    rows = [question(f"q{i}", i < 3, domain="q_forget", pool="forget") for i in range(4)]
    rows += [question(f"{d}{i}", 1, domain=d, pool="retain") for i in range(2) for d in "ab"]
    found, _ = compare_runs(write(tmp_path, rows), tmp_path)
    assert {comparison.domain for comparison in found} == {"forget", "retain", "a", "b"}


def test_choosing(tmp_path):
    found, _ = compare_runs(*two_runs(tmp_path))
    assert [c.metric for c in choose(found, ["correct"], [])] == ["correct"]
    assert {c.domain for c in choose(found, [], ["near"])} == {"near"}
    with pytest.raises(UserError, match="--metric must be one of correct, margin, nll_per_token"):
        choose(found, ["accuracy"], [])
