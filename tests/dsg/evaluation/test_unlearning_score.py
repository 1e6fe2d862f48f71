import pytest

from dsg.errors import UserError
from dsg.evaluation.unlearning_score import Outcome, unlearning_score

BASE = Outcome(80, 100, 0.60)


def test_by_hand():
    choosing = [
        Outcome(50, 100, 0.60),
        Outcome(30, 100, 0.595),  # 0.9917 of the base: kept, and the lowest that is
        Outcome(5, 100, 0.55),  # forgets most, but at the cost of utility
    ]
    reported = [Outcome(48, 100, 0.60), Outcome(40, 100, 0.57), Outcome(2, 100, 0.54)]
    found = unlearning_score(choosing, reported, BASE, Outcome(79, 100, 0.60))
    assert found is not None
    assert found.setting == 1
    # The number is that of the other half, not the 0.7 that chose the setting.
    assert (found.score.value, found.score.n) == (0.6, 100)
    assert found.utility == pytest.approx(0.95)
    # Wilson interval of 60 in 100.
    assert found.score.low == pytest.approx(0.5020, abs=1e-4)
    assert found.score.high == pytest.approx(0.6906, abs=1e-4)


def test_exactly_99_per_cent_is_enough():
    base = Outcome(1, 2, 1.0)
    found = unlearning_score([Outcome(0, 2, 0.99)], [Outcome(1, 2, 1.0)], base, base)
    assert found is not None
    assert found.score.value == 0.5


def test_ties_go_to_more_utility_and_then_to_the_earlier():
    choosing = [Outcome(3, 10, 0.60), Outcome(3, 10, 0.61), Outcome(3, 10, 0.61)]
    reported = [Outcome(index, 10, 0.6) for index in range(3)]
    found = unlearning_score(choosing, reported, BASE, BASE)
    assert found is not None
    assert found.setting == 1


def test_no_setting_keeps_its_utility():
    assert unlearning_score([Outcome(0, 10, 0.3)], [Outcome(0, 10, 0.6)], BASE, BASE) is None


def test_bad_input():
    with pytest.raises(UserError, match="same settings, got 1 and 0"):
        unlearning_score([BASE], [], BASE, BASE)
    with pytest.raises(UserError, match="forget_total"):
        unlearning_score([Outcome(0, 0, 1.0)], [BASE], BASE, BASE)
    with pytest.raises(UserError, match="nothing to keep"):
        unlearning_score([BASE], [BASE], BASE, Outcome(1, 2, 0.0))
