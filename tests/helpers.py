"""Tiny models, tokenizers and SAEs with known answers, shared by all tests."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, EOS, BOS, UNK = 0, 1, 2, 3
WORDS = [f"w{index}" for index in range(26)]
VOCAB_SIZE = 4 + len(WORDS)
D_MODEL = 16
HOOK_POINT = "blocks.1.hook_resid_post"


def tiny_model(num_layers: int = 3, seed: int = 0, **overrides: object) -> LlamaForCausalLM:
    """A random Llama of width 16 in evaluation mode, float32."""
    config = LlamaConfig(
        **{
            "vocab_size": VOCAB_SIZE,
            "hidden_size": D_MODEL,
            "intermediate_size": 32,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 128,
            # Large enough for the tokens' activations to differ visibly.
            "initializer_range": 0.3,
            "pad_token_id": PAD,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "attn_implementation": "eager",
            **overrides,
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def tiny_tokenizer(extra: tuple[str, ...] = (), **overrides: str) -> PreTrainedTokenizerFast:
    """One token per word `w0` ... `w25` (ids 4 ... 29), a leading bos, and chosen extra tokens."""
    names = ["<pad>", "<eos>", "<bos>", "<unk>", *WORDS]
    tokenizer = Tokenizer(
        models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    roles = {
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "bos_token": "<bos>",
        "unk_token": "<unk>",
        **overrides,
    }
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
    if extra:
        fast.add_special_tokens({"extra_special_tokens": list(extra)})
    return fast


def standard_sae(d_in: int = D_MODEL, d_sae: int = 24, seed: int = 0, **config: object):
    """A StandardSAE with random weights and biases, float32 unless `dtype` says otherwise."""
    from sae_lens import StandardSAE, StandardSAEConfig

    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=d_sae, **config))
    return _fill(sae, seed)


def jumprelu_sae(d_in: int = D_MODEL, d_sae: int = 24, seed: int = 0, **config: object):
    """A JumpReLUSAE with random weights, biases and positive thresholds."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    sae = _fill(JumpReLUSAE(JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae, **config)), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    sae.threshold.data = torch.rand(d_sae, generator=generator).to(sae.dtype)
    return sae


def gated_sae(d_in: int = D_MODEL, d_sae: int = 24, seed: int = 0, **config: object):
    """A GatedSAE with random weights, two biases and magnitude scales around 1."""
    from sae_lens import GatedSAE, GatedSAEConfig

    sae = _fill(GatedSAE(GatedSAEConfig(d_in=d_in, d_sae=d_sae, **config)), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for name in ("b_gate", "b_mag", "r_mag"):
        getattr(sae, name).data = (0.3 * torch.randn(d_sae, generator=generator)).to(sae.dtype)
    return sae


def topk_sae(d_in: int = D_MODEL, d_sae: int = 24, seed: int = 0, k: int = 4, **config: object):
    """A TopKSAE with random weights."""
    from sae_lens import TopKSAE, TopKSAEConfig

    return _fill(TopKSAE(TopKSAEConfig(d_in=d_in, d_sae=d_sae, k=k, **config)), seed)


def matching_pursuit_sae(d_in: int = D_MODEL, d_sae: int = 24, seed: int = 0, **config: object):
    """A MatchingPursuitSAE with unit decoder rows that stops after a few features."""
    from sae_lens import MatchingPursuitSAE, MatchingPursuitSAEConfig

    settings = {"max_iterations": 4, "residual_threshold": 0.5, **config}
    sae = MatchingPursuitSAE(MatchingPursuitSAEConfig(d_in=d_in, d_sae=d_sae, **settings))
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(d_sae, d_in, generator=generator, dtype=torch.float64)
    sae.W_dec.data = (rows / rows.norm(dim=-1, keepdim=True)).to(sae.dtype)
    sae.b_dec.data = (0.3 * torch.randn(d_in, generator=generator)).to(sae.dtype)
    return sae


SAE_BUILDERS = {
    "standard": standard_sae,
    "jumprelu": jumprelu_sae,
    "gated": gated_sae,
    "topk": topk_sae,
    "matching_pursuit": matching_pursuit_sae,
}


def identity_sae(d_in: int = D_MODEL, **config: object):
    """A StandardSAE whose feature j is the positive part of residual coordinate j."""
    from sae_lens import StandardSAE, StandardSAEConfig

    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=d_in, **config))
    sae.W_enc.data = torch.eye(d_in, dtype=sae.dtype)
    sae.W_dec.data = torch.eye(d_in, dtype=sae.dtype)
    sae.b_enc.data.zero_()
    sae.b_dec.data.zero_()
    return sae


def random_ids(batch: int, seq: int, seed: int = 0) -> Tensor:
    """Ordinary word ids, shape [batch, seq]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCAB_SIZE, (batch, seq), generator=generator)


def _fill(sae, seed: int):
    generator = torch.Generator().manual_seed(seed)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        parameter = getattr(sae, name)
        if parameter is None:  # a gated SAE has other encoder biases
            continue
        scale = 1.0 if name.startswith("W") else 0.3
        parameter.data = (scale * torch.randn(parameter.shape, generator=generator)).to(sae.dtype)
    return sae
