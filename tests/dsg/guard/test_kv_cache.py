import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM

from dsg.errors import UserError
from dsg.guard.kv_cache import CacheEvidence
from dsg.lm.tokens import pad_sequences
from tests.guard_reference import UNCOUNTED, greedy, make_guard, reference
from tests.helpers import random_ids, standard_sae

SAE = standard_sae()
NEW_TOKENS = 8


def prompts(num=5):
    return [random_ids(1, 2 + n, seed=30 + n)[0].tolist() for n in range(num)]


@pytest.mark.parametrize("continuation", ["running", "frozen"])
@pytest.mark.parametrize("decision", ["sequence", "prompt"])
def test_cached_batched_generation_equals_uncached_single_decoding(model, decision, continuation):
    rows = prompts()
    batch = pad_sequences(rows, 0, UNCOUNTED, "left")
    eos_id = 18  # a word that some rows, not all, generate before the end
    flips = finished = 0
    for threshold in (0.2, 0.4, 0.5, 0.6, 0.7):
        guard = make_guard(SAE, threshold=threshold)
        with guard.attached(model, decision, continuation) as attachment:
            out = model.generate(
                **batch.model_inputs(),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=eos_id,
                pad_token_id=0,
            )
        for row, ids in enumerate(rows):
            running = continuation == "running"
            expected, flipped = greedy(model, SAE, guard, ids, NEW_TOKENS, eos_id, running)
            flips += flipped
            finished += len(expected) < NEW_TOKENS
            new = out[row, batch.input_ids.shape[1] :].tolist()
            assert new == expected + [0] * (len(new) - len(expected))
            # The last generated token never enters the model, and pads after eos do not count.
            seen = ids + expected[: len(expected) if len(new) > len(expected) else -1]
            truth = reference(model, SAE, guard, seen, len(ids), running)
            assert attachment.triggered[row] == truth.triggered[-1]
            assert attachment.density[row] == truth.density
    assert finished
    assert bool(flips) == (continuation == "running")


def test_scoring_a_continuation_equals_generating_it(model):
    ids = random_ids(4, 9, seed=3)
    prompt_mask = torch.arange(9)[None].expand_as(ids) < 4
    for threshold in (0.2, 0.4, 0.6):
        guard = make_guard(SAE, threshold=threshold)
        with guard.attached(model, "prompt") as attachment, torch.no_grad():
            scored = model(ids, prompt_mask=prompt_mask).logits
            decided = attachment.triggered
            cache = DynamicCache()
            steps = [model(ids[:, :4], past_key_values=cache, use_cache=True).logits]
            for t in range(4, 9):
                steps.append(model(ids[:, t : t + 1], past_key_values=cache).logits)
        torch.testing.assert_close(torch.cat(steps, 1), scored, atol=1e-5, rtol=0)
        assert torch.equal(attachment.triggered, decided)


def test_caches_made_by_the_model_and_interleaved_caches(model):
    guard = make_guard(SAE, threshold=0.4)
    first, second = random_ids(2, 6, seed=1), random_ids(2, 6, seed=2)
    with guard.attached(model) as attachment, torch.no_grad():
        expected = []
        for ids in (first, second):
            cache = model(ids[:, :3]).past_key_values
            for t in range(3, 6):
                model(ids[:, t : t + 1], past_key_values=cache)
            expected.append(attachment.density)
        caches = [model(ids[:, :3]).past_key_values for ids in (first, second)]
        for t in range(3, 6):
            densities = []
            for ids, cache in zip((first, second), caches, strict=True):
                model(ids[:, t : t + 1], past_key_values=cache)
                densities.append(attachment.density)
    assert torch.equal(torch.stack(densities), torch.stack(expected))


