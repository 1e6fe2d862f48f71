import json
import logging

import pytest

from dsg.evaluation.benchmarks.mt_bench.grading import Request, grade
from dsg.evaluation.benchmarks.mt_bench.judge import JudgeFailure


class Oracle:
    """Replies from a script and remembers what it was asked."""

    concurrency = 1

    def __init__(self, replies):
        self.replies = list(replies)
        self.asked = []

    def check(self):
        pass

    def reply(self, messages, seed):
        self.asked.append((list(messages), seed))
        found = self.replies.pop(0)
        if isinstance(found, BaseException):
            raise found
        return found


def request(name, text=None, seed=0):
    return Request(name, [{"role": "user", "content": text or name}], seed, {"question_id": name})


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_ratings_are_kept_and_not_asked_for_again(tmp_path):
    path = tmp_path / "judgements.jsonl"
    first = Oracle(["[[3]]", "[[4]]"])
    found, failures = grade(first, [request("a"), request("b", seed=1)], path, 3)
    assert (found, failures) == ({"a": 3.0, "b": 4.0}, {})
    assert [seed for _, seed in first.asked] == [0, 1]
    assert {line["question_id"]: line["rating"] for line in lines(path)} == {"a": 3.0, "b": 4.0}

    second = Oracle(["[[9]]"])
    found, _ = grade(second, [request("a"), request("b"), request("c")], path, 3)
    assert found == {"a": 3.0, "b": 4.0, "c": 9.0}
    assert [messages[0]["content"] for messages, _ in second.asked] == ["c"]


def test_equal_requests_are_made_once(tmp_path):
    oracle = Oracle(["[[2]]"])
    found, _ = grade(oracle, [request("a"), request("a")], tmp_path / "j", 3)
    assert found == {"a": 2.0}
    assert len(oracle.asked) == 1


def test_a_judgement_without_a_rating_is_asked_for_again_with_a_reminder(tmp_path):
    oracle = Oracle(["splendid", "[[eight]]", "[[8]]"])
    found, _ = grade(oracle, [request("a")], tmp_path / "j", 3)
    assert found == {"a": 8.0}
    roles = [[message["role"] for message in messages] for messages, _ in oracle.asked]
    assert roles == [["user"], ["user", "assistant", "user"], ["user", "assistant", "user"]]
    assert oracle.asked[2][0][1]["content"] == "[[eight]]"
    assert lines(tmp_path / "j")[0]["asked"] == 3


def test_after_an_empty_reply_the_same_is_asked(tmp_path):
    oracle = Oracle(["  ", "[[8]]"])
    grade(oracle, [request("a")], tmp_path / "j", 2)
    assert oracle.asked[0] == oracle.asked[1]


def test_failures_are_reported_and_asked_for_again_by_the_next_run(tmp_path, caplog):
    path = tmp_path / "judgements.jsonl"
    oracle = Oracle(["no", "still no", JudgeFailure("lost"), "[[6]]"])
    asked = [request("a"), request("b"), request("c")]
    with caplog.at_level(logging.WARNING):
        found, failures = grade(oracle, asked, path, 2)
    assert found == {"c": 6.0}
    assert failures == {"a": "no rating", "b": "lost"}
    assert "1 judgements failed: lost." in caplog.text
    assert {line["question_id"]: line["error"] for line in lines(path)} == {
        "a": "no rating",
        "b": "lost",
        "c": None,
    }
    assert lines(path)[0]["reply"] == "still no"
    found, failures = grade(Oracle(["[[1]]", "[[2]]"]), asked, path, 2)
    assert (found, failures) == ({"a": 1.0, "b": 2.0, "c": 6.0}, {})


def test_a_killed_grading_goes_on(tmp_path):
    path = tmp_path / "judgements.jsonl"
    with pytest.raises(KeyboardInterrupt):
        grade(Oracle(["[[3]]", KeyboardInterrupt()]), list(map(request, "ab")), path, 1)
    # Killed in the middle of a line.
    path.write_bytes(path.read_bytes() + b'{"request": "b", "rat')
    oracle = Oracle(["[[4]]", "[[5]]"])
    found, _ = grade(oracle, [request(name) for name in "abc"], path, 1)
    assert found == {"a": 3.0, "b": 4.0, "c": 5.0}
    assert len(oracle.asked) == 2
    # A line of something else is passed over; nothing is asked again.
    path.write_bytes(path.read_bytes() + b'["rating"]\n{"request": "z"}\n')
    assert grade(Oracle([]), [request(name) for name in "abc"], path, 1) == (found, {})


def test_a_judge_that_is_gone_is_given_up(tmp_path):
    oracle = Oracle([JudgeFailure("gone")] * 50)
    asked = [request(f"q{index}") for index in range(50)]
    found, failures = grade(oracle, asked, tmp_path / "j", 1)
    assert not found
    assert failures.keys() == {one.key for one in asked}
    assert len(oracle.asked) == 10
    assert sum("not asked" in reason for reason in failures.values()) == 40
    assert len(lines(tmp_path / "j")) == 10


def test_a_judge_that_only_stumbles_is_not_given_up(tmp_path):
    replies = [reply for _ in range(15) for reply in (JudgeFailure("lost"), "[[5]]")]
    asked = [request(f"q{index}") for index in range(30)]
    found, failures = grade(Oracle(replies), asked, tmp_path / "j", 1)
    assert (len(found), len(failures)) == (15, 15)
