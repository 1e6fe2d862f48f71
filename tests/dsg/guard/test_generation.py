"""Guarded generation against decoding token by token, without a cache, each prompt alone."""

import pytest
import torch

from dsg.guard.edit import Refusal
from dsg.guard.gate import CusumGate, OpenGate, WindowGate
from dsg.lm.tokens import pad_sequences
from tests.guard_reference import UNCOUNTED, greedy, make_guard, reference
from tests.helpers import SAE_BUILDERS, random_ids, tiny_model

MODEL = tiny_model(attn_implementation="sdpa").double()
EOS = 18  # a word that some rows, not all, generate before the end
NEW_TOKENS = 6
NUM_PROMPTS = 200
# Special tokens anywhere: bos in front, pads and eos inside.
PROMPTS = [
    [2] + random_ids(1, 1 + n % 9, seed=n)[0].tolist() + [0, 1] * (n % 5 == 0) + [4 + n % 26]
    for n in range(NUM_PROMPTS)
]
GUARDS = [
    ("standard", {"threshold": 0.55}),
    ("gated", {"gate": WindowGate(0.7, 3)}),
    ("jumprelu", {"gate": CusumGate(1.0, 0.5)}),
    ("topk", {"threshold": 0.3}),
    ("matching_pursuit", {"threshold": 0.2, "scope": "active"}),
    ("standard", {"threshold": 0.3, "edit": Refusal(-9.0)}),
    ("jumprelu", {"gate": OpenGate()}),
]


def generate(model, guard, rows, decision, continuation="running"):
    batch = pad_sequences(rows, 0, UNCOUNTED, "left")
    with guard.attached(model, decision, continuation) as attachment:
        out = model.generate(
            **batch.model_inputs(),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=EOS,
            pad_token_id=0,
        )
    return out[:, batch.input_ids.shape[1] :].tolist(), attachment


def test_two_hundred_prompts_generate_the_tokens_of_the_reference():
    midway = finished = 0
    for start in range(0, NUM_PROMPTS, 25):
        rows = PROMPTS[start : start + 25]
        architecture, settings = GUARDS[start // 25 % len(GUARDS)]
        sae = SAE_BUILDERS[architecture](dtype="float64")
        guard = make_guard(sae, value=-9.0, **settings)
        found, _ = generate(MODEL, guard, rows, "prompt" if start % 2 else "sequence")
        for ids, new in zip(rows, found, strict=True):
            expected, turned_on = greedy(MODEL, sae, guard, ids, NEW_TOKENS, EOS)
            assert new == expected + [0] * (len(new) - len(expected))
            midway += turned_on
            finished += len(expected) < NEW_TOKENS
    assert midway > 10
    assert finished > 10


@pytest.mark.parametrize(("architecture", "settings"), GUARDS)
def test_scoring_a_continuation_gives_the_logits_of_generating_it(architecture, settings):
    sae = SAE_BUILDERS[architecture](dtype="float64")
    guard = make_guard(sae, value=-9.0, **settings)
    ids = random_ids(8, 10, seed=4)
    prompt_mask = torch.arange(10)[None].expand_as(ids) < 4
    with guard.attached(MODEL, "prompt") as attachment, torch.no_grad():
        scored = MODEL(ids, prompt_mask=prompt_mask).logits
        decided, statistic = attachment.triggered, attachment.statistic
        output = MODEL(ids[:, :4])
        steps, cache = [output.logits], output.past_key_values
        for t in range(4, 10):
            steps.append(MODEL(ids[:, t : t + 1], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(steps, 1), scored, atol=1e-9, rtol=0)
    assert torch.equal(attachment.triggered, decided)
    assert torch.equal(attachment.statistic, statistic)
    for row in range(8):
        expected = reference(MODEL, sae, guard, ids[row].tolist(), 4)
        torch.testing.assert_close(scored[row], expected.logits, atol=1e-8, rtol=1e-6)


def test_a_clamp_changes_logits_at_prefill_and_at_each_step():
    sae = SAE_BUILDERS["standard"](dtype="float64")
    # A feature that is active on every token, so that every position is written.
    ids = random_ids(3, 8, seed=1)
    guard = make_guard(sae, list(range(24)), threshold=0.0, value=-9.0)

    def step_by_step():
        with torch.no_grad():
            output = MODEL(ids[:, :3])
            logits, cache = [output.logits[:, t] for t in range(3)], output.past_key_values
            for t in range(3, 8):
                logits.append(MODEL(ids[:, t : t + 1], past_key_values=cache).logits[:, 0])
        return torch.stack(logits, 1)

    plain = step_by_step()
    with guard.attached(MODEL):
        guarded = step_by_step()
    changed = (plain - guarded).abs().amax(-1) > 1e-3
    assert changed.all()


def test_float32_generation_agrees_by_logits():
    model = tiny_model(attn_implementation="sdpa")
    sae32, sae64 = (SAE_BUILDERS["standard"](dtype=dtype) for dtype in ("float32", "float64"))
    guard = make_guard(sae32, threshold=0.5, value=-9.0)
    exact = make_guard(sae64, threshold=0.5, value=-9.0)
    rows = PROMPTS[:20]
    batch = pad_sequences(rows, 0, UNCOUNTED, "left")
    with guard.attached(model, "prompt"):
        out = model.generate(
            **batch.model_inputs(),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=EOS,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    length = batch.input_ids.shape[1]
    for row, ids in enumerate(rows):
        new = out.sequences[row, length:].tolist()
        new = new[: new.index(EOS) + 1] if EOS in new else new
        truth = reference(MODEL, sae64, exact, ids + new[:-1], len(ids)).logits[len(ids) - 1 :]
        mine = torch.stack([logits[row] for logits in out.logits[: len(new)]])
        torch.testing.assert_close(mine.double(), truth, atol=1e-4, rtol=1e-4)


def test_a_sequence_of_special_tokens_is_never_triggered():
    for architecture, settings in GUARDS:
        guard = make_guard(SAE_BUILDERS[architecture](), **settings)
        if not isinstance(guard.gate, OpenGate):
            guard = guard.replace(threshold=0.0)
        ids = torch.tensor([[2, 0, 1], [2, 5, 1]])
        mask = torch.ones_like(ids)
        model = tiny_model()
        with torch.no_grad():
            plain = model(ids, attention_mask=mask).logits
            with guard.attached(model) as attachment:
                guarded = model(ids, attention_mask=mask).logits
        assert not attachment.triggered[0]
        assert torch.equal(guarded[0], plain[0])
