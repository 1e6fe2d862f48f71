"""Names of multiple-choice sets: WMDP's three, MMLU's subjects, the papers' utility sets."""

import difflib
from collections.abc import Iterable
from pathlib import Path

from dsg.errors import UserError
from dsg.evaluation.items import Protocol

# What the prompts call them. The harness and the papers' code spell one of them differently.
WMDP_TOPICS = {"wmdp-bio": "biology", "wmdp-chem": "chemistry", "wmdp-cyber": "cybersecurity"}
_DSG_TOPICS = {**WMDP_TOPICS, "wmdp-cyber": "cyber security"}

MMLU_SUBJECTS = (
    *("abstract_algebra", "anatomy", "astronomy", "business_ethics", "clinical_knowledge"),
    *("college_biology", "college_chemistry", "college_computer_science", "college_mathematics"),
    *("college_medicine", "college_physics", "computer_security", "conceptual_physics"),
    *("econometrics", "electrical_engineering", "elementary_mathematics", "formal_logic"),
    *("global_facts", "high_school_biology", "high_school_chemistry"),
    *("high_school_computer_science", "high_school_european_history", "high_school_geography"),
    *("high_school_government_and_politics", "high_school_macroeconomics"),
    *("high_school_mathematics", "high_school_microeconomics", "high_school_physics"),
    *("high_school_psychology", "high_school_statistics", "high_school_us_history"),
    *("high_school_world_history", "human_aging", "human_sexuality", "international_law"),
    *("jurisprudence", "logical_fallacies", "machine_learning", "management", "marketing"),
    *("medical_genetics", "miscellaneous", "moral_disputes", "moral_scenarios", "nutrition"),
    *("philosophy", "prehistory", "professional_accounting", "professional_law"),
    *("professional_medicine", "professional_psychology", "public_relations"),
    *("security_studies", "sociology", "us_foreign_policy", "virology", "world_religions"),
)

_UTILITY = ("high_school_us_history", "high_school_geography", "human_aging")
# The retain questions of the papers, for forgetting WMDP-Bio and WMDP-Cyber.
SUBSETS = {
    "utility_bio": (*_UTILITY, "college_computer_science"),
    "utility_cyber": (*_UTILITY, "college_biology"),
    "all": MMLU_SUBJECTS,
}

FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def expand_sets(argument: str, names: Iterable[str]) -> list[str]:
    """Replace the names of subsets by those of their subjects.

    Args:
        argument: Where the user gave them, for the message.
        names: Sets of WMDP, subjects of MMLU, `utility_bio`, `utility_cyber`, `all` (of MMLU), or
            paths of files.

    Returns:
        Sets, subjects and paths in the given order.

    Raises:
        UserError: A name is unknown, or something comes twice.
    """
    sets: list[str] = []
    for name in names:
        if name not in SUBSETS and not is_file_name(name):
            _check_known(argument, name)
        sets += SUBSETS.get(name, (name,))
    twice = sorted({name for name in sets if sets.count(name) > 1})
    if twice:
        raise UserError(
            f"`{argument}` must name each set once, got {', '.join(twice)} more often; remove it."
        )
    return sets


def is_file_name(name: str) -> bool:
    """Whether a name is that of a file rather than of a known set."""
    return Path(name).suffix.lower() in FILE_SUFFIXES


def topic(subject: str, protocol: Protocol) -> str:
    """What a subject is called in the first line of a prompt."""
    topics = _DSG_TOPICS if protocol == "dsg" else WMDP_TOPICS
    return topics.get(subject, subject.replace("_", " "))


def _check_known(argument: str, name: str) -> None:
    names = (*WMDP_TOPICS, *SUBSETS, *MMLU_SUBJECTS)
    if name in names:
        return
    near = difflib.get_close_matches(name.lower().replace(" ", "_"), names, n=5, cutoff=0.4)
    raise UserError(
        f"`{argument}` must name sets of WMDP, subjects of MMLU, {', '.join(SUBSETS)}, or files "
        f"({', '.join(FILE_SUFFIXES)}), got {name!r}; "
        + (f"did you mean {' or '.join(near)}?" if near else "choose one.")
    )
