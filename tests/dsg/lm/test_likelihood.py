import math

import pytest
import torch

from dsg.lm.likelihood import (
    mean_kl,
    mean_nll,
    mean_over_sequences,
    next_token_logits,
    sequence_nll,
    target_mask,
    token_nll,
)
from dsg.lm.tokens import TokenBatch
from tests.dsg.objectives.toys import (
    REFERENCE_TABLE,
    TABLE,
    TableModel,
    TableReference,
    hand_kls,
    mean,
    rows,
    token_batch,
    uncount,
)
from tests.helpers import BOS, random_ids, tiny_model

BATCH = token_batch([BOS, 3, 1, 4], [BOS, 4], [BOS])


def toy_logits(batch: TokenBatch) -> torch.Tensor:
    return next_token_logits(TableModel(TABLE), batch)


def test_tokens_and_sequences_by_hand():
    logits = toy_logits(BATCH)
    # P(3|bos) = 1/2, P(1|3) = 0.6, P(4|1) = 0.1; P(4|bos) = 0.1.
    probabilities = [0.5, 0.6, 0.1, 0.1]
    expected = [-math.log(p) for p in probabilities]
    assert token_nll(logits, BATCH).tolist() == pytest.approx(expected, rel=1e-6)
    assert mean_nll(logits, BATCH).item() == pytest.approx(mean(expected), rel=1e-6)
    sums, num_targets = sequence_nll(logits, BATCH)
    assert sums.tolist() == pytest.approx([-math.log(0.03), -math.log(0.1), 0.0], rel=1e-6)
    assert num_targets.tolist() == [3, 1, 0]


def test_a_sequence_without_a_target_does_not_enter_the_mean():
    mean_of = mean_over_sequences(torch.tensor([1.0, 5.0, 99.0]), torch.tensor([3, 1, 0]))
    assert mean_of.item() == 3.0


def test_kl_by_hand():
    logits, reference = toy_logits(BATCH), TableReference().logits(BATCH)
    sequences = ([BOS, 3, 1, 4], [BOS, 4])
    for temperature in (1.0, 2.0):
        expected = mean([kl for ids in sequences for kl in hand_kls(ids, temperature)])
        actual = mean_kl(reference, logits, BATCH, temperature)
        assert actual.item() == pytest.approx(expected, rel=1e-5)
    # The direction matters: KL(model || reference) is another number.
    swapped = [kl for ids in sequences for kl in hand_kls(ids, first=TABLE, second=REFERENCE_TABLE)]
    assert mean_kl(reference, logits, BATCH).item() != pytest.approx(mean(swapped), rel=1e-2)


def test_kl_is_zero_where_the_logits_agree_and_has_no_slope_there():
    logits = toy_logits(BATCH).detach().requires_grad_(True)
    divergence = mean_kl(logits.detach() + 5.0, logits, BATCH)
    assert divergence.item() == pytest.approx(0.0, abs=1e-7)
    assert mean_kl(logits.detach(), logits, BATCH).item() == 0.0
    (slope,) = torch.autograd.grad(divergence, logits)
    assert slope.abs().max() < 1e-6


@pytest.mark.parametrize("distance", [1e-3, 0.1, 10.0])
def test_kl_is_never_negative(distance):
    generator = torch.Generator().manual_seed(0)
    batch = token_batch([BOS, *([1, 3, 4] * 20)])
    shape = (*batch.input_ids.shape, 30_000)
    reference = 3 * torch.randn(shape, generator=generator)
    for _ in range(3):
        logits = reference + distance * torch.randn(shape, generator=generator)
        assert mean_kl(reference, logits, batch) > 0


def test_special_and_uncounted_tokens_are_never_targets():
    # A bos in the middle, a pad id inside the text, and one token that is declared uncounted.
    batch = uncount(token_batch([BOS, 3, 1, BOS, 4, 3]), 0, 4)
    assert target_mask(batch)[0].tolist() == [True, True, False, False, True]
    expected = [-math.log(p) for p in (0.5, 0.6, 0.15)]
    assert token_nll(toy_logits(batch), batch).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("sequence", [[3, 1, 4], [BOS, 3, 1]])
def test_left_padding_makes_no_token_a_target(sequence):
    long = [BOS, *([1] * 6)]
    left, right = (rows(token_batch(sequence, long, side=side), 0) for side in ("left", "right"))
    expected = token_nll(toy_logits(right), right)
    assert len(expected) == 2
    assert torch.equal(token_nll(toy_logits(left), left), expected)


def test_padding_order_and_batch_size_do_not_change_a_sequence():
    model = tiny_model()
    together = token_batch([BOS, *random_ids(1, 9)[0].tolist()], [BOS, 7, 8, 9], [BOS, 5])
    sums, num_targets = sequence_nll(next_token_logits(model, together), together)
    for index, length in enumerate((10, 4, 2)):
        alone = token_batch(together.input_ids[index, :length].tolist())
        one = sequence_nll(next_token_logits(model, alone), alone)
        torch.testing.assert_close(one.sums[0], sums[index])
        assert one.num_targets.tolist() == [num_targets[index].item()]
    flipped = rows(together, 2, 1, 0)
    backwards = sequence_nll(next_token_logits(model, flipped), flipped).sums
    torch.testing.assert_close(backwards.flip(0), sums)


def test_the_softmax_is_float32_whatever_the_logits_are():
    # Logits that bfloat16 holds exactly, but whose log-softmax it does not.
    logits = torch.tensor([[[4.0, 3.0, 2.5, 1.0, 0.5]] * 4], dtype=torch.bfloat16)
    batch = token_batch([BOS, 3, 1, 4])
    losses = token_nll(logits, batch)
    assert losses.dtype == torch.float32
    normaliser = math.log(sum(math.exp(z) for z in (4.0, 3.0, 2.5, 1.0, 0.5)))
    expected = [normaliser - z for z in (1.0, 3.0, 0.5)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-6)
    assert sequence_nll(logits, batch).sums.dtype == torch.float32
    assert mean_kl(logits + 1, logits, batch).dtype == torch.float32


def test_without_a_target_losses_and_gradients_are_zero():
    batch = token_batch([BOS], [BOS])
    logits = toy_logits(batch).detach().requires_grad_(True)
    loss = mean_nll(logits, batch) + mean_kl(torch.zeros_like(logits), logits, batch)
    sums, num_targets = sequence_nll(logits, batch)
    loss = loss + mean_over_sequences(sums, num_targets)
    assert loss.item() == 0.0
    (slope,) = torch.autograd.grad(loss, logits)
    assert slope.abs().max() == 0.0


def test_the_model_gets_the_attention_mask():
    model = TableModel(TABLE)
    next_token_logits(model, BATCH)
    assert torch.equal(model.attention_masks[0], BATCH.attention_mask)
