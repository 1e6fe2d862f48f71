import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsg.errors import UserError
from dsg.hooks import read_activations
from dsg.statistics import FeatureStatistics, collect_statistics, corpus_batches
from dsg.tokens import pad_sequences
from tests.helpers import HOOK_POINT, jumprelu_sae, standard_sae


def hand_made():
    statistics = FeatureStatistics(2)
    acts = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [9.0, 9.0]]])
    mask = torch.tensor([[True, True, False]])
    residual = torch.tensor([[[3.0, 4.0], [0.0, 1.0], [7.0, 7.0]]])
    statistics.update(acts, mask, residual)
    return statistics


def test_hand_computed_scores():
    statistics = hand_made()
    assert statistics.num_tokens == 2
    assert statistics.score("mean_square").tolist() == [5.0, 0.0]
    assert statistics.score("squared_mean").tolist() == [4.0, 0.0]
    assert statistics.frequency().tolist() == [1.0, 0.0]
    assert statistics.mean_residual_norm() == 3.0
    assert statistics.score().dtype == torch.float64


def test_uncounted_tokens_may_hold_anything():
    statistics = FeatureStatistics(1)
    statistics.update(torch.tensor([[[2.0], [torch.nan]]]), torch.tensor([[True, False]]))
    assert statistics.score().tolist() == [4.0]


@given(st.integers(0, 6), st.integers(1, 7))
def test_merge_equals_one_pass(split, num_tokens):
    generator = torch.Generator().manual_seed(num_tokens)
    acts = torch.randn(num_tokens, 3, generator=generator).relu()
    mask = torch.rand(num_tokens, generator=generator) > 0.2
    whole, first, second = (FeatureStatistics(3) for _ in range(3))
    whole.update(acts, mask, acts)
    first.update(acts[:split], mask[:split], acts[:split])
    second.update(acts[split:], mask[split:], acts[split:])
    merged = first.merge(second)
    assert merged.num_tokens == whole.num_tokens
    assert torch.equal(merged.num_fired, whole.num_fired)
    for name in ("sum", "sum_of_squares", "residual_norm_sum"):
        torch.testing.assert_close(
            getattr(merged, name), getattr(whole, name), rtol=1e-14, atol=1e-14
        )


def test_sums_are_accumulated_in_float64():
    statistics = FeatureStatistics(1)
    statistics.update(torch.tensor([[2.0**13]]), torch.tensor([True]))
    statistics.update(torch.ones(3, 1), torch.ones(3, dtype=torch.bool))
    # float32 would lose the ones beside 2**26.
    assert statistics.sum_of_squares.item() == 2.0**26 + 3


def test_errors_are_sentences():
    with pytest.raises(UserError, match="at least one counted token, got none"):
        FeatureStatistics(2).score()
    with pytest.raises(UserError, match="`importance` must be 'mean_square'"):
        hand_made().score("mean")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="got 2 and 3 features"):
        hand_made().merge(FeatureStatistics(3))


@pytest.mark.parametrize("side", ["left", "right"])
def test_collect_equals_brute_force_per_sequence(model, side):
    sae = jumprelu_sae()
    sequences = [[2, 5, 6, 7, 8], [2, 9, 1], [2, 20, 21, 22]]
    batch = pad_sequences(sequences, 0, [0, 1, 2], side)
    collected = collect_statistics(model, sae, HOOK_POINT, [batch])

    rows = []
    for ids in sequences:
        alone = pad_sequences([ids], 0, [0, 1, 2])
        h = read_activations(model, HOOK_POINT, alone)[0]
        rows.append(h[[i for i, token in enumerate(ids) if token > 2]])
    h = torch.cat(rows).double()
    z = sae.double().encode(h)
    assert collected.num_tokens == 8
    torch.testing.assert_close(collected.score(), z.square().mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(collected.frequency(), (z > 0).double().mean(0))
    assert collected.mean_residual_norm() == pytest.approx(h.norm(dim=-1).mean().item(), rel=1e-5)


def test_collect_refuses_an_sae_of_another_width(model):
    with pytest.raises(UserError, match="residual width 16, got 8"):
        collect_statistics(model, standard_sae(d_in=8), HOOK_POINT, [])


def test_corpus_batches_hold_every_text_once_by_length(tokenizer):
    batches = corpus_batches(tokenizer, ["w0 w1 w2", "w3", "w4 w5", "w6"], 3, 2)
    assert [batch.input_ids.tolist() for batch in batches] == [
        [[2, 7], [2, 10]],
        [[2, 4, 5], [2, 8, 9]],
    ]
