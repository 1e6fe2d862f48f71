"""Judges behind a real HTTP server that fails in every way endpoints fail."""

import time

import pytest

from dsg.errors import UserError
from dsg.evaluation.benchmarks.mt_bench.grading import make_judge
from dsg.evaluation.benchmarks.mt_bench.judge import (
    JudgeFailure,
    JudgeSettings,
    parse_rating,
    request_key,
)
from tests.judge_server import Reply, judge_server

ASKED = [{"role": "user", "content": "How good is this?"}]


def settings(url="http://127.0.0.1:9/v1", **changes):
    given = {"model": "stub", "base_url": url, "timeout_seconds": 5.0, "max_retries": 2}
    return JudgeSettings(**{**given, **changes})


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The client waits half a second and more where the endpoint names no time."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("Good. Rating: [[7]]", 7.0),
        ("[[8.5]]", 8.5),
        ("first [[3]], then [[9]]", 3.0),
        ("[[10]]", 10.0),
        ("[[1]]", 1.0),
        ("[[0]]", None),
        ("[[11]]", None),
        ("[[rating]]", None),
        ("[7]", None),
        ("7 of 10", None),
        ("", None),
    ],
)
def test_ratings(reply, rating):
    assert parse_rating(reply) == rating


def test_what_is_sent(monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret-key")
    with judge_server(lambda *_: Reply("fine [[6]]")) as server:
        judge = make_judge(settings(server.url, api_key_variable="MY_KEY", max_tokens=None))
        assert judge.reply(ASKED, 0) == "fine [[6]]"
    assert server.requests == [{"messages": ASKED, "model": "stub", "temperature": 0.0}]
    assert server.keys == ["Bearer secret-key"]


def test_a_rate_limit_is_waited_for():
    limited = Reply("slow down", status=429, headers={"Retry-After": "0.4"})
    with judge_server(lambda _, number: limited if number == 0 else Reply()) as server:
        began = time.monotonic()
        assert make_judge(settings(server.url)).reply(ASKED, 0) == "Rating: [[5]]"
    assert time.monotonic() - began >= 0.4
    assert len(server.requests) == 2


def test_failures_of_the_endpoint_and_time_outs_are_asked_again():
    replies = [Reply("oops", status=500), Reply(hang=True), Reply("[[4]]")]
    with judge_server(lambda _, number: replies[number]) as server:
        judge = make_judge(settings(server.url, timeout_seconds=0.3))
        assert judge.reply(ASKED, 0) == "[[4]]"
    assert len(server.requests) == 3


def test_retries_end():
    with (
        judge_server(lambda *_: Reply("down", status=503)) as server,
        pytest.raises(JudgeFailure, match=r"InternalServerError \(503\).*down"),
    ):
        make_judge(settings(server.url)).reply(ASKED, 0)
    assert len(server.requests) == 3
    with (
        judge_server(lambda *_: Reply(hang=True)) as server,
        pytest.raises(JudgeFailure, match="APITimeoutError"),
    ):
        make_judge(settings(server.url, timeout_seconds=0.2, max_retries=0)).reply(ASKED, 0)


@pytest.mark.parametrize(
    "body", [b"{}", b'{"choices": []}', b'{"choices": [{"message": null}]}', b"null", b'"text"']
)
def test_a_malformed_reply_says_nothing(body):
    with judge_server(lambda *_: Reply(body=body)) as server:
        assert make_judge(settings(server.url)).reply(ASKED, 0) == ""


def test_a_reply_without_content_says_nothing():
    with judge_server(lambda *_: Reply(content=None)) as server:
        assert make_judge(settings(server.url)).reply(ASKED, 0) == ""


def test_a_body_that_is_no_json_is_a_failure():
    with judge_server(lambda *_: Reply(body=b"<html>")) as server, pytest.raises(JudgeFailure):
        make_judge(settings(server.url)).reply(ASKED, 0)


def test_a_refused_key_is_not_repeated(monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret-key")
    for status in (401, 403, 400):
        refusal = Reply("secret-key is wrong", status=status)
        with judge_server(lambda *_, refusal=refusal: refusal) as server:
            judge = make_judge(settings(server.url, api_key_variable="MY_KEY"))
            with pytest.raises(JudgeFailure) as failure:
                judge.reply(ASKED, 0)
        assert "secret-key" not in str(failure.value)
        assert str(status) in str(failure.value)
        assert failure.value.__cause__ is None
        assert len(server.requests) == 1  # no use in asking again


def test_the_check_before_anything_expensive(monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret-key")
    with pytest.raises(UserError, match=r"`base_url`, `model` and the key in MY_KEY") as error:
        make_judge(settings(max_retries=0, api_key_variable="MY_KEY")).check()
    assert "secret-key" not in str(error.value)
    with judge_server(lambda *_: Reply(status=500)) as server:
        make_judge(settings(server.url)).check()


def test_settings_that_cannot_work():
    with pytest.raises(UserError, match="OPENAI_API_KEY must hold the judge's key"):
        make_judge(settings(None))
    with pytest.raises(UserError, match="`repeats` must be at least 1, got 0"):
        make_judge(settings(repeats=0))
    with pytest.raises(UserError, match="`kind` must be one of"):
        make_judge(settings(kind="oracle"))
    with pytest.raises(UserError, match="would all be the same"):
        make_judge(settings(kind="local", repeats=2))


def test_facts_hold_neither_user_nor_key():
    facts = settings("http://user:pass@judge.example/v1?key=abc").facts()
    assert facts["endpoint"] == "judge.example/v1"
    assert not {"user", "pass", "abc"} & set(" ".join(map(str, facts.values())).split())


def test_a_judgement_is_known_by_all_that_decides_it():
    base = request_key(settings(), ASKED, 0)
    assert base == request_key(settings(concurrency=9, timeout_seconds=1.0), ASKED, 0)
    others = [
        request_key(settings(model="other"), ASKED, 0),
        request_key(settings(temperature=0.7), ASKED, 0),
        request_key(settings(), ASKED, 1),
        request_key(settings(), [{"role": "user", "content": "Else?"}], 0),
    ]
    assert len({base, *others}) == 5
