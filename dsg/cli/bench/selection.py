"""What selection costs: memory against the amount of text, time against whole forward passes."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from dsg.cli.bench.edit import random_sae
from dsg.cli.bench.tables import highest_memory
from dsg.lm import TokenBatch, hidden_states, read_activations, resolve_hook_point
from dsg.selection import collect_statistics

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

# Small, so that half a million tokens take about a minute: statistics hold d_sae numbers each, and
# the width of the stream only decides how large the weights are.
MEMORY_D_IN = 64
NUM_LAYERS, HOOK_LAYER = 12, 3

_SPEED_WIDTH = 256
_VOCAB_SIZE = 512
# Few tokens at a time: collecting is several times faster where its working copies fit the cache.
MEMORY_BATCH = (2, 64)
_SPEED_BATCH = (8, 128)
_MEASURE_HERE = """
import dataclasses, json
from dsg.cli.bench.selection import measure_memory_here
json.dump(dataclasses.asdict(measure_memory_here(*map(int, sys.argv[1:]))), sys.stdout)
"""


@dataclass(frozen=True)
class SelectionMemory:
    """Memory of collecting statistics over some amount of text.

    Attributes:
        num_tokens: Counted tokens.
        d_in: Width of the residual stream.
        d_sae: Number of features.
        increase_bytes: How far collecting raised the highest resident memory of its process.
        all_activations_bytes: What float32 activations of all features and tokens would take.
        seconds: Time of collecting.
    """

    num_tokens: int
    d_in: int
    d_sae: int
    increase_bytes: int
    all_activations_bytes: int
    seconds: float


@dataclass(frozen=True)
class EarlyStop:
    """Reading activations with and without the layers behind the hook point.

    Attributes:
        num_layers: Decoder layers of the model.
        hook_layer: The last layer that has to run.
        ratio: Median time of a whole forward pass / median time of one that stops.
        stopped_tokens_per_second: Tokens per second of the passes that stop.
        whole_tokens_per_second: Tokens per second of the whole passes.
        identical: Both gave the same activations, bit for bit.
    """

    num_layers: int
    hook_layer: int
    ratio: float
    stopped_tokens_per_second: float
    whole_tokens_per_second: float
    identical: bool


def measure_memory(num_tokens: int, d_sae: int, seed: int) -> SelectionMemory:
    """Collects statistics in a fresh process, whose highest memory nothing else has raised.

    Args:
        num_tokens: Amount of text, at least 1 token.
        d_sae: Number of features.
        seed: Of weights and tokens.

    Raises:
        RuntimeError: If the process fails.
    """
    # The package may lie in a folder that another process would not search.
    code = f"import sys\nsys.path[:] = {sys.path!r}\n{_MEASURE_HERE}"
    arguments = [sys.executable, "-c", code, str(num_tokens), str(d_sae), str(seed)]
    # Freed tensors go back to the system at once: otherwise the peak tells which of them the
    # allocator happened to keep, and differs by half from run to run.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"measuring the memory of selection failed:\n{done.stderr}")
    return SelectionMemory(**json.loads(done.stdout.splitlines()[-1]))


def measure_memory_here(num_tokens: int, d_sae: int, seed: int) -> SelectionMemory:
    """Collects statistics in this process; the increase is right if nothing ran before.

    Args:
        num_tokens: Amount of text, at least 1 token.
        d_sae: Number of features.
        seed: Of weights and tokens.
    """
    sae = random_sae(MEMORY_D_IN, d_sae, seed)
    model = _random_llama(MEMORY_D_IN, 1, seed)
    before, start = highest_memory(), time.perf_counter()
    batches = random_batches(num_tokens, MEMORY_BATCH, seed)
    statistics = collect_statistics(model, sae, "blocks.0.hook_resid_post", batches)
    seconds = time.perf_counter() - start
    return SelectionMemory(
        num_tokens=statistics.num_tokens,
        d_in=MEMORY_D_IN,
        d_sae=statistics.d_sae,
        increase_bytes=highest_memory() - before,
        all_activations_bytes=4 * statistics.num_tokens * statistics.d_sae,
        seconds=seconds,
    )


def random_batches(num_tokens: int, shape: tuple[int, int], seed: int) -> Iterator[TokenBatch]:
    """Batches of random tokens, made one at a time; the last is cut to one shorter sequence.

    Args:
        num_tokens: Tokens of all batches together.
        shape: Sequences per batch, and their length.
        seed: Of the tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, num_tokens, shape[0] * shape[1]):
        left = num_tokens - start
        size = shape if left >= shape[0] * shape[1] else (1, left)
        input_ids = torch.randint(_VOCAB_SIZE, size, generator=generator)
        counted = torch.ones_like(input_ids, dtype=torch.bool)
        yield TokenBatch(input_ids, torch.ones_like(input_ids), counted)


@torch.no_grad()
def measure_early_stop(repeats: int, seed: int) -> EarlyStop:
    """Times reading activations of a twelve-layer model behind its fourth layer.

    Args:
        repeats: Timed passes of each kind, in turn.
        seed: Of weights and tokens.
    """
    model = _random_llama(_SPEED_WIDTH, NUM_LAYERS, seed)
    hook_point = f"blocks.{HOOK_LAYER}.hook_resid_post"
    batch = next(random_batches(math.prod(_SPEED_BATCH), _SPEED_BATCH, seed))
    seconds: dict[str, list[float]] = {"stopped": [], "whole": []}
    readers = {"stopped": read_activations, "whole": _read_in_whole_pass}
    activations: dict[str, Tensor] = {}
    for repeat in range(repeats + 1):
        for name, read in readers.items():
            start = time.perf_counter()
            activations[name] = read(model, hook_point, batch)
            if repeat > 0:  # the first passes warm up
                seconds[name].append(time.perf_counter() - start)
    stopped, whole = median(seconds["stopped"]), median(seconds["whole"])
    num_tokens = batch.input_ids.numel()
    return EarlyStop(
        num_layers=NUM_LAYERS,
        hook_layer=HOOK_LAYER,
        ratio=whole / stopped,
        stopped_tokens_per_second=num_tokens / stopped,
        whole_tokens_per_second=num_tokens / whole,
        identical=torch.equal(activations["stopped"], activations["whole"]),
    )


def _read_in_whole_pass(
    model: "LlamaForCausalLM", hook_point: str, batch: TokenBatch
) -> Float[Tensor, "batch seq d_in"]:
    captured: list[Tensor] = []
    handle = resolve_hook_point(model, hook_point).register_forward_hook(
        lambda *call: captured.append(hidden_states(call[2]))
    )
    try:
        model(**batch.model_inputs(), use_cache=False)
    finally:
        handle.remove()
    return captured[0]


def _random_llama(width: int, num_layers: int, seed: int) -> "LlamaForCausalLM":
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=_VOCAB_SIZE,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
        # The scale at which some of `random_sae`'s features are active.
        torch.nn.init.normal_(model.model.embed_tokens.weight, std=2.0)
    return model
