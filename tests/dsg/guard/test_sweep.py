import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsg.errors import UserError
from dsg.guard.gate import CusumGate, DensityGate, WindowGate
from dsg.guard.sweep import FirstFiring, sweep
from dsg.lm.hooks import read_activations
from dsg.sae.loading import slice_features
from dsg.selection.calibration import calibrate_threshold
from dsg.selection.rules import select_fisher_ratio, select_frequency
from dsg.selection.statistics import collect_statistics, corpus_batches
from tests.helpers import HOOK_POINT, standard_sae
from tests.lightning_modules.toy import texts


def random_texts(seed: int, num_texts: int, num_features: int):
    """Activity [texts, seq, k] and counted tokens, one text without any."""
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(num_texts, 9, num_features, generator=generator) < 0.15
    counted = torch.rand(num_texts, 9, generator=generator) < 0.7
    counted[0] = False
    return active, counted


def ranks_of(active, counted, order=None, batch_size=4) -> FirstFiring:
    found = FirstFiring(active.shape[-1])
    order = torch.arange(len(active)) if order is None else order
    for ids in order.split(batch_size):
        found.update(ids, active[ids], counted[ids])
    return found


def densities_the_long_way(active, counted, num_features) -> list[float]:
    found = []
    for rows, mask in zip(active.tolist(), counted.tolist(), strict=True):
        tokens = [row for row, is_counted in zip(rows, mask, strict=True) if is_counted]
        fired = sum(any(row[:num_features]) for row in tokens)
        found.append(fired / len(tokens) if tokens else 0.0)
    return found


@given(st.integers(0, 1000), st.integers(1, 14), st.integers(1, 6), st.floats(0, 100))
@settings(max_examples=30, deadline=None)
def test_one_pass_gives_numpys_percentile_for_every_number_of_features(
    seed, num_texts, num_features, percentile
):
    active, counted = random_texts(seed, num_texts, num_features)
    ranks = ranks_of(active, counted, torch.randperm(num_texts))
    for n in range(1, num_features + 1):
        expected = densities_the_long_way(active, counted, n)
        assert ranks.densities(n).tolist() == expected
        threshold = calibrate_threshold(ranks.densities(n), percentile)
        assert threshold == np.percentile(expected, percentile)


def test_sweep_against_counting():
    calibration, heldout, forget = (random_texts(seed, 21, 5) for seed in (1, 2, 3))
    points = sweep(*(ranks_of(*found) for found in (calibration, heldout, forget)), 80.0)
    assert [point.num_features for point in points] == [1, 2, 3, 4, 5]
    for point in points:
        n = point.num_features
        threshold = np.percentile(densities_the_long_way(*calibration, n), 80.0)
        assert point.threshold == threshold
        for rate, found in (
            (point.false_positive_rate, heldout),
            (point.forget_trigger_rate, forget),
        ):
            above = [rho > threshold for rho in densities_the_long_way(*found, n)]
            assert (rate.value, rate.n) == (sum(above) / 21, 21)
    assert len({point.threshold for point in points}) > 2


@pytest.mark.parametrize("gate", [DensityGate(0.5), WindowGate(0.5, 3), CusumGate(0.5, 0.3)])
def test_other_gates_see_the_tokens_in_their_order(gate):
    active, counted = random_texts(0, 7, 5)
    ranks = ranks_of(active, counted, batch_size=3)
    for n in (1, 3, 5):
        fired = active[..., :n] & counted[..., None]
        followed, _ = gate.follow(fired, counted, gate.start(7, torch.device("cpu")))
        assert torch.equal(ranks.statistics(gate, n), followed[:, -1])


def test_a_smaller_selection_is_the_beginning_of_a_larger_one(model, tokenizer):
    sae = standard_sae()
    forget, retain = (
        collect_statistics(model, sae, HOOK_POINT, corpus_batches(tokenizer, found, None, 8))
        for found in (texts(20, 0, 0, 10), texts(20, 1, 8, 26))
    )
    calibration = list(corpus_batches(tokenizer, texts(15, 2, 8, 26), None, 4))
    for select, argument in ((select_fisher_ratio, 50.0), (select_frequency, 0.6)):
        ids = select(forget, retain, 6, argument).feature_ids
        assert len(ids) == 6
        ranks = FirstFiring(6)
        first_id = 0
        for batch in calibration:
            acts = slice_features(sae, ids).encode(read_activations(model, HOOK_POINT, batch))
            ranks.update(torch.arange(len(acts)) + first_id, acts > 0, batch.token_mask)
            first_id += len(acts)
        for n in range(1, 7):
            fewer = select(forget, retain, n, argument).feature_ids
            assert fewer == ids[:n]
            expected = []
            for batch in calibration:
                h = read_activations(model, HOOK_POINT, batch)
                fired = (slice_features(sae, fewer).encode(h) > 0).any(-1).numpy()
                mask = batch.token_mask.numpy()
                expected += [row[kept].mean() for row, kept in zip(fired, mask, strict=True)]
            assert ranks.densities(n).tolist() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(("num_features", "bytes_per_token"), [(255, 1), (256, 2)])
def test_memory_is_one_small_integer_per_counted_token(num_features, bytes_per_token):
    active, counted = random_texts(0, 40, num_features)
    ranks = ranks_of(active, counted)
    num_bytes = sum(part.nbytes for part in ranks.packed())
    assert num_bytes == bytes_per_token * int(counted.sum()) + 16 * 40
    quiet = FirstFiring(num_features)
    quiet.update(torch.arange(40), torch.zeros_like(active), counted)
    assert not quiet.densities().any()


@pytest.mark.parametrize("num_features", [3, 300])
def test_packed_parts_arrive_whole(num_features):
    active, counted = random_texts(5, 9, num_features)
    active[..., :-1] = False  # only the last rank, the largest number, ever occurs
    whole = ranks_of(active, counted)
    merged = FirstFiring(num_features)
    for ids in (torch.tensor([7, 1, 4, 0]), torch.tensor([], dtype=torch.long), [2, 3, 5, 6, 8]):
        ids = torch.as_tensor(ids)
        merged.add_packed(*ranks_of(active, counted, ids).packed())
    assert torch.equal(merged.densities(), whole.densities())
    assert merged.densities().any()
    assert not merged.densities(num_features - 1).any()


def test_no_text_has_no_density():
    assert FirstFiring(2).densities().shape == (0,)
    assert FirstFiring(2).statistics(WindowGate(0.5, 2)).shape == (0,)
    with pytest.raises(UserError, match="`densities` must be finite and at least one, got 0"):
        sweep(FirstFiring(2), FirstFiring(2), FirstFiring(2))


def test_errors():
    with pytest.raises(UserError, match="`num_features` must be at least 1, got 0"):
        FirstFiring(0)
    ranks = ranks_of(*random_texts(0, 3, 2))
    for n in (0, 3):
        with pytest.raises(UserError, match=rf"must be in \[1, 2\].* got {n}"):
            ranks.densities(n)
    ranks.add_packed(*ranks_of(*random_texts(0, 3, 2)).packed())
    with pytest.raises(RuntimeError, match="every text must come exactly once, got 6 values of 3"):
        ranks.densities()
