"""Text as training rows."""

import itertools
from types import SimpleNamespace

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules.parts.loading import Pairs, Rows, training_loader
from datamodules.parts.training_text import (
    TrainingRow,
    answer_rows,
    running_rows,
    word_pieces,
)
from dsg.errors import UserError
from tests.helpers import BOS, EOS, tiny_tokenizer
from tests.lightning_modules.toy import make_trainer


def words(*numbers):
    return " ".join(f"w{number}" for number in numbers)


def test_texts_are_cut_after_so_many_words_and_keep_their_spacing():
    assert word_pieces(["a b\n\nc  d e", " \n", "f"], 2) == ["a b", "c  d", "e", "f"]
    assert word_pieces(["a b\n\nc"], 3) == ["a b\n\nc"]


def test_running_text_is_cut_into_pieces_that_begin_like_texts(tokenizer):
    rows = running_rows(tokenizer, [words(*range(7)), words(9)], 4)
    assert [row.ids for row in rows] == [
        [BOS, 4, 5, 6],
        [BOS, 7, 8, 9],
        [BOS, 10],
        [BOS, 13],
    ]
    assert {row.num_given for row in rows} == {None}


def test_a_tokenizer_without_bos_gets_none():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    rows = running_rows(tokenizer, [words(0, 1, 2)], 2)
    assert [row.ids for row in rows] == [[4, 5], [6]]


def test_a_piece_must_have_room_for_a_token(tokenizer):
    with pytest.raises(UserError, match="`max_length` must be at least 2 tokens, got 1"):
        running_rows(tokenizer, ["w1"], 1)


def test_answers_are_learnt_with_their_end_and_prompts_are_not(tokenizer):
    rows = answer_rows(tokenizer, [("w0 w1", " w2 w3"), ("w4", " w5")], 10)
    assert rows == [TrainingRow([BOS, 4, 5, 6, 7, EOS], 3), TrainingRow([BOS, 8, 9, EOS], 2)]
    [batch] = training_loader(tokenizer, Rows(rows), 2, 0, None)
    by_length = batch.attention_mask.sum(1).argsort(descending=True)
    assert batch.token_mask[by_length].int().tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0]]
    assert batch.attention_mask[by_length].tolist() == [[1] * 6, [1, 1, 1, 1, 0, 0]]


def test_an_answer_must_fit(tokenizer):
    assert answer_rows(tokenizer, [("w0 w1", " w2 w3")], 4)[0].ids == [BOS, 4, 5, 6]
    with pytest.raises(UserError, match="room for an answer, got 3 tokens for a prompt of 3"):
        answer_rows(tokenizer, [("w0 w1", " w2 w3")], 3)


def test_a_tokenizer_may_merge_prompt_and_answer(tokenizer):
    """Without a separator the last word of the prompt grows: it is learnt as well."""
    rows = answer_rows(tokenizer, [("w0 w1", "2 w3")], 10)
    assert rows == [TrainingRow([BOS, 4, 16, 7, EOS], 2)]  # <bos> w0 w12 w3 <eos>


def test_training_batches_hold_every_row_once_in_an_order_of_the_seed(tokenizer):
    rows = [TrainingRow([BOS, 4 + number]) for number in range(7)]

    def order(seed):
        batches = list(training_loader(tokenizer, Rows(rows), 3, seed, None))
        assert [len(batch.input_ids) for batch in batches] == [3, 3, 1]
        return torch.cat([batch.input_ids[:, 1] for batch in batches]).tolist()

    assert sorted(order(0)) == list(range(4, 11))
    assert order(0) == order(0) != order(1)
    [first, *_] = training_loader(tokenizer, Rows(rows), 3, 0, None)
    assert first.token_mask.int().tolist() == [[0, 1]] * 3


def test_ranks_share_the_batches(tokenizer):
    rows = [TrainingRow([BOS, 4 + number]) for number in range(6)]
    parts = [
        training_loader(
            tokenizer, Rows(rows), 2, 0, SimpleNamespace(global_rank=rank, world_size=2)
        )
        for rank in (0, 1)
    ]
    # The third batch does not go round.
    assert [len(part) for part in parts] == [1, 1]
    seen = [batch.input_ids[:, 1].tolist() for part in parts for batch in part]
    assert len(set(itertools.chain(*seen))) == 4


def trainer_at(epoch=0, rank=0, world_size=1):
    module = SimpleNamespace(keeps_rest=False)
    return SimpleNamespace(
        global_rank=rank, world_size=world_size, current_epoch=epoch, lightning_module=module
    )


