"""Tiny random models of every supported family, and the method written once more for them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from dsg.guard.guard import Guard
from tests.helpers import BOS, D_MODEL, EOS, PAD, VOCAB_SIZE

WINDOW = 6
_SIZES = {
    "hidden_size": D_MODEL,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 1}


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: Prefix of its classes in transformers.
        layers: Module path of its decoder layers.
        lora_targets: Linear maps that LoRA can adapt.
        sizes: What its configuration class calls the sizes, and what turns dropout off.
        window: Whether its attention slides over the last `WINDOW` tokens.
    """

    name: str
    layers: str
    lora_targets: tuple[str, ...]
    sizes: dict[str, Any]
    window: bool = False

    def layer_path(self, layer: int) -> str:
        return f"{self.layers}.{layer}"

    def layer(self, model: nn.Module, layer: int) -> nn.Module:
        return model.get_submodule(self.layer_path(layer))


FAMILIES = [
    Family(
        "Gemma2",
        "model.layers",
        ("q_proj", "v_proj"),
        # Scaled dot-product attention leaves out this family's soft cap.
        {**_GROUPED, "head_dim": 8, "sliding_window": WINDOW, "attn_implementation": "eager"},
        window=True,
    ),
    Family(
        "Gemma3Text",
        "model.layers",
        ("q_proj", "v_proj"),
        {
            **_GROUPED,
            "head_dim": 8,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        window=True,
    ),
    Family("Llama", "model.layers", ("q_proj", "v_proj"), _GROUPED),
    Family("Qwen2", "model.layers", ("q_proj", "v_proj"), _GROUPED),
    Family("Qwen3", "model.layers", ("q_proj", "v_proj"), {**_GROUPED, "head_dim": 8}),
    Family(
        "Mistral",
        "model.layers",
        ("q_proj", "v_proj"),
        {**_GROUPED, "head_dim": 8, "sliding_window": WINDOW},
        window=True,
    ),
    Family(
        "GPT2",
        "transformer.h",
        ("c_attn",),
        {
            "n_embd": D_MODEL,
            "n_layer": 3,
            "n_head": 2,
            "n_positions": 64,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
    Family("GPTNeoX", "gpt_neox.layers", ("query_key_value",), {**_SIZES, "rotary_pct": 0.25}),
    Family("Phi", "model.layers", ("q_proj", "v_proj"), _SIZES),
    Family("Phi3", "model.layers", ("qkv_proj",), _GROUPED),
]
_CLASSES = {"Gemma3Text": "Gemma3ForCausalLM", "GPT2": "GPT2LMHeadModel"}


def build(family: Family, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A random model of width 16 with 3 layers and 30 tokens, in evaluation mode."""
    config_class = getattr(transformers, f"{family.name}Config")
    model_class = getattr(transformers, _CLASSES.get(family.name, f"{family.name}ForCausalLM"))
    config = config_class(
        vocab_size=VOCAB_SIZE,
        # Large enough for the tokens' activations to differ visibly.
        initializer_range=0.3,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        **family.sizes,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config).to(dtype).eval()


def build_multimodal() -> PreTrainedModel:
    """A random Gemma 3 that also takes images, whose last token id stands for one."""
    sizes = next(family.sizes for family in FAMILIES if family.name == "Gemma3Text")
    text = transformers.Gemma3TextConfig(
        vocab_size=VOCAB_SIZE, initializer_range=0.3, pad_token_id=PAD, **sizes
    )
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, image_token_id=VOCAB_SIZE - 1
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.Gemma3ForConditionalGeneration(config).eval()


def with_lora(family: Family, model: PreTrainedModel) -> PeftModel:
    """The model with low-rank adapters that already say something, in evaluation mode."""
    config = LoraConfig(
        r=2,
        target_modules=list(family.lora_targets),
        task_type="CAUSAL_LM",
        # Adapters normally begin as zero and would change nothing.
        init_lora_weights=False,
        # GPT-2 keeps its weights transposed.
        fan_in_fan_out=family.name == "GPT2",
    )
    return get_peft_model(model, config).eval()


@dataclass
class Expected:
    """Logits [seq, vocab] of one unpadded sequence, the decision per position, final density."""

    logits: Tensor
    triggered: list[bool]
    density: float


def reference(
    layer: nn.Module,
    model: nn.Module,
    sae: Any,
    guard: Guard,
    ids: list[int],
    prompt_length: int | None = None,
) -> Expected:
    """What a guarded model must compute: one row, plain loops, full decode, no cache.

    Args:
        layer: The module at the hook point.
        model: The whole model.
        sae: The SAE that the guard's features come from.
        guard: A guard of density gate and clamp scope `all`, in activation units.
        ids: One sequence without padding.
        prompt_length: Tokens that decide together; None: all.
    """
    h = _output_of(layer, model, ids)
    z = sae.encode(h)
    counted = [token not in guard.uncounted_ids for token in ids]
    active = [bool((z[t, guard.feature_ids] > 0).any()) for t in range(len(ids))]

    def density(end: int) -> float:
        seen = [active[t] for t in range(end) if counted[t]]
        return sum(seen) / len(seen) if seen else 0.0

    start = len(ids) if prompt_length is None else prompt_length
    triggered = [density(start) > guard.threshold] * start
    for t in range(start, len(ids)):
        triggered.append(triggered[-1] or density(t + 1) > guard.threshold)

    z_new = z.clone()
    for t in range(len(ids)):
        if triggered[t] and counted[t] and active[t]:
            z_new[t, guard.feature_ids] = guard.clamp_value
    edited = h + sae.decode(z_new) - sae.decode(z)
    logits = _replacing(layer, edited, lambda: model(torch.tensor([ids]), use_cache=False).logits)
    return Expected(logits[0], triggered, density(len(ids)))


def greedy(
    layer: nn.Module, model: nn.Module, sae: Any, guard: Guard, prompt: list[int], num_tokens: int
) -> list[int]:
    """The next tokens under the guard, the whole sequence anew for each of them."""
    ids = list(prompt)
    for _ in range(num_tokens):
        logits = reference(layer, model, sae, guard, ids, len(prompt)).logits
        ids.append(int(logits[-1].argmax()))
    return ids[len(prompt) :]


def _output_of(layer: nn.Module, model: nn.Module, ids: list[int]) -> Tensor:
    captured = []
    handle = layer.register_forward_hook(lambda _m, _a, output: captured.append(output))
    with torch.no_grad():
        model(torch.tensor([ids]), use_cache=False)
    handle.remove()
    output = captured[0][0] if isinstance(captured[0], tuple) else captured[0]
    return output[0]


def _replacing(layer: nn.Module, h: Tensor, run: Callable[[], Tensor]) -> Tensor:
    def replace(_module: nn.Module, _args: Any, output: Any) -> Any:
        return (h[None], *output[1:]) if isinstance(output, tuple) else h[None]

    handle = layer.register_forward_hook(replace)
    with torch.no_grad():
        result = run()
    handle.remove()
    return result
