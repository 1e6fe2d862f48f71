"""Names of sets: complete, as the harness has them, and corrected when misspelt."""

from pathlib import Path

import pytest
import yaml

from dsg.errors import UserError
from dsg.evaluation.benchmarks.multiple_choice.subjects import (
    MMLU_SUBJECTS,
    SUBSETS,
    expand_sets,
    topic,
)


def test_subjects_and_topics_are_those_of_the_installed_harness():
    import lm_eval  # here, because importing it takes seconds

    folder = Path(lm_eval.__file__).parent / "tasks"
    paths = [*(folder / "mmlu/default").glob("mmlu_*.yaml"), *(folder / "wmdp").glob("wmdp_*.yaml")]
    configs = [yaml.safe_load(path.read_text()) for path in paths]
    assert len(configs) == 60
    for config in configs:
        name = config["dataset_name"]
        assert name in MMLU_SUBJECTS or name in ("wmdp-bio", "wmdp-chem", "wmdp-cyber")
        assert config["description"] == (
            "The following are multiple choice questions (with answers) about "
            f"{topic(name, 'lm_eval')}.\n\n"
        )


def test_subsets_are_those_of_the_papers():
    assert expand_sets("retain", ["utility_bio"]) == [
        "high_school_us_history",
        "high_school_geography",
        "human_aging",
        "college_computer_science",
    ]
    assert set(SUBSETS["utility_cyber"]) - set(SUBSETS["utility_bio"]) == {"college_biology"}
    assert len(expand_sets("retain", ["all"])) == len(set(MMLU_SUBJECTS)) == 57
    assert expand_sets("forget", ["wmdp-bio", "my/own.csv"]) == ["wmdp-bio", "my/own.csv"]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("wmdp_bio", "wmdp-bio"),
        ("Human Ageing", "human_aging"),
        ("us_history", "high_school_us_history"),
    ],
)
def test_a_misspelt_name_is_answered_with_near_ones(name, near):
    with pytest.raises(UserError, match=rf"`retain` must name.*did you mean .*{near}"):
        expand_sets("retain", [name])


def test_a_name_near_to_nothing_and_a_name_twice():
    with pytest.raises(UserError, match=r"got 'qqq'; choose one"):
        expand_sets("retain", ["qqq"])
    with pytest.raises(UserError, match="got human_aging more often"):
        expand_sets("retain", ["utility_bio", "human_aging"])


def test_the_two_codes_spell_cyber_security_differently():
    assert topic("wmdp-cyber", "dsg") == "cyber security"
    assert topic("wmdp-cyber", "lm_eval") == "cybersecurity"
    assert topic("human_aging", "dsg") == "human aging"