def retain_ids(loader):
    """The token that tells a retain row, batch after batch."""
    return [batch["retain"].input_ids[:, 1].tolist() for batch in loader]


def word_rows(num):
    return [TrainingRow([BOS, 4 + number]) for number in range(num)]


def word_pairs(num_forget, num_retain, **options):
    return Pairs(word_rows(num_forget), word_rows(num_retain), **options)


def test_fixed_pairs_keep_their_order_in_every_pass(tokenizer):
    text = Pairs(word_rows(5), word_rows(5)[::-1], fixed=True, passes=2)
    batches = list(training_loader(tokenizer, text, 2, 0, None))
    assert [batch["id"] for batch in batches] == list(range(6))
    assert [batch["forget"].input_ids[:, 1].tolist() for batch in batches] == [
        [4, 5],
        [6, 7],
        [8],
    ] * 2
    assert retain_ids(batches) == [[8, 7], [6, 5], [4]] * 2


@pytest.mark.parametrize("num_retain", [2, 5, 20])
def test_pairs_hold_every_forget_row_once_and_as_many_retain_rows(tokenizer, num_retain):
    batches = list(training_loader(tokenizer, word_pairs(5, num_retain), 2, 0, None))
    assert [batch["id"] for batch in batches] == [0, 1, 2]
    firsts = torch.cat([batch["forget"].input_ids[:, 1] for batch in batches])
    assert sorted(firsts.tolist()) == list(range(4, 9))
    partners = retain_ids(batches)
    assert [len(ids) for ids in partners] == [2, 2, 1]
    assert {*itertools.chain(*partners)} <= set(range(4, 4 + num_retain))


def test_retain_rows_are_drawn_anew_from_all_of_them_in_every_epoch(tokenizer):
    trainer = trainer_at()
    loader = training_loader(tokenizer, word_pairs(6, 20), 2, 0, trainer)
    epochs = []
    for trainer.current_epoch in range(40):
        epochs.append(list(itertools.chain(*retain_ids(loader))))
    # Of 240 draws one in 20 falls on each row: none is missed (chance 1e-4) or preferred.
    counts = torch.tensor(list(itertools.chain(*epochs))).bincount(minlength=24)[4:]
    assert counts.min() > 0
    assert counts.max() < 30
    assert len({tuple(ids) for ids in epochs}) == 40
    # The partners of one place differ too, so that no forget row keeps its own.
    assert all(len({ids[place] for ids in epochs}) > 10 for place in range(6))
    other = training_loader(tokenizer, word_pairs(6, 20), 2, 1, trainer_at())
    assert list(itertools.chain(*retain_ids(other))) != epochs[0]


@pytest.mark.parametrize("epoch", [0, 3])
def test_ranks_draw_the_pairs_of_one_process(tokenizer, epoch):
    def pairs(rank, world_size):
        trainer = trainer_at(epoch, rank, world_size)
        loader = training_loader(tokenizer, word_pairs(8, 20), 2, 0, trainer)
        return [(batch["forget"].input_ids.tolist(), *retain_ids([batch])) for batch in loader]

    parts = [pairs(rank, 2) for rank in range(2)]
    assert [parts[number % 2][number // 2] for number in range(4)] == pairs(0, 1)


class Watching(lightning.LightningModule):
    """Trains one number and notes the retain rows of each step."""

    keeps_rest = False

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        del batch_idx
        self.seen.append((self.trainer.current_epoch, *retain_ids([batch])))
        return self.weight**2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_resumed_run_draws_the_same_retain_rows(tokenizer, tmp_path):
    class PairData(lightning.LightningDataModule):
        def train_dataloader(self):
            return training_loader(tokenizer, word_pairs(5, 20), 2, 0, self.trainer)

    def seen(**options):
        module = Watching()
        trainer = make_trainer(tmp_path, max_epochs=3, **options)
        trainer.fit(module, PairData(), ckpt_path=checkpoint)
        return module.seen

    checkpoint = None
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = seen(callbacks=[saving], enable_checkpointing=True)
    assert [epoch for epoch, _ in whole] == [0] * 3 + [1] * 3 + [2] * 3
    for step in (2, 3, 4, 6):  # 3 and 6 are the last of an epoch
        checkpoint = tmp_path / f"step={step}.ckpt"
        assert seen() == whole[step:]


def test_a_batch_needs_a_row(tokenizer):
    with pytest.raises(UserError, match="`train_batch_size` must be at least 1, got 0"):
        training_loader(tokenizer, Rows([TrainingRow([BOS])]), 0, 0, None)
