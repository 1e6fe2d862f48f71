"""A guard's share of a decoder layer's time, on random weights of a model's shapes."""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dsg.cli.bench.edit import CLAMP_VALUE, FIRED_IN_TRIGGERED, THRESHOLD, random_sae
from dsg.guard import Clamp, DensityGate, Guard
from dsg.lm import decoder_of, hidden_states, resolve_hook_point
from dsg.sae import slice_features

if TYPE_CHECKING:
    from sae_lens import JumpReLUSAE
    from transformers import Gemma2ForCausalLM

_FIRED_IN_UNTRIGGERED = 0.1
_HOOK_POINT = "blocks.0.hook_resid_post"
_VOCAB_SIZE = 512


@dataclass(frozen=True)
class LayerShare:
    """A guard's time against one decoder layer's, in the same forward passes.

    Attributes:
        num_tokens: Length of the sequence.
        layer_seconds: Median time of the decoder layer.
        untriggered_share: Median guard time / layer time on an untriggered sequence.
        triggered_share: The same on a triggered one.
        untriggered_identical: The untriggered pass has the plain model's logits, bit for bit.
        triggered_differs: The triggered pass has not.
    """

    num_tokens: int
    layer_seconds: float
    untriggered_share: float
    triggered_share: float
    untriggered_identical: bool
    triggered_differs: bool


def random_model(d_in: int, seed: int) -> "Gemma2ForCausalLM":
    """One random decoder layer of Gemma 2, with gemma-2-2b's proportions, and a small vocabulary.

    Args:
        d_in: Width of the residual stream; 2304 gives gemma-2-2b's own shapes.
        seed: Of all weights.
    """
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=_VOCAB_SIZE,
        hidden_size=d_in,
        intermediate_size=4 * d_in,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=max(2, 2 * (d_in * 128 // 2304)),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Gemma2ForCausalLM(config).eval()


@torch.no_grad()
def measure_layer(
    model: "Gemma2ForCausalLM", num_features: int, num_tokens: int, repeats: int, seed: int
) -> LayerShare:
    """Times a guard inside a model's forward passes, on an untriggered and a triggered sequence.

    Args:
        model: From `random_model`.
        num_features: Selected features.
        num_tokens: Length of the sequence, at least 2.
        repeats: Timed passes of each, in turn.
        seed: Of tokens and features.
    """
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(_VOCAB_SIZE, (1, num_tokens), generator=generator)
    layer = resolve_hook_point(model, _HOOK_POINT)
    plain, h = _plain_forward(model, layer, input_ids)
    sae = random_sae(model.config.hidden_size, num_features, seed)
    guards = {
        "untriggered": _guard_that_fires(sae, h, _FIRED_IN_UNTRIGGERED),
        "triggered": _guard_that_fires(sae, h, FIRED_IN_TRIGGERED),
    }
    logits: dict[str, Tensor] = {}
    shares: dict[str, list[float]] = {name: [] for name in guards}
    layer_seconds = []
    for repeat in range(repeats + 1):
        for name, guard in guards.items():
            logits[name], layer_time, guard_time = _guarded_forward(model, layer, guard, input_ids)
            if repeat > 0:  # the first passes warm up
                layer_seconds.append(layer_time)
                shares[name].append(guard_time / layer_time)
    return LayerShare(
        num_tokens=num_tokens,
        layer_seconds=median(layer_seconds),
        untriggered_share=median(shares["untriggered"]),
        triggered_share=median(shares["triggered"]),
        untriggered_identical=torch.equal(logits["untriggered"], plain),
        triggered_differs=not torch.equal(logits["triggered"], plain),
    )


def _plain_forward(
    model: "Gemma2ForCausalLM", layer: nn.Module, input_ids: Int[Tensor, "1 seq"]
) -> tuple[Float[Tensor, "1 seq vocab"], Float[Tensor, "1 seq d_in"]]:
    """Logits without a guard, and the layer's output."""
    outputs: list[Tensor] = []
    handle = layer.register_forward_hook(lambda *call: outputs.append(hidden_states(call[2])))
    try:
        logits = model(input_ids, use_cache=False).logits
    finally:
        handle.remove()
    return logits, outputs[0]


def _guard_that_fires(sae: "JumpReLUSAE", h: Float[Tensor, "1 seq d_in"], fraction: float) -> Guard:
    """A guard of all features of the SAE, some of which are active on this fraction of tokens."""
    strongest = (h @ sae.W_enc).amax(-1).flatten()
    # Biases put the limit at 1: a feature is active above 0 only.
    sae.b_enc.data.fill_(1 - strongest.quantile(1 - fraction).item())
    sae.threshold.data.fill_(1.0)
    return Guard(
        slice_features(sae, range(sae.cfg.d_sae)),
        hook_point=_HOOK_POINT,
        uncounted_ids=[],
        pad_id=None,
        gate=DensityGate(THRESHOLD),
        edit=Clamp(CLAMP_VALUE),
    )


def _guarded_forward(
    model: "Gemma2ForCausalLM", layer: nn.Module, guard: Guard, input_ids: Tensor
) -> tuple[Tensor, float, float]:
    """Logits of one guarded pass, seconds of the layer, and seconds of all the guard's hooks."""
    times: dict[str, list[float]] = defaultdict(list)

    def stamp(name: str) -> Callable[..., None]:
        return lambda *_: times[name].append(time.perf_counter())

    decoder = decoder_of(model)
    places = {
        "plan": decoder.register_forward_pre_hook,
        "start": layer.register_forward_pre_hook,
        "edit": layer.register_forward_hook,
        "remember": decoder.register_forward_hook,
    }
    handles: list[RemovableHandle] = []
    with guard.attached(model):
        try:
            # Registered last, so that they stand at both ends of whatever the guard has put there.
            for name, register in places.items():
                handles += [register(stamp(name), prepend=True), register(stamp(name))]
            logits = model(input_ids, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
    guard_seconds = sum(after - before for before, after in times.values())
    return logits, times["edit"][0] - times["start"][1], guard_seconds
