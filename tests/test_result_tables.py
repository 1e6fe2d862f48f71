"""What the READMEs quote is what `.github/grid.csv` holds."""

import csv
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FRONT = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "configs" / "grids" / "README.md").read_text(encoding="utf-8")
METHODS_TABLE = "| method | forget %"
METHODS = {
    "no unlearning": "base",
    "DSG": "dsg",
    "DSG, near data in calibration": "dsg_near",
    "static clamp, tuned (no gate)": "static_clamp",
    "Farrell et al.": "farrell",
    "Clamp Prime": "clamp_prime",
    "Refusal Clamp": "refusal_clamp",
    "random features": "random",
    "RMU": "rmu",
    "GA": "ga",
    "GradDiff": "grad_diff",
    "NPO": "npo",
    "SimNPO": "simnpo",
    "SCRUB": "scrub",
    "SSD": "ssd",
    "task vector": "task_vector",
}


def table(beginning: str, page: str = RESULTS) -> list[dict[str, str]]:
    """Rows of the table whose header begins so, by column, without emphasis."""
    body = page[page.index(f"{beginning} |") :].split("\n\n")[0].replace("**", "")
    header, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines()
    )
    return [dict(zip(header, row, strict=True)) for row in rows]


@pytest.fixture(scope="module")
def measured():
    """Lines of the grid behind the tables."""
    keys = ("phase", "attack", "method", "mode", "guard", "domain", "metric")
    with (ROOT / ".github" / "grid.csv").open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["protocol"] in ("cloze", "passages")]
    return {tuple(line[key] for key in keys): line for line in lines}


def interval(line, scale: float, digits: int) -> str:
    def shown(number: str, digits: int = digits) -> str:
        return f"{scale * float(number):.{digits}f}".replace("100.0", "100")

    return f"{shown(line['mean'])} [{shown(line['low'])}, {shown(line['high'])}]"


def test_the_table_of_methods_is_what_was_measured(measured):
    rows = table(METHODS_TABLE)
    assert [row["method"] for row in rows] == list(METHODS)
    for row in rows:
        method = METHODS[row["method"]]
        guarded = ("unlearning", "", method, "", "on", "forget", "accuracy") in measured
        for domain in ("forget", "near", "retain"):
            place = ("unlearning", "", method, "", "on" if guarded else "none", domain)
            found = row[f"{domain} %"].replace("▼", "")
            assert found == interval(measured[*place, "accuracy"], 100, 1), (method, domain)


def test_the_front_page_rounds_the_same_lines(measured):
    rows = {
        "no unlearning": ("base", "", "none"),
        "DSG at test time": ("dsg", "test_time", "on"),
        "static clamp, tuned": ("static_clamp", "test_time", "on"),
        "RMU": ("rmu", "", "none"),
        "NPO": ("npo", "", "none"),
        "SimNPO": ("simnpo", "", "none"),
    }
    shown = table("| method | forget", FRONT)
    assert [row["method"] for row in shown] == list(rows)
    for row in shown:
        method, mode, guard = rows[row["method"]]
        for domain in ("forget", "near", "retain"):
            line = measured["unlearning", "", method, "", guard, domain, "accuracy"]
            assert row[domain] == interval(line, 100, 0), (method, domain)
        attacked = ("attack", "relearn_full", method, mode, guard, "forget_shown", "accuracy")
        assert row["after relearning"] == interval(measured[attacked], 100, 0), method


def test_recovery_is_quoted_of_shown_facts(measured):
    """What other facts lose with the attack itself would hide it."""
    quoted = 0
    for row in table("| attack | what is attacked"):
        name, area, half = row["what is attacked"], row["area"], row["half"]
        if area == "–":
            continue
        kind = {"full": "relearn_full", "LoRA": "relearn_lora"}[row["attack"]]
        mode = next((mode for mode in ("test", "train") if f"{mode} time" in name), "")
        short = name.split(",")[0].split(" at ")[0]
        method = next(method for known, method in METHODS.items() if known.split(",")[0] == short)
        place = ("attack", kind, method, f"{mode}_time" if mode else "", "on" if mode else "none")
        assert area == interval(measured[*place, "forget_shown", "recovery_area"], 1, 2), name
        line = measured.get((*place, "forget_shown", "epochs_to_half"))
        if half != "–":
            assert half.split(" (")[0] == interval(line, 1, 1), name
            assert ("of 3 seeds" in half) == (line["n_seeds"] != "3")
        quoted += 1
    assert quoted >= 10


def test_a_clamp_that_is_tuned_by_itself_is_not_called_dsg_without_its_gate():
    grid = yaml.safe_load((ROOT / "configs/grids/tiny_world.yaml").read_text(encoding="utf-8"))
    assert grid["methods"]["static_clamp"].get("settings_of") != "dsg"
    lines = (RESULTS + FRONT).splitlines()
    named = [line for line in lines if re.match(r"\|.*static clamp.*\[", line)]
    assert named
    assert all("static clamp, tuned" in line for line in named)


def test_what_is_said_of_gates_is_the_range_of_the_table():
    kept = {row["method"]: float(row["retain %"].split()[0]) for row in table(METHODS_TABLE)}
    ungated = ("static clamp, tuned (no gate)", "Farrell et al.", "Clamp Prime", "Refusal Clamp")
    losses = [kept["no unlearning"] - kept[name] for name in ungated]
    said = re.search(r"without a gate cost (\d+) to (\d+) points", RESULTS)
    assert [int(number) for number in said.groups()] == [round(min(losses)), round(max(losses))]
