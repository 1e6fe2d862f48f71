"""What the terminal says of attacks."""

from rich.console import Console

from dsg.cli.grid.tables import attack_table
from dsg.io.results import row
from dsg.report import table_rows


def test_recovery_is_that_of_shown_facts_and_damage_that_of_the_others():
    place = {"method": "dsg", "guard": "on", "mode": "train_time", "attack": "relearn_full"}
    numbers = {
        ("forget", "recovery_area"): 0.21,
        ("forget_shown", "recovery_area"): 0.55,
        ("forget", "epochs_to_half"): 4.8,
        ("forget_shown", "epochs_to_half"): 2.6,
        ("forget_unshown", "collateral_damage"): 0.75,
    }
    rows = [
        row(**place, protocol="cloze", domain=domain, metric=metric, value=value, seed=0)
        for (domain, metric), value in numbers.items()
    ]
    console = Console(width=100)
    with console.capture() as captured:
        console.print(attack_table(table_rows(rows)))
    [line] = [line for line in captured.get().splitlines() if "relearn_full" in line]
    assert line.split()[-3:] == ["0.55", "2.60", "75.0"]
