"""The judge of MT-Bench answers: its settings, its interface, and the rating in its reply."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from dsg.errors import UserError, check_choice
from dsg.evaluation.benchmarks.mt_bench.prompts import Message
from dsg.io import short_name

LOWEST, HIGHEST = 1.0, 10.0
Kind = Literal["api", "local"]

_RATING = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")


@dataclass(frozen=True)
class JudgeSettings:
    """Who judges, and how it is asked."""

    model: str
    """Name of the model at the endpoint; or its Hugging Face folder or hub name."""
    kind: Kind = "api"
    """`api` asks an OpenAI-compatible endpoint, `local` a Hugging Face model on this machine."""
    base_url: str | None = None
    """Address of the endpoint, such as http://localhost:8000/v1; None for OpenAI's own."""
    api_key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the endpoint's key; it is never written anywhere. It may be
    unset for an endpoint that asks for none."""
    prompts_file: str | None = None
    """FastChat's `judge_prompts.jsonl` for the published wording; None for this package's own."""
    repeats: int = 1
    """How often each answer is judged, for the spread of the score."""
    temperature: float | None = 0.0
    """Of the judge, at least 0, as published; None leaves it to the endpoint."""
    max_tokens: int | None = 2048
    """Longest judgement; None leaves it to the endpoint."""
    max_attempts: int = 3
    """How often a judgement without a rating is asked for, in all."""
    timeout_seconds: float = 120.0
    """Longest wait for one reply of the endpoint."""
    max_retries: int = 6
    """How often a request is sent again after a time-out, a lost connection, a rate limit
    (Retry-After is kept up to two minutes) or a failure of the endpoint."""
    concurrency: int = 4
    """Requests under way at the same time."""

    def check(self) -> None:
        """Refuse settings that cannot work.

        Raises:
            UserError: A setting is out of range, or repeats would all be the same.
        """
        check_choice("kind", self.kind, ("api", "local"))
        settings = asdict(self)
        for name in ("repeats", "max_attempts", "concurrency"):
            if settings[name] < 1:
                raise UserError(f"`{name}` must be at least 1, got {settings[name]}; raise it.")
        if self.kind == "local" and self.repeats > 1 and not self.temperature:
            raise UserError(
                f"`repeats` must be 1 for a local judge at temperature 0, got {self.repeats}, "
                "which would all be the same; raise `temperature`."
            )

    def facts(self) -> dict[str, Any]:
        """Who judged, without a secret and without this machine's paths."""
        parts = urlsplit(self.base_url or "")
        return {
            "model": short_name(self.model),
            "kind": self.kind,
            "endpoint": f"{parts.hostname}{parts.path}" if parts.hostname else None,
            "repeats": self.repeats,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "max_attempts": self.max_attempts,
        }


class JudgeFailure(Exception):
    """The judge gave no reply at all; the message says why and holds no secret."""


class Judge(Protocol):
    """A model that replies to messages."""

    concurrency: int
    """How many replies may be asked for at the same time."""

    def check(self) -> None:
        """Refuse a judge that cannot be asked, before anything expensive is done for it.

        Raises:
            UserError: It cannot.
        """
        ...

    def reply(self, messages: Sequence[Message], seed: int) -> str:
        """The judge's reply, which may be empty.

        Args:
            messages: The conversation so far, the user's message last.
            seed: Tells repeats apart, where the judge draws its words.

        Raises:
            JudgeFailure: It could not be reached.
        """
        ...


def parse_rating(reply: str) -> float | None:
    """The first `[[rating]]` of a judgement, in [1, 10]; None where there is none."""
    match = _RATING.search(reply)
    rating = float(match[1]) if match else None
    return rating if rating is not None and LOWEST <= rating <= HIGHEST else None


def request_key(settings: JudgeSettings, messages: Sequence[Message], repeat: int) -> str:
    """Hash of everything that decides a judgement, and of the number of the repeat."""
    names = ("model", "kind", "base_url", "temperature", "max_tokens")
    decides = {name: value for name, value in asdict(settings).items() if name in names}
    text = json.dumps([decides, list(messages), repeat], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