def test_state_resets_with_each_generation(model):
    rows = pad_sequences(prompts(3), 0, UNCOUNTED, "left").model_inputs()
    guard = make_guard(SAE, threshold=0.4)
    with guard.attached(model):
        first = model.generate(**rows, max_new_tokens=6, do_sample=False)
        second = model.generate(**rows, max_new_tokens=6, do_sample=False)
        cache = DynamicCache()
        model(random_ids(3, 4), past_key_values=cache, use_cache=True)
        cache.reset()
        model(random_ids(1, 4), past_key_values=cache, use_cache=True)
    assert torch.equal(first, second)


def test_beam_search_is_refused(model):
    with (
        make_guard(SAE).attached(model),
        pytest.raises(UserError, match="got beam search, which moves"),
    ):
        model.generate(random_ids(2, 4), num_beams=3, max_new_tokens=4, do_sample=False)


def test_sampling_several_sequences_is_allowed(model):
    with make_guard(SAE, threshold=0.0).attached(model) as attachment:
        model.generate(random_ids(2, 4), num_return_sequences=3, do_sample=True, max_new_tokens=3)
    assert attachment.triggered.shape == (6,)


def test_static_cache_is_refused(model):
    with (
        make_guard(SAE).attached(model),
        pytest.raises(UserError, match=r"must be 'dynamic' .* got 'static'"),
    ):
        model.generate(random_ids(2, 4), cache_implementation="static", max_new_tokens=3)


def test_foreign_trimmed_copied_and_shrunk_caches_are_refused(model):
    ids, token = random_ids(2, 5), random_ids(2, 1)
    foreign = model(ids).past_key_values
    with make_guard(SAE).attached(model), torch.no_grad():
        with pytest.raises(UserError, match="got 5 tokens that it has not seen"):
            model(token, past_key_values=foreign)
        trimmed = model(ids).past_key_values
        trimmed.crop(-2)
        with pytest.raises(UserError, match="moved, trimmed or offloaded"):
            model(token, past_key_values=trimmed)
        copied = copy.deepcopy(model(ids).past_key_values)
        with pytest.raises(UserError, match="has not seen"):
            model(token, past_key_values=copied)
        shrunk = model(ids).past_key_values
        shrunk.batch_select_indices(torch.tensor([1]))
        with pytest.raises(UserError, match=r"must keep its 2 sequences .* got 1"):
            model(token[:1], past_key_values=shrunk)
        swapped = model(ids).past_key_values
        swapped.reorder_cache(torch.tensor([1, 0]))
        with pytest.raises(UserError, match="moved, trimmed or offloaded"):
            model(token, past_key_values=swapped)


def test_prompt_mask_with_a_filled_cache_is_refused(model):
    with make_guard(SAE).attached(model, "prompt"), torch.no_grad():
        cache = model(random_ids(2, 5)).past_key_values
        with pytest.raises(UserError, match="`prompt_mask` must come with a new input"):
            model(
                random_ids(2, 1),
                past_key_values=cache,
                prompt_mask=torch.ones(2, 1, dtype=torch.bool),
            )


def test_peft_models_generate_under_guard(model):
    ids = random_ids(3, 4)
    guard = make_guard(SAE, threshold=0.3)
    with guard.attached(model):
        expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    wrapped = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    with guard.attached(wrapped):
        actual = wrapped.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(actual, expected)


def test_sliding_window_models_generate_under_guard():
    config = Gemma2Config(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=4,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).eval()
    rows = prompts(3)
    batch = pad_sequences(rows, 0, UNCOUNTED, "left")
    guard = make_guard(SAE, threshold=0.4)
    with guard.attached(model):
        out = model.generate(**batch.model_inputs(), max_new_tokens=6, do_sample=False)
    for row, ids in enumerate(rows):
        expected, _ = greedy(model, SAE, guard, ids, 6, eos_id=1)
        assert out[row, batch.input_ids.shape[1] :].tolist()[: len(expected)] == expected


def test_only_a_known_cache_can_be_repeated():
    with pytest.raises(UserError, match="must be filled while the guard is attached"):
        CacheEvidence().repeat(DynamicCache(), 2)
