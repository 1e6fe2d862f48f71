"""The time that a run is likely to take yet, from what its stages took elsewhere and here."""

from dsg.cli.demo.time_left import TimeLeft


def test_it_follows_what_the_stages_take_here():
    left = TimeLeft({"model": 300, "one": 60, "two": 240}, trusted=60)
    assert left.tell() == "about 10 min left"
    left.finish("model", 660)  # twice as slow, once the trusted minute is outweighed
    assert left.tell() == "about 10 min left"
    left.finish("unknown", 10_000)
    assert left.tell() == "about 10 min left"
    left.finish("one", None)  # finished by an earlier run: says nothing of the speed
    assert left.tell() == "about 8 min left"
    left.finish("two", 480)
    assert left.tell() == ""


def test_nothing_is_told_of_a_machine_nobody_knows():
    left = TimeLeft({"one": 10, "two": 10}, trusted=0)
    assert left.tell() == ""
    left.finish("one", 20)
    assert left.tell() == "less than a minute left"
