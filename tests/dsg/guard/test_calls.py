"""Guards and threads: each call is guarded from its beginning to its end, whatever others do."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from dsg.errors import UserError
from dsg.guard.following import Calls
from tests.guard_reference import greedy, make_guard
from tests.helpers import random_ids, standard_sae, tiny_model

SAE = standard_sae(dtype="float64")
MODEL = tiny_model(attn_implementation="sdpa").double()
PROMPTS = [random_ids(1, 3 + n % 4, seed=n)[0].tolist() for n in range(60)]
NEW_TOKENS = 6
OPTIONS = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
GUARD = make_guard(SAE, [7], threshold=0.5, value=-9.0)


def num_hooks(model=MODEL):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def generate(ids, generate=None, **options):
    method = MODEL.generate if generate is None else generate
    out = method(torch.tensor([ids]), **OPTIONS, pad_token_id=0, **options)
    return out[0, len(ids) :].tolist()


@pytest.fixture(scope="module")
def expected():
    return [greedy(MODEL, SAE, GUARD, ids, NEW_TOKENS, None)[0] for ids in PROMPTS]


@pytest.fixture(autouse=True)
def _nothing_is_left_behind():
    before = num_hooks()
    yield
    assert num_hooks() == before
    assert not {"generate", "forward"} & vars(MODEL).keys()


class Held(BaseStreamer):
    """Lets the first token pass, and waits with the next one until it may go on."""

    def __init__(self):
        self.began, self.may_go_on, self.ended = (threading.Event() for _ in range(3))
        self.num_put = 0

    def put(self, _):
        self.num_put += 1
        if self.num_put == 2:  # the prompt is put first
            self.began.set()
            assert self.may_go_on.wait(30)

    def end(self):
        self.ended.set()


def test_threads_on_one_model_generate_what_each_would_alone(expected):
    plain = [generate(ids) for ids in PROMPTS]
    # The guard decides differently about different prompts.
    assert 5 < sum(a == b for a, b in zip(plain, expected, strict=True)) < 55
    with GUARD.attached(MODEL, "prompt"), ThreadPoolExecutor(4) as pool:
        assert list(pool.map(generate, PROMPTS)) == expected


def test_a_guard_measures_in_one_thread_while_another_generates(expected):
    ids = torch.tensor([PROMPTS[0]])
    alone = GUARD.density(MODEL, ids)
    with GUARD.attached(MODEL, "prompt"), ThreadPoolExecutor(2) as pool:
        measured = [pool.submit(GUARD.density, MODEL, ids) for _ in range(20)]
        assert list(pool.map(generate, PROMPTS[:20])) == expected[:20]
    assert all(torch.equal(future.result(), alone) for future in measured)


@pytest.mark.parametrize("how", ["leave", "detach", "exception"])
def test_a_call_that_outlives_the_block_is_guarded_to_its_end(expected, how):
    def begin(pool, ids, streamer):
        attachment = GUARD.attached(MODEL, "prompt")
        with attachment:
            future = pool.submit(generate, ids, streamer=streamer)
            assert streamer.began.wait(30)
            if how == "exception":
                raise RuntimeError(future)
            if how == "detach":
                attachment.detach()
        return future

    chosen = [n for n, ids in enumerate(PROMPTS) if generate(ids) != expected[n]][:5]
    for n in chosen:
        streamer = Held()
        with ThreadPoolExecutor(1) as pool:
            try:
                future = begin(pool, PROMPTS[n], streamer)
            except RuntimeError as error:
                future = error.args[0]
            # Calls that begin now are not guarded any more, though hooks are still there.
            plain = generate(PROMPTS[n])
            assert num_hooks() > 0
            streamer.may_go_on.set()
            assert future.result() == expected[n]
        assert generate(PROMPTS[n]) == plain != expected[n]


def test_a_generate_that_was_taken_inside_the_block_is_guarded_after_it(expected):
    plain = [generate(ids) for ids in PROMPTS[:20]]
    with GUARD.attached(MODEL, "prompt"):
        taken = MODEL.generate
    assert [generate(ids, taken) for ids in PROMPTS[:20]] == expected[:20]
    assert [generate(ids) for ids in PROMPTS[:20]] == plain != expected[:20]
    other = make_guard(SAE, threshold=0.9).attached(MODEL, "prompt")
    with other, pytest.raises(UserError, match="must carry no guard yet"):
        generate(PROMPTS[0], taken)


def test_a_block_that_ends_inside_its_own_call(expected):
    class Leaving(Held):
        def put(self, _):
            attachment.detach()

    n = next(n for n, ids in enumerate(PROMPTS) if generate(ids) != expected[n])
    attachment = GUARD.attached(MODEL, "prompt")
    assert generate(PROMPTS[n], streamer=Leaving()) == expected[n]


def test_a_refusal_ends_the_stream():
    streamer = Held()
    with GUARD.attached(MODEL), pytest.raises(UserError, match="`use_cache` must be true"):
        generate(PROMPTS[0], streamer=streamer, use_cache=False)
    assert streamer.ended.is_set()


def test_decisions_of_another_thread():
    densities = {
        GUARD.density(MODEL, row).item(): row for row in map(torch.tensor, [[p] for p in PROMPTS])
    }
    rows, own = (
        [densities[min(densities)], densities[max(densities)]],
        [min(densities), max(densities)],
    )
    with GUARD.attached(MODEL) as attachment, ThreadPoolExecutor(1) as pool:
        pool.submit(MODEL, rows[0]).result()
        assert attachment.density == own[0]
        MODEL(rows[1])
        pool.submit(MODEL, rows[0]).result()
        assert attachment.density == own[1]


def test_gradients_that_another_thread_recomputes():
    model, ids = tiny_model(), random_ids(3, 6)
    guard = make_guard(standard_sae(), threshold=0.0)
    model.train()

    def gradient(backward):
        model.zero_grad()
        with guard.attached(model):
            loss = model(ids, labels=ids, use_cache=False).loss
            # What is computed in between without gradients is no concern of theirs.
            with torch.no_grad():
                model(ids[:1])
            backward(loss)
        return model.model.embed_tokens.weight.grad.clone()

    def elsewhere(loss):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(loss.backward).result()

    expected = gradient(torch.Tensor.backward)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert torch.equal(gradient(torch.Tensor.backward), expected)
    assert torch.equal(gradient(elsewhere), expected)


def test_what_an_exception_left_behind_keeps_no_guard():
    done = []
    calls = Calls(lambda: done.append(True))
    left = torch.nn.Identity()
    assert calls.begin(left)  # and never `end`, as in a compiled module that raises
    assert calls.is_following
    calls.close()
    assert done
    assert not calls.is_following
    assert not calls.begin(left)


def test_a_closed_guard_stays_until_other_threads_are_done():
    done = []
    calls = Calls(lambda: done.append(True))
    inside = torch.nn.Identity()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(calls.begin, inside).result()
        calls.close()
        assert not done
        assert not calls.begin(inside)
        pool.submit(calls.end, inside).result()
    assert done
