import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsg.errors import UserError
from dsg.lm.tokens import (
    count_mask,
    encode_texts,
    length_batches,
    pad_sequences,
    padding_id,
    uncounted_token_ids,
)
from tests.helpers import BOS, EOS, PAD, UNK, tiny_tokenizer


def test_uncounted_ids_hold_roles_and_control_tokens_but_not_unk():
    tokenizer = tiny_tokenizer(extra=("<user>", "<model>"))
    control = tokenizer.convert_tokens_to_ids(["<user>", "<model>"])
    assert uncounted_token_ids(tokenizer) == sorted([PAD, EOS, BOS, *control])


def test_ordinary_added_words_count():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["newword"])
    assert uncounted_token_ids(tokenizer) == [PAD, EOS, BOS]


def test_unk_is_uncounted_when_it_is_also_pad():
    assert uncounted_token_ids(tiny_tokenizer(pad_token="<unk>")) == [EOS, BOS, UNK]


def test_unk_counts_in_a_text(tokenizer):
    ids = torch.tensor(encode_texts(tokenizer, ["w0 nonsense w1"], None))
    assert ids.tolist() == [[BOS, 4, UNK, 5]]
    mask = count_mask(ids, None, uncounted_token_ids(tokenizer), PAD)
    assert mask.tolist() == [[False, True, True, True]]


def test_without_attention_mask_only_outer_pads_are_padding():
    ids = torch.tensor([[0, 0, 5, 0, 6, 0], [5, 6, 7, 0, 7, 8], [0, 0, 0, 0, 0, 0]])
    # pad id deliberately not among the uncounted ids: inside a text it is an ordinary token.
    assert count_mask(ids, None, [], 0).tolist() == [
        [False, False, True, True, True, False],
        [True] * 6,
        [False] * 6,
    ]


def test_attention_mask_decides_about_padding_and_ids_about_the_rest():
    ids = torch.tensor([[0, 2, 5, 0, 1]])
    mask = torch.tensor([[0, 1, 1, 1, 1]])
    assert count_mask(ids, mask, [1, 2], 0).tolist() == [[False, False, True, True, False]]


def test_no_pad_id_means_no_padding():
    assert count_mask(torch.tensor([[0, 4, 0]]), None, [], None).all()


def test_encode_texts_cuts_on_the_right_and_keeps_bos(tokenizer):
    assert encode_texts(tokenizer, ["w0 w1 w2", "w3"], 3) == [[BOS, 4, 5], [BOS, 7]]
    assert encode_texts(tokenizer, [], 3) == []


def test_encode_texts_refuses_a_second_bos(tokenizer):
    with pytest.raises(UserError, match="text 1 must begin with at most one bos token '<bos>'"):
        encode_texts(tokenizer, ["w0", "<bos> w1"], None)


def test_encode_texts_refuses_an_empty_length(tokenizer):
    with pytest.raises(UserError, match="`max_length` must be at least 1"):
        encode_texts(tokenizer, ["w0"], 0)


def test_pad_sequences_masks_come_from_lengths_even_if_pad_is_a_word():
    batch = pad_sequences([[4, 0, 5], [6]], pad_id=0, uncounted_ids=[])
    assert batch.input_ids.tolist() == [[4, 0, 5], [6, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.token_mask.tolist() == [[True, True, True], [True, False, False]]


@given(
    st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=5),
    st.sampled_from(["left", "right"]),
)
def test_padding_never_changes_the_counted_tokens(sequences, side):
    batch = pad_sequences(sequences, pad_id=0, uncounted_ids=[0, 1, 2], side=side)
    for row, ids in enumerate(sequences):
        assert batch.input_ids[row][batch.attention_mask[row].bool()].tolist() == ids
        counted = batch.input_ids[row][batch.token_mask[row]].tolist()
        assert counted == [i for i in ids if i > 2]


def test_token_batch_moves_and_feeds_the_model():
    batch = pad_sequences([[4]], pad_id=0, uncounted_ids=[]).to("meta")
    assert batch.token_mask.device.type == "meta"
    assert set(batch.model_inputs()) == {"input_ids", "attention_mask"}


@given(st.lists(st.integers(1, 5), max_size=12), st.integers(1, 4))
def test_length_batches_hold_every_index_once_in_order(lengths, batch_size):
    batches = length_batches(lengths, batch_size)
    flat = [index for batch in batches for index in batch]
    assert flat == sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    assert all(len(batch) == batch_size for batch in batches[:-1])


def test_length_batches_refuses_an_empty_batch():
    with pytest.raises(UserError, match="`batch_size` must be at least 1"):
        length_batches([1], 0)


def test_padding_id_falls_back_to_eos():
    tokenizer = tiny_tokenizer()
    assert padding_id(tokenizer) == PAD
    tokenizer.pad_token = None
    assert padding_id(tokenizer) == EOS
