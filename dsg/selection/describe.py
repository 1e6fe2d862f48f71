"""What selected features stand for: tokens that excite them, tokens that they promote."""

import heapq
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dsg.lm import read_activations, unwrap
from dsg.sae import slice_features
from dsg.selection.rules import Selection
from dsg.selection.statistics import corpus_batches


def describe_features(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: SAE,
    selection: Selection,
    texts: Iterable[str],
    *,
    hook_point: str,
    num_contexts: int = 4,
    num_promoted: int = 8,
    context_tokens: int = 8,
    max_length: int = 256,
    batch_size: int = 32,
) -> list[dict[str, Any]]:
    """Describe each selected feature by its strongest tokens and the tokens that it promotes.

    Args:
        model: The unguarded model; detach guards before.
        tokenizer: Its tokenizer.
        sae: The autoencoder from which the features were selected.
        selection: Features to describe, with their scores.
        texts: Where to look for strong activations; one context at most from each text.
        hook_point: Where the autoencoder reads.
        num_contexts: Contexts per feature, strongest first; a feature that never fires has none.
        num_promoted: Tokens per feature whose logit the decoder row raises most, read directly
            through the unembedding (final norm left out). A negative clamp value lowers them.
        context_tokens: Tokens shown on either side.
        max_length: Tokens per text.
        batch_size: Texts per forward pass.

    Returns:
        One description per feature, in the order of the selection: `feature_id`, `forget_score`,
        `ratio` (None for rules that look at no retain text), `promoted` tokens, and `contexts` of
        `before`, `token`, `after` and `activation`.
    """
    features = slice_features(sae, selection.feature_ids)
    # One list per feature of (activation, -number of the text, its token ids, position); the
    # number settles ties in favour of the earlier text.
    strongest: list[list[tuple[float, int, list[int], int]]] = [[] for _ in selection.feature_ids]
    num_seen = 0
    for batch in corpus_batches(tokenizer, texts, max_length, batch_size):
        acts = features.encode(read_activations(model, hook_point, batch))
        acts = acts.masked_fill(~batch.token_mask.to(acts.device)[..., None], 0.0)
        # [features, batch]: each text's strongest activation and where it is.
        values, positions = (largest.T.tolist() for largest in acts.max(dim=1))
        rows = batch.input_ids.tolist()
        for index, contexts in enumerate(strongest):
            contexts += [
                (values[index][row], -(num_seen + row), ids, positions[index][row])
                for row, ids in enumerate(rows)
                if values[index][row] > 0
            ]
            contexts[:] = heapq.nlargest(num_contexts, contexts)
        num_seen += len(rows)
    promoted = _promoted_tokens(model, tokenizer, features.W_dec, num_promoted)
    ratios = selection.ratios or (None,) * len(selection.feature_ids)
    return [
        {
            "feature_id": selection.feature_ids[index],
            "forget_score": selection.forget_scores[index],
            "ratio": ratios[index],
            "contexts": [
                _context(tokenizer, ids, position, activation, context_tokens)
                for activation, _, ids, position in strongest[index]
            ],
            "promoted": promoted[index],
        }
        for index in range(len(selection.feature_ids))
    ]


def _promoted_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    decoder_rows: Float[Tensor, "features d_in"],
    count: int,
) -> list[list[str]]:
    with torch.no_grad():
        unembedding = unwrap(model).get_output_embeddings().weight  # pyright: ignore
        logits = decoder_rows.to(unembedding) @ unembedding.T
        top = logits.topk(min(count, logits.shape[-1])).indices.tolist()
    return [[str(tokenizer.decode([token_id])) for token_id in row] for row in top]


def _context(
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    position: int,
    activation: float,
    width: int,
) -> dict[str, Any]:
    """Split the decoded neighbourhood at the token, keeping the spaces between the parts."""
    start, end = max(0, position - width), position + width + 1
    ends = (position, position + 1, end)
    before, upto, whole = (
        str(tokenizer.decode(ids[start:stop], skip_special_tokens=True)) for stop in ends
    )
    token, after = upto[len(before) :], whole[len(upto) :]
    return {"before": before, "token": token, "after": after, "activation": activation}
