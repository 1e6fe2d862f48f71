import pytest
import torch

from dsg.errors import UserError
from dsg.evaluation.benchmarks.mt_bench.grading import make_judge
from dsg.evaluation.benchmarks.mt_bench.judge import JudgeSettings
from tests.conversations import save_chat_model
from tests.helpers import tiny_model, tiny_tokenizer

ASKED = [{"role": "system", "content": "w1"}, {"role": "user", "content": "w2 w3"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_chat_model(tmp_path_factory.mktemp("judge")))


def local(folder, **changes):
    return make_judge(JudgeSettings(model=folder, kind="local", max_tokens=5, **changes))


def test_the_reply_by_hand(folder):
    judge, model, tokenizer = local(folder), tiny_model(), tiny_tokenizer()
    judge.check()
    # The system's words come first in the user's message.
    ids = tokenizer("w24 w1 w2 w3 w25")["input_ids"]
    expected = []
    for _ in range(5):
        token = int(model(input_ids=torch.tensor([ids + expected])).logits[0, -1].argmax())
        expected.append(token)
    assert judge.reply(ASKED, 0) == tokenizer.decode(expected, skip_special_tokens=True)
    assert judge.reply(ASKED, 1) == judge.reply(ASKED, 0)
    assert judge.concurrency == 1


def test_repeats_are_drawn_apart_and_the_same_again(folder):
    judge = local(folder, temperature=1.5, repeats=6)
    before = torch.random.get_rng_state()
    replies = [judge.reply(ASKED, seed) for seed in range(6)]
    assert len(set(replies)) > 1
    assert replies == [judge.reply(ASKED, seed) for seed in range(6)]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_cannot_judge(tmp_path):
    with pytest.raises(UserError, match="Hugging Face folder or hub name"):
        local(str(tmp_path / "nowhere")).check()
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="must have a chat template"):
        local(str(tmp_path)).check()
