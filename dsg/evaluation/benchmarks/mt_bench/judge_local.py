"""A Hugging Face model on this machine as the judge."""

from collections.abc import Sequence
from typing import Any

import torch

from dsg.errors import UserError
from dsg.evaluation.benchmarks.mt_bench.judge import JudgeSettings
from dsg.evaluation.benchmarks.mt_bench.prompts import Message
from dsg.io import first_line, parse_name
from dsg.lm import load_causal_lm

_MAX_TOKENS = 2048  # of a judgement, where the settings leave it open


class LocalJudge:
    """Asks a Hugging Face model, which is loaded with the first question.

    Args:
        settings: Which model. A temperature of None or 0 takes the most probable words.
    """

    concurrency = 1

    def __init__(self, settings: JudgeSettings) -> None:
        self._settings = settings
        self._name, revision = parse_name(settings.model)
        self._options: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": False}
        self._loaded: tuple[Any, Any] | None = None

    def check(self) -> None:
        """Find the model's configuration and its tokenizer."""
        from transformers import AutoConfig

        try:
            AutoConfig.from_pretrained(self._name, **self._options)
            tokenizer = self._tokenizer()
        except (OSError, ValueError) as error:
            raise UserError(
                f"`model` of a local judge must be a Hugging Face folder or hub name, got "
                f"{self._settings.model!r} ({first_line(error)}); check the spelling and that you "
                "may read it."
            ) from error
        if not tokenizer.chat_template:
            raise UserError(
                "`model` of a local judge must have a chat template, got "
                f"{self._settings.model!r} without; take an instruction-tuned model."
            )

    @torch.no_grad()
    def reply(self, messages: Sequence[Message], seed: int) -> str:
        """See `Judge`."""
        model, tokenizer = self._load()
        inputs = tokenizer.apply_chat_template(
            _without_system(messages),
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        ).to(model.device)
        temperature = self._settings.temperature
        drawn = {"do_sample": True, "temperature": temperature} if temperature else {}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            output = model.generate(
                **inputs,
                **{"do_sample": False, **drawn},
                max_new_tokens=self._settings.max_tokens or _MAX_TOKENS,
            )
        return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            model = load_causal_lm(self._settings.model, dtype="auto")
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self._loaded = model.eval().requires_grad_(False).to(device), self._tokenizer()
        return self._loaded

    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._name, **self._options)


def _without_system(messages: Sequence[Message]) -> list[Message]:
    """The system message joined to the user's first one: not every template has that role."""
    if messages[0]["role"] != "system":
        return list(messages)
    system, user, *rest = messages
    return [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *rest]
