import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsg.errors import UserError
from dsg.lm.hooks import read_activations
from dsg.lm.tokens import encode_texts, pad_sequences
from dsg.selection.statistics import (
    FeatureStatistics,
    batch_statistics,
    collect_statistics,
    compact_sequences,
    corpus_batches,
)
from tests.helpers import HOOK_POINT, jumprelu_sae, standard_sae

TEXTS = ["w1 w2 w3", "w4", "w5 w6", "w7 w8 w9 w10", "w11 w12", "w13", "w14 w15 w16 w17 w18"]


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
def test_adding_equals_one_pass(split, num_tokens):
    generator = torch.Generator().manual_seed(num_tokens)
    acts = torch.randn(num_tokens, 3, generator=generator).relu()
    mask = torch.rand(num_tokens, generator=generator) > 0.2
    whole, first, second = (FeatureStatistics(3) for _ in range(3))
    whole.update(acts, mask, acts)
    first.update(acts[:split], mask[:split], acts[:split])
    second.update(acts[split:], mask[split:], acts[split:])
    first.add(second)
    assert first.num_tokens == whole.num_tokens
    assert torch.equal(first.num_fired, whole.num_fired)
    for name in ("sum", "sum_of_squares", "residual_norm_sum"):
        torch.testing.assert_close(
            getattr(first, name), getattr(whole, name), rtol=1e-14, atol=1e-14
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
        hand_made().add(FeatureStatistics(3))


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
    assert len(batches) == 2
    assert [len(batch.input_ids) for batch in batches[1:]] == [2]
    assert torch.equal(batches[-1].input_ids, batches[1].input_ids)


def test_a_vector_holds_everything_exactly():
    statistics = hand_made()
    statistics.num_tokens, statistics.num_fired[1] = 2**40 + 1, 2**40 - 1
    found = FeatureStatistics.from_vector(statistics.to_vector())
    assert (found.num_tokens, found.num_fired.tolist()) == (2**40 + 1, [2, 2**40 - 1])
    assert found.num_fired.dtype == torch.int64
    for name in ("sum", "sum_of_squares", "residual_norm_sum"):
        assert torch.equal(getattr(found, name), getattr(statistics, name))


def test_collecting_adds_the_statistics_of_each_batch(model, tokenizer):
    sae = standard_sae()
    batches = list(corpus_batches(tokenizer, TEXTS, None, 3))
    expected = FeatureStatistics(24)
    for batch in batches:
        h = read_activations(model, HOOK_POINT, batch)
        part = FeatureStatistics(24)
        part.update(sae.encode(h[batch.token_mask]), torch.ones(h[batch.token_mask].shape[0]) > 0)
        expected.add(part)
    found = collect_statistics(model, sae, HOOK_POINT, iter(batches))
    assert found.num_tokens == sum(len(text.split()) for text in TEXTS)
    for name in ("sum", "sum_of_squares", "num_fired"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


def test_a_part_of_the_features_gives_the_same_residual_norm(model, tokenizer):
    [batch] = corpus_batches(tokenizer, TEXTS * 60, None, 10**6)
    h, mask = read_activations(model, HOOK_POINT, batch), batch.token_mask
    assert mask.sum() > 1024
    some = FeatureStatistics(1)
    some.update(torch.zeros(*mask.shape, 1), mask, residual=h)
    everything = batch_statistics(model, standard_sae(), HOOK_POINT, batch)
    assert torch.equal(some.residual_norm_sum, everything.residual_norm_sum)


def test_memory_does_not_grow_with_the_text(model, tokenizer):
    def at_the_end(repetitions: int) -> int:
        def watched():
            yield from corpus_batches(tokenizer, TEXTS * repetitions, None, 4)
            found.append(tensor_bytes())

        found: list[int] = []
        collect_statistics(model, standard_sae(), HOOK_POINT, watched())
        return found[0]

    at_the_end(1)  # whatever is made once and kept
    assert at_the_end(200) == at_the_end(20)


def tensor_bytes() -> int:
    """Bytes of all living tensors, without the stand-ins that compilation leaves behind."""
    gc.collect()
    storages = {
        found.untyped_storage().data_ptr(): found.untyped_storage().nbytes()
        for found in gc.get_objects()
        if type(found) in (torch.Tensor, torch.nn.Parameter)
    }
    return sum(storages.values())


def test_activations_that_are_not_finite(model, tokenizer):
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"activations at .* must be finite, got nan"):
        collect_statistics(
            model, standard_sae(), HOOK_POINT, corpus_batches(tokenizer, TEXTS, None, 4)
        )


def test_sequences_are_kept_compactly_whatever_their_number(tokenizer):
    texts = [f"w{index % 26} w{index % 7}" for index in range(600)]
    sequences = compact_sequences(tokenizer, iter(texts), 2)
    assert [ids.tolist() for ids in sequences] == encode_texts(tokenizer, texts, 2)
    assert {ids.dtype.itemsize for ids in sequences} == {4}
