import torch

from dsg.selection.describe import describe_features
from dsg.selection.rules import Selection
from tests.helpers import identity_sae, tiny_model, tiny_tokenizer

HOOK = "blocks.1.hook_resid_post"
TEXTS = ["w1 w2 w3 w4 w5", "w6 w7", "w2 w2 w8 w9 w10 w11"]


def describe(ids, **options):
    tokenizer, model, sae = tiny_tokenizer(), tiny_model(), identity_sae()
    selection = Selection(tuple(ids), tuple(0.5 for _ in ids), tuple(9.0 for _ in ids))
    return (
        tokenizer,
        model,
        describe_features(model, tokenizer, sae, selection, TEXTS, hook_point=HOOK, **options),
    )


def residuals(model, tokenizer, text):
    """Word tokens and the layer's output on them, without the leading bos."""
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states[2][0, 1:]
    return text.split(), states


def test_contexts_are_the_strongest_counted_token_of_each_text():
    tokenizer, model, (described,) = describe([3], num_contexts=2, context_tokens=1)
    expected = []
    for text in TEXTS:
        words, states = residuals(model, tokenizer, text)
        strength, position = states[:, 3].max(dim=0)
        if strength > 0:
            expected.append((float(strength), words, int(position)))
    expected.sort(reverse=True, key=lambda item: item[0])
    assert len(described["contexts"]) == min(2, len(expected)) > 0
    for context, (strength, words, position) in zip(described["contexts"], expected, strict=False):
        assert abs(context["activation"] - strength) < 1e-5
        assert context["token"].strip() == words[position]
        neighbours = words[max(0, position - 1) : position + 2]
        assert "".join(context[part] for part in ("before", "token", "after")).split() == neighbours


def test_promoted_tokens_are_the_largest_rows_of_the_unembedding():
    tokenizer, model, described = describe([0, 5], num_promoted=3)
    for feature, coordinate in zip(described, (0, 5), strict=True):
        # The decoder row of feature j is the j-th unit vector: the logit is column j.
        column = model.lm_head.weight[:, coordinate].tolist()
        best = sorted(range(len(column)), key=lambda token: -column[token])[:3]
        assert feature["promoted"] == [tokenizer.decode([token]) for token in best]


def test_scores_come_from_the_selection_and_padding_changes_nothing():
    _, _, together = describe([2, 3], batch_size=3)
    _, _, alone = describe([2, 3], batch_size=1)
    for first, second in zip(together, alone, strict=True):
        assert (first["forget_score"], first["ratio"]) == (0.5, 9.0)
        assert first["feature_id"] == second["feature_id"]
        parts = [
            [{**context, "activation": None} for context in described["contexts"]]
            for described in (first, second)
        ]
        assert parts[0] == parts[1]


def test_a_selection_without_ratios_and_a_silent_feature():
    model, sae = tiny_model(), identity_sae()
    sae.b_enc.data[4] = -1e6
    (described,) = describe_features(
        model, tiny_tokenizer(), sae, Selection((4,), (0.1,), ()), TEXTS, hook_point=HOOK
    )
    assert described["ratio"] is None
    assert described["contexts"] == []
