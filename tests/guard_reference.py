"""The method written a second time: one row, plain loops, full decode, no cache, no padding."""

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from dsg.guard.edit import Clamp, Refusal
from dsg.guard.gate import CusumGate, DensityGate, OpenGate, WindowGate
from dsg.guard.guard import Guard
from dsg.sae.loading import slice_features
from tests.helpers import HOOK_POINT

LAYER = 1
UNCOUNTED = [0, 1, 2]
FEATURES = [3, 0, 7]
GATE, EDIT = DensityGate(0.3), Clamp(-20.0)


def make_guard(sae, feature_ids=FEATURES, gate=GATE, edit=EDIT, **changes) -> Guard:
    """A guard by its parts; `changes` are those of `Guard.replace`."""
    guard = Guard(
        slice_features(sae, feature_ids),
        hook_point=HOOK_POINT,
        uncounted_ids=UNCOUNTED,
        pad_id=0,
        gate=gate,
        edit=edit,
    )
    return guard.replace(**changes)


@dataclass
class Reference:
    """Expected logits [seq, vocab], decision per position, and final density."""

    logits: Tensor
    triggered: list[bool]
    density: float


def reference(model, sae, guard, ids, prompt_length=None, running=True) -> Reference:
    """What a guarded model must compute for one unpadded sequence of ids."""
    tokens = torch.tensor([ids])
    captured = []
    layer = model.model.layers[LAYER]
    handle = layer.register_forward_hook(lambda _m, _a, output: captured.append(output))
    with torch.no_grad():
        model(tokens, use_cache=False)
    handle.remove()
    h = captured[0][0]
    z = sae.encode(h)

    def decode(feature_acts):
        sae.encode(h)  # SAELens takes the norms to undo from the last encoding, and then forgets
        return sae.decode(feature_acts)

    selected = guard.feature_ids
    counted = [token not in UNCOUNTED for token in ids]
    active = [any(z[t, j] > 0 for j in selected) for t in range(len(ids))]
    prompt_length = len(ids) if prompt_length is None else prompt_length

    def density(end):
        seen = [t for t in range(end) if counted[t]]
        return sum(active[t] for t in seen) / len(seen) if seen else 0.0

    def statistic(end):
        flags = [active[t] for t in range(end) if counted[t]]
        if isinstance(guard.gate, WindowGate):
            size = guard.gate.size
            runs = [flags[i : i + size] for i in range(len(flags) - size + 1)] or [flags]
            return max((sum(run) / len(run) for run in runs if run), default=0.0)
        if isinstance(guard.gate, CusumGate):
            leak = Fraction(round(guard.gate.leak * 65536), 65536)
            level = peak = Fraction(0)
            for flag in flags:
                level = max(Fraction(0), level + flag - leak)
                peak = max(peak, level)
            return float(peak)
        return density(end)

    def is_open(end):
        is_open_anyway = isinstance(guard.gate, OpenGate)
        return any(counted[:end]) if is_open_anyway else statistic(end) > guard.threshold

    triggered = [is_open(prompt_length)] * prompt_length
    for t in range(prompt_length, len(ids)):
        before = triggered[-1] if triggered else False
        triggered.append(before or (running and is_open(t + 1)))

    edit = guard.edit
    values = [edit.value] * len(ids)
    if edit.unit == "residual_norm":
        # The SAE multiplies what it decodes by the size of the token's activations.
        sizes = {
            "layer_norm": h.std(-1),
            "constant_norm_rescale": h.norm(dim=-1) / h.shape[-1] ** 0.5,
        }
        size = sizes.get(sae.cfg.normalize_activations, torch.ones(len(ids)))
        values = [edit.value * edit.residual_norm / float(token) for token in size]
    z_new = z.clone()
    for t in range(len(ids)):
        above = [j for j in selected if z[t, j] > edit.trigger_limit]
        if triggered[t] and counted[t] and above:
            if isinstance(edit, Refusal):
                written = [guard.refusal_id]
            else:
                written = selected if edit.scope == "all" else above
            for j in written:
                z_new[t, j] = values[t]
    edited = h + decode(z_new) - decode(z)

    handle = layer.register_forward_hook(lambda _m, _a, _o: edited[None])
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits[0]
    handle.remove()
    return Reference(logits, triggered, density(len(ids) if running else prompt_length))


def greedy(model, sae, guard, prompt, num_tokens, eos_id, running=True) -> tuple[list[int], bool]:
    """Greedy decoding one token at a time, the whole sequence anew each time.

    Returns:
        The new tokens, and whether the decision changed behind the prompt.
    """
    ids, flipped = list(prompt), False
    for _ in range(num_tokens):
        step = reference(model, sae, guard, ids, len(prompt), running)
        flipped = flipped or (step.triggered[-1] != step.triggered[0])
        ids.append(int(step.logits[-1].argmax()))
        if ids[-1] == eos_id:
            break
    return ids[len(prompt) :], flipped
