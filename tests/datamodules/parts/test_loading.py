"""The tokenizer of a model must be its own."""

import pytest

from datamodules.parts.loading import load_tokenizer
from dsg.errors import UserError
from tests.helpers import VOCAB_SIZE, tiny_model, tiny_tokenizer


@pytest.fixture
def saved(tmp_path):
    def make(tokenizer, vocab_size=VOCAB_SIZE):
        tiny_model(vocab_size=vocab_size).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return str(tmp_path)

    return make


def test_a_tokenizer_larger_than_its_model_is_refused(saved):
    with pytest.raises(UserError, match=r"at most the model's 29 tokens, got .* with one of 30;"):
        load_tokenizer(saved(tiny_tokenizer(), VOCAB_SIZE - 1))


def test_added_words_and_roles_count(saved):
    words, pad = tiny_tokenizer(), tiny_tokenizer()
    words.add_tokens(["w26"])
    pad.add_special_tokens({"pad_token": "<padding>"})
    for tokenizer in (words, pad):
        with pytest.raises(UserError, match=r"the model's 30 tokens, got .* with one of 31"):
            load_tokenizer(saved(tokenizer))


def test_what_no_text_holds_may_lie_beyond_the_model(saved):
    assert len(load_tokenizer(saved(tiny_tokenizer(extra=("<image>",))))) == VOCAB_SIZE + 1
    assert len(load_tokenizer(saved(tiny_tokenizer(), 64))) == VOCAB_SIZE  # padded embeddings


def test_a_folder_may_hold_a_tokenizer_alone(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    assert len(load_tokenizer(str(tmp_path))) == VOCAB_SIZE
