import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from dsg.errors import UserError
from dsg.lm.chat import chat_text
from tests.helpers import tiny_tokenizer

TEMPLATE = "{{ bos_token }} {{ date_string or strftime_now('%d %b %Y') }}" + (
    "{% for m in messages %} {{ m['role'] }} {{ m['content'] }}{% endfor %}"
)


def test_a_prompt_is_the_same_on_any_day():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    assert chat_text(tokenizer, ["w1", "w2"]) == " 26 Jul 2024 user w1 assistant w2"


def test_the_bos_stays_where_the_tokenizer_adds_none():
    words = Tokenizer(models.WordLevel({"<bos>": 0, "<unk>": 1}, unk_token="<unk>"))
    plain = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<bos>", unk_token="<unk>")
    plain.chat_template = TEMPLATE
    assert chat_text(plain, ["w1"]).startswith("<bos> ")


def test_no_template():
    with pytest.raises(UserError, match="MT-Bench needs a tokenizer with a chat template"):
        chat_text(tiny_tokenizer(), ["w1"], "MT-Bench")
