"""Turns items into token batches."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from dsg.errors import UserError
from dsg.evaluation.items import Passage, PassageBatch, Prompt, PromptBatch, Question, QuestionBatch
from dsg.lm import (
    TokenBatch,
    encode_texts,
    padding_for,
    shared_prefix,
)

EncodedQuestion = tuple[int, list[list[int]]]


def question_collate(
    tokenizer: Any, encoded: dict[Question, EncodedQuestion] | None = None
) -> Callable[[Sequence[Question]], QuestionBatch]:
    """Make the function that turns questions of one protocol and option count into a batch.

    Args:
        tokenizer: Of the model.
        encoded: Results of `encode_question` so far; more are added. Every evaluation of a run
            scores the same questions again.
    """
    pad = padding_for(tokenizer)
    encoded = {} if encoded is None else encoded

    def collate(questions: Sequence[Question]) -> QuestionBatch:
        for question in questions:
            if question not in encoded:
                encoded[question] = encode_question(tokenizer, question)
        protocol, num_options = questions[0].protocol, len(questions[0].options)
        kinds = {(question.protocol, len(question.options)) for question in questions}
        if len(kinds) != 1:
            raise UserError(
                "`questions` of one batch must have the same protocol and equally many options, "
                f"got {sorted(kinds)}; batch them apart."
            )
        prompts, options = [], []
        for question in questions:
            num_prompt, rows = encoded[question]
            prompts.append(rows[0][:num_prompt])
            options += [row[num_prompt:] for row in rows]
        padded = pad(options)
        closed = torch.tensor([q.closed for q in questions for _ in q.options])  # [b * options]
        # A guard decides on the prompt alone, and nothing that is scored follows this token.
        scored = padded.token_mask | (last_places(padded) & closed[:, None])  # [b * options, seq]
        chars = [len(option.lstrip()) for question in questions for option in question.options]
        return QuestionBatch(
            # On the left, so that an option follows its prompt without a gap.
            prompts=pad(prompts, side="left"),
            options=replace(padded, token_mask=scored),
            ids=torch.tensor([question.id for question in questions]),
            answers=torch.tensor([question.answer for question in questions]),
            num_options=num_options,
            option_chars=torch.tensor(chars),
            protocol=protocol,
        )

    return collate


def passage_collate(
    tokenizer: Any, max_length: int | None = None
) -> Callable[[Sequence[Passage]], PassageBatch]:
    """Make the function that turns passages, cut to `max_length` tokens, into a batch."""
    pad = padding_for(tokenizer)

    def collate(passages: Sequence[Passage]) -> PassageBatch:
        encoded = encode_passages(tokenizer, passages, max_length)
        return PassageBatch(
            tokens=pad([ids for _, ids in encoded]),
            ids=torch.tensor([passage.id for passage in passages]),
            context_lengths=torch.tensor([length for length, _ in encoded]),
            closed=torch.tensor([passage.closed for passage in passages]),
        )

    return collate


def prompt_collate(tokenizer: Any) -> Callable[[Sequence[Prompt]], PromptBatch]:
    """Make the function that turns prompts with the same limits into a batch."""
    pad = padding_for(tokenizer)

    def collate(prompts: Sequence[Prompt]) -> PromptBatch:
        [(max_new_tokens, stop)] = {(prompt.max_new_tokens, prompt.stop) for prompt in prompts}
        rows = encode_texts(tokenizer, [prompt.text for prompt in prompts], None)
        for prompt, row in zip(prompts, rows, strict=True):
            _check_bos(tokenizer, row, f"prompt {prompt.id}")
        return PromptBatch(
            tokens=pad(rows, side="left"),
            ids=torch.tensor([prompt.id for prompt in prompts]),
            references=[_cut(tokenizer, prompt) for prompt in prompts],
            max_new_tokens=max_new_tokens,
            stop=stop,
            tokenizer=tokenizer,
        )

    return collate


def encode_question(tokenizer: Any, question: Question) -> EncodedQuestion:
    """Tokens of a question's prompt with each of its options.

    Prompt and option are tokenized as one text, because a tokenizer may merge across the boundary.
    What the prompt and all the options then share is the prompt. The protocol `dsg` asks for the
    letters' own tokens instead, even where the tokenizer would merge `(A`.

    Returns:
        Number of prompt tokens, and one token list per option.

    Raises:
        UserError: An option adds no token to the prompt, or there is more than one bos token.
    """
    texts = [question.prompt, *(question.prompt + option for option in question.options)]
    prompt, *rows = encode_texts(tokenizer, texts, None)
    _check_bos(tokenizer, prompt, f"question {question.id}")
    if question.closed:
        rows = [_closed(tokenizer, row) for row in rows]
    if question.protocol == "dsg":
        options = tokenizer(list(question.options), add_special_tokens=False, verbose=False)
        return len(prompt), [[*prompt, *ids] for ids in options["input_ids"]]
    num_prompt = min(shared_prefix(prompt, row) for row in rows)
    if any(len(row) <= num_prompt for row in rows) or num_prompt == 0:
        raise UserError(
            f"Question {question.id} needs a prompt and options that each add a token to it, got "
            f"prompt {question.prompt!r} and options {question.options}; reword it."
        )
    return num_prompt, rows


def encode_passages(
    tokenizer: Any, passages: Sequence[Passage], max_length: int | None
) -> list[tuple[int, list[int]]]:
    """Tokens of each passage after its context, and how many of them are the context's."""
    wholes = encode_texts(tokenizer, [p.context + p.text for p in passages], max_length)
    given = [passage for passage in passages if passage.context]
    contexts = iter(encode_texts(tokenizer, [passage.context for passage in given], None))
    return [
        (
            shared_prefix(next(contexts), whole) if passage.context else 0,
            _closed(tokenizer, whole)[:max_length] if passage.closed else whole,
        )
        for passage, whole in zip(passages, wholes, strict=True)
    ]


def last_places(batch: TokenBatch) -> Bool[Tensor, "b seq"]:
    """True at the last real token of each row of a batch that is padded on the right."""
    places = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
    return places == batch.attention_mask.sum(dim=1, keepdim=True) - 1


def _closed(tokenizer: Any, ids: list[int]) -> list[int]:
    """With one eos token at the end."""
    end = [tokenizer.eos_token_id]
    return ids if ids[-1:] == end else [*ids, *end]


def _cut(tokenizer: Any, prompt: Prompt) -> str:
    if prompt.max_reference_tokens is None:
        return prompt.reference
    # With the bos token, which counts: so the official code of MUSE cuts.
    [ids] = encode_texts(tokenizer, [prompt.reference], None)
    return tokenizer.decode(ids[: prompt.max_reference_tokens], skip_special_tokens=True)


def _check_bos(tokenizer: Any, ids: Sequence[int], what: str) -> None:
    """A chat template brings a bos token of its own, which must not come twice."""
    bos_id = tokenizer.bos_token_id
    if bos_id is not None and bos_id != tokenizer.eos_token_id and ids.count(bos_id) > 1:
        raise UserError(
            f"{what} must hold at most one bos token {tokenizer.bos_token!r}, got "
            f"{ids.count(bos_id)}; remove it from the text, the tokenizer adds its own."
        )
