"""A judge behind an OpenAI-compatible endpoint."""

import os
from collections.abc import Sequence
from typing import Any

from dsg.errors import UserError
from dsg.evaluation.benchmarks.mt_bench.judge import JudgeFailure, JudgeSettings
from dsg.evaluation.benchmarks.mt_bench.prompts import Message
from dsg.io import first_line

_OPENAI = "https://api.openai.com/v1"
_NO_KEY = "none"  # servers of one's own ask for no key, but the client insists on one
_MAX_REASON = 200  # characters of what an endpoint says about a failure


class ApiJudge:
    """Asks an OpenAI-compatible endpoint.

    The client sends a request again after a time-out, a lost connection, a rate limit or a failure
    of the endpoint, and waits as long as the endpoint asks it to.

    Args:
        settings: Which endpoint and model.

    Raises:
        UserError: The client's package is missing, or there is no key for OpenAI's own endpoint.
    """

    def __init__(self, settings: JudgeSettings) -> None:
        try:
            import openai
        except ImportError as error:
            raise UserError(
                "`kind` 'api' of the judge needs the package openai, which is not installed; "
                "pip install 'dynamic-sae-guardrails[judge]'."
            ) from error
        self.concurrency = settings.concurrency
        self._settings = settings
        self._key = os.environ.get(settings.api_key_variable)
        if not self._key and settings.base_url is None:
            raise UserError(
                f"the environment variable {settings.api_key_variable} must hold the judge's key, "
                "got none; set it, or give the `base_url` of an endpoint of your own."
            )
        self._openai: Any = openai
        self._client: Any = openai.OpenAI(
            api_key=self._key or _NO_KEY,
            # Given explicitly, or the client would take one from the environment.
            base_url=settings.base_url or _OPENAI,
            timeout=settings.timeout_seconds,
            max_retries=settings.max_retries,
        )

    def check(self) -> None:
        """Send one short message."""
        try:
            self.reply([{"role": "user", "content": "Rate this message: [[5]]"}], 0)
        except JudgeFailure as failure:
            place = self._settings.base_url or "OpenAI"
            raise UserError(
                f"the judge {self._settings.model!r} at {place} must reply before answers are "
                f"generated for it, got {failure}; check `base_url`, `model` and the key in "
                f"{self._settings.api_key_variable}."
            ) from failure

    def reply(self, messages: Sequence[Message], seed: int) -> str:
        """See `Judge`."""
        del seed  # not every endpoint knows it
        settings = self._settings
        limits = {"temperature": settings.temperature, "max_tokens": settings.max_tokens}
        try:
            response: Any = self._client.chat.completions.create(
                model=settings.model,
                messages=list(messages),
                **{name: value for name, value in limits.items() if value is not None},
            )
        # A body that is not JSON arrives as a plain ValueError.
        except (self._openai.OpenAIError, ValueError) as error:
            raise JudgeFailure(self._reason(error)) from None
        try:
            content = response.choices[0].message.content
        except (AttributeError, TypeError, IndexError):  # an endpoint's own idea of a reply
            return ""
        return content if isinstance(content, str) else ""

    def _reason(self, error: Any) -> str:
        """What went wrong; a refused key may be quoted in the endpoint's own words."""
        status = error.status_code if isinstance(error, self._openai.APIStatusError) else None
        name = type(error).__name__ if status is None else f"{type(error).__name__} ({status})"
        if status in (401, 403):
            return name
        reason = f"{name}: {first_line(error)[:_MAX_REASON]}"
        return reason.replace(self._key, "...") if self._key else reason
