"""A guarded model for the tasks of lm-evaluation-harness; needs the extra `[lm-eval]`."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dsg.errors import UserError
from dsg.guard import Guard, GuardStack, guarded
from dsg.lm import pad_sequences, padding_id, uncounted_token_ids, unwrap

try:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import Collator
    from tqdm import tqdm
except ImportError as error:
    raise UserError(
        f"`dsg.GuardedLM` needs lm-evaluation-harness, but importing it failed ({error}); run "
        "pip install 'dynamic-sae-guardrails[lm-eval]'."
    ) from error

_log = logging.getLogger(__name__)

# The decorator that registers it hides its type.
_Base: Any = HFLM
# As the harness hands them down: context and continuation as text (None for a window of a rolling
# request), and their tokens.
Request = tuple[tuple[str, str] | None, list[int], list[int]]


class GuardedLM(_Base):
    """A model, with or without a guard, for `lm_eval.simple_evaluate(model=GuardedLM(...), ...)`.

    Each request is gated by itself. `loglikelihood`: the context is the prompt, which decides for
    all of the continuation; a context that the harness cuts decides as it was cut, and one without
    a counted token never triggers. `loglikelihood_rolling`: all of the text that the model reads at
    once decides about it. `generate_until`: the context decides, and what is generated extends the
    counts. Requests that are not triggered get the very numbers of `HFLM`, and so do all requests
    without a guard.

    Args:
        model: The causal LM, possibly wrapped by PEFT, on its device.
        tokenizer: The model's tokenizer; the harness gives it a pad token if it has none.
        guard: Attached while the model runs, and detached afterwards.
        options: Further arguments of `HFLM`, such as `batch_size` (1 by default) and `max_length`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        guard: Guard | GuardStack | None = None,
        **options: Any,
    ) -> None:
        # Before the harness chooses a pad token, which may be one that stands for a word.
        self._uncounted_ids = uncounted_token_ids(tokenizer)
        self._guard = guard
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", **options)

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Called by the harness where answers are to be cached.

        Raises:
            UserError: If there is a guard, of which the keys of the cache know nothing.
        """
        if self._guard is not None:
            raise UserError(
                "`use_cache` must be left out for a guarded model, got a cache, which would mix "
                "up the answers of different guards."
            )
        super().set_cache_hook(cache_hook)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes about the model, with the settings of its guards."""
        guards = self._guard.guards if isinstance(self._guard, GuardStack) else [self._guard]
        settings = [
            {
                "hook_point": guard.hook_point,
                "feature_ids": guard.feature_ids,
                "gate": guard.gate.kind,
                "threshold": guard.threshold,
                "edit": guard.edit.kind,
                "clamp_value": guard.clamp_value,
            }
            for guard in guards
            if guard is not None
        ]
        return {**super().get_model_info(), "guards": settings}

    def tok_batch_encode(
        self,
        strings: Sequence[str],
        padding_side: Literal["left", "right"] = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Tokens of several texts and their attention mask; the arguments are those of `HFLM`."""
        # One by one: the harness looks for a bos token in the first text of a batch only.
        encode = super().tok_batch_encode
        encoded = [encode([s], padding_side, left_truncate_len, truncation)[0] for s in strings]
        rows = [ids[0].tolist() for ids in encoded]
        pad_id = padding_id(self.tokenizer)
        batch = pad_sequences(rows, pad_id, self._uncounted_ids, side=padding_side)
        return batch.input_ids, batch.attention_mask

    def _model_generate(self, context: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with guarded(unwrap(self.model), self._guard, decision="prompt"):
            return super()._model_generate(context, *args, **kwargs)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if self._guard is None or not requests:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        self._check_lengths(requests)
        # Continuations that differ in the last token only share a pass, as in the harness; but it
        # does not look where a context ends, which matters to a guard.
        sharing: dict[Any, list[int]] = {}
        for place, (_, context, rest) in enumerate(requests):
            sharing.setdefault((tuple(context), tuple(rest[:-1])), []).append(place)
        groups = sorted(sharing.values(), key=lambda places: _order(requests[places[0]]))
        passes = [requests[places[0]] for places in groups]
        size, find_size = override_bs or self.batch_size, None
        if size == "auto":
            self.batch_sizes, size, find_size = {}, 0, self._batch_scheduler
        rule = "sequence" if requests[0][0] is None else "prompt"
        scores: dict[int, tuple[float, bool]] = {}
        waiting = iter(groups)
        progress = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0)
        with self._guard.attached(self.model, rule, "frozen"):
            for chunk in Collator.get_chunks(passes, n=size, fn=find_size):
                for log_probs in self._continuation_log_probs(chunk):
                    places = next(waiting)
                    scores |= {place: _score(log_probs, requests[place][2]) for place in places}
                    progress.update(len(places))
        progress.close()
        return [scores[place] for place in range(len(requests))]

    @torch.no_grad()
    def _continuation_log_probs(
        self, chunk: Sequence[Request]
    ) -> Iterator[Float[Tensor, "tokens vocab"]]:
        """Log-probabilities at each request's continuation, from one guarded pass."""
        rows = [(context + rest)[-(self.max_length + 1) :][:-1] for _, context, rest in chunk]
        # Zeros on the right and no attention mask, as in the harness, so that a request that is not
        # triggered keeps its very numbers.
        batch = pad_sequences(rows, 0, self._uncounted_ids).to(self.device)
        # The continuation's last token is not read.
        prompts = [
            len(row) - (len(rest) - 1) for row, (_, _, rest) in zip(rows, chunk, strict=True)
        ]
        places = torch.arange(batch.input_ids.shape[1], device=self.device)
        ends = torch.tensor(prompts, device=self.device)
        with torch.autocast(
            self.device.type, self.mixed_precision_dtype, enabled=bool(self.mixed_precision_dtype)
        ):
            logits = self.model(
                batch.input_ids,
                token_mask=batch.token_mask,
                prompt_mask=places < ends[:, None],
                use_cache=False,
            ).logits
        for row, prompt, ids in zip(logits, prompts, rows, strict=True):
            yield F.log_softmax(row[prompt - 1 : len(ids)], dim=-1, dtype=self.softmax_dtype)

    def _check_lengths(self, requests: Sequence[Request]) -> None:
        empty = sum(not rest for _, _, rest in requests)
        longest = max(len(rest) for _, _, rest in requests)
        if empty or longest > self.max_length:
            raise UserError(
                f"each continuation must have 1 to {self.max_length} tokens, as many as the model "
                f"takes, got {empty} without any and a longest of {longest}; shorten it or raise "
                "`max_length`."
            )
        num_cut = sum(
            len(context) + len(rest) > self.max_length + 1 for _, context, rest in requests
        )
        if num_cut:
            _log.warning(
                "%d of %d requests are longer than the model's %d tokens; their contexts are cut "
                "on the left.",
                *(num_cut, len(requests), self.max_length),
            )


def _order(request: Request) -> tuple[int, list[int]]:
    """The harness's order, in which batches are formed: longest first."""
    tokens = request[1] + request[2]
    return -len(tokens), tokens


def _score(
    log_probs: Float[Tensor, "tokens vocab"], continuation: Sequence[int]
) -> tuple[float, bool]:
    """Log-probability of a continuation, and whether greedy decoding would give it."""
    tokens = torch.tensor(continuation, device=log_probs.device)
    greedy = bool((log_probs.argmax(dim=-1) == tokens).all())
    return float(log_probs.gather(1, tokens[:, None])[:, 0].sum()), greedy
