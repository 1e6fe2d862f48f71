"""Every known way around a guard, on three families: it is guarded all the same, or refused."""

import copy
import io
import pickle
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, StaticCache

from dsg.errors import UserError
from dsg.guard.guard import Guard
from tests.families import FAMILIES, Family, build, greedy, with_lora
from tests.guard_reference import make_guard
from tests.helpers import BOS, WORDS, random_ids, standard_sae, tiny_tokenizer

SAE = standard_sae()
IDS = random_ids(3, 6)
NEW_TOKENS = 3
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

pytestmark = [
    pytest.mark.filterwarnings("ignore:`use_cache=True` is incompatible"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]


@dataclass
class Case:
    """A fresh model, and what the hook-free method says about the same weights.

    Attributes:
        plain: Its unguarded logits.
        guarded: Its logits under the eager guard.
        tokens: Greedy continuation of each row, decoded without cache by plain loops.
    """

    family: Family
    model: PreTrainedModel
    guard: Guard
    plain: Tensor
    guarded: Tensor
    tokens: Tensor

    def attached(self, model: nn.Module | None = None) -> Any:
        return self.guard.attached(self.model if model is None else model, decision="prompt")

    def twin(self) -> PreTrainedModel:
        return build(self.family)

    def eager(self, model: nn.Module) -> Tensor:
        """Guarded logits of another model, which nobody has touched since."""
        with self.attached(model):
            return logits(model)


@pytest.fixture(scope="module")
def known(request):
    family = next(family for family in FAMILIES if family.name == request.param)
    model = build(family)
    guard = make_guard(SAE, list(range(12)), threshold=0.0, value=-9.0)
    layer = family.layer(model, 1)
    tokens = [greedy(layer, model, SAE, guard, ids, NEW_TOKENS) for ids in IDS.tolist()]
    plain = logits(model)
    with guard.attached(model):
        guarded = logits(model)
    assert not torch.allclose(plain, guarded, atol=1e-2)
    assert model.generate(IDS, **GREEDY)[:, IDS.shape[1] :].tolist() != tokens
    return family, guard, plain, guarded, torch.tensor(tokens)


@pytest.fixture
def case(known):
    family, *rest = known
    # Else the many models of one class would be too many to compile, and all of them run eagerly.
    torch.compiler.reset()
    yield Case(family, build(family), *rest)
    torch.compiler.reset()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def base(model: PreTrainedModel) -> tuple[PreTrainedModel, str]:
    return model, model.base_model_prefix


# Compiled and called before a guard is attached: such graphs never see a hook that comes later.


def compile_around(case, attach_to, call):
    around = compiled(case.model)
    either = {"inner": case.model, "compiled": around}
    logits(around)
    with case.attached(either[attach_to]):
        return logits(either[call])


def compile_in_place(case):
    case.model.compile(backend="eager")
    logits(case.model)
    with case.attached():
        return logits(case.model)


def compile_forward(case):
    case.model.forward = compiled(case.model.forward)
    logits(case.model)
    with case.attached():
        return logits(case.model)


def compile_decoder(case):
    parent, name = base(case.model)
    setattr(parent, name, compiled(getattr(parent, name)))
    logits(case.model)
    with case.attached():
        return logits(case.model)


def compile_layers(case):
    for layer in case.model.get_submodule(case.family.layers):
        layer.compile(backend="eager")
    logits(case.model)
    with case.attached():
        return logits(case.model)


def compile_under_another_guard(case):
    around = compiled(case.model)
    with case.guard.replace(threshold=1.0).attached(case.model):
        assert torch.allclose(logits(around), case.plain, atol=1e-4)
    assert torch.allclose(logits(around), case.plain, atol=1e-4)
    with case.attached():
        found = logits(around)
    assert torch.allclose(logits(around), case.plain, atol=1e-4)
    return found


def compile_inside(case):
    with case.attached():
        return logits(compiled(case.model))


def compile_then_generate(case):
    case.model.compile(backend="eager")
    case.model.generate(IDS, **GREEDY)
    with case.attached():
        return generated(case.model)


def compile_then_measure(case):
    case.model.compile(backend="eager")
    logits(case.model)
    density = case.guard.density(case.twin(), IDS)
    assert torch.equal(case.guard.density(case.model, IDS), density)
    with case.attached():
        before = logits(case.model)
        assert torch.equal(case.guard.density(case.model, IDS), density)
        assert torch.equal(logits(case.model), before)
    assert torch.allclose(logits(case.model), case.plain, atol=1e-4)
    return before


def a_forward_that_skips_the_decoder(case):
    output = case.model(IDS)
    case.model.forward = lambda **_: output
    with case.attached():
        return logits(case.model)


# Generation.


def generated(model: Any, *args: Any, **options: Any) -> Tensor:
    rest = {} if args else GREEDY
    return model.generate(IDS, *args, **{**rest, **options})[:, IDS.shape[1] :]


def generate(**options):
    def run(case):
        with case.attached():
            return generated(case.model, **options)

    return run


def generate_by_position(**options):
    def run(case):
        with case.attached():
            return generated(case.model, GenerationConfig(**GREEDY, **options))

    return run


def generate_by_default(**options):
    def run(case):
        for name, value in options.items():
            setattr(case.model.generation_config, name, value)
        with case.attached():
            return generated(case.model, GenerationConfig(**GREEDY))

    return run


def generate_through_adapters(**options):
    def run(case):
        wrapped = with_lora(case.family, case.model)
        wrapped.disable_adapter_layers()
        with case.attached(wrapped):
            return generated(wrapped, GenerationConfig(**GREEDY, **options))

    return run


def generate_with_an_assistant(case):
    assistant = case.twin()
    with case.attached():
        return generated(case.model, assistant_model=assistant)


def generate_as_an_assistant(case):
    with case.attached():
        return case.twin().generate(IDS[:1], assistant_model=case.model, **GREEDY)


def generate_taken_before(case):
    before = case.model.generate
    with case.attached():
        return before(IDS, **GREEDY)


def generate_of_the_class(case):
    with case.attached():
        return type(case.model).generate(case.model, IDS, use_cache=False, **GREEDY)


def generate_continuously(case):
    with case.attached():
        return case.model.generate_batch(IDS.tolist())


def generate_in_a_pipeline(case):
    pipe = transformers.pipeline("text-generation", model=case.model, tokenizer=tiny_tokenizer())
    layer = case.family.layer(case.model, 1)
    prompts = [[BOS, *ids] for ids in IDS.tolist()]
    case.tokens = torch.tensor(
        [greedy(layer, case.model, SAE, case.guard, ids, NEW_TOKENS) for ids in prompts]
    )
    texts = [" ".join(WORDS[i - 4] for i in ids) for ids in IDS.tolist()]
    with case.attached():
        found = [pipe(text, return_tensors=True, **GREEDY)[0] for text in texts]
    return torch.tensor([row["generated_token_ids"][len(prompts[0]) :] for row in found])


# KV caches.


def step_by_step(case, cache, between=lambda _: None, outside=False):
    model = case.model
    if outside:
        model(IDS[:, :4], past_key_values=cache)
    with case.attached(), torch.no_grad():
        found = [model(IDS[:, :4], past_key_values=cache).logits] if not outside else []
        between(cache)
        found.append(model(IDS[:, 4:], past_key_values=cache).logits)
    return torch.cat(found, 1)


def dynamic_cache(case):
    return step_by_step(case, DynamicCache(config=case.model.config))


def cache_filled_before(case):
    return step_by_step(case, DynamicCache(config=case.model.config), outside=True)


def cache_with_moved_rows(case):
    def swap(cache):
        cache.reorder_cache(torch.tensor([1, 0, 2]))

    return step_by_step(case, DynamicCache(config=case.model.config), swap)


def cache_trimmed(case):
    def trim(cache):
        cache.crop(-1)

    return step_by_step(case, DynamicCache(config=case.model.config), trim)


def static_cache(case):
    return step_by_step(case, StaticCache(config=case.model.config, max_cache_len=16))


# Another object in the place of the model.


def deep_copy(case):
    with case.attached():
        return logits(copy.deepcopy(case.model))


def pickled(case):
    with case.attached():
        return logits(pickle.loads(pickle.dumps(case.model)))


def saved_as_a_whole(case):
    with case.attached():
        torch.save(case.model, io.BytesIO())


def shallow_copy(case):
    with case.attached():
        return logits(copy.copy(case.model))


def another_decoder(case):
    parent, name = base(case.model)
    with case.attached():
        setattr(parent, name, getattr(case.twin(), name))
        return logits(case.model)


def another_decoder_without_a_word(case):
    parent, name = base(case.model)
    with case.attached():
        parent._modules[name] = getattr(case.twin(), name)
        return logits(case.model)


def another_decoder_under_adapters(case):
    wrapped = with_lora(case.family, case.model)
    parent, name = base(case.model)
    with case.attached(case.model):
        setattr(parent, name, getattr(case.twin(), name))
        return logits(wrapped)


def another_layer(case):
    with case.attached():
        layers = case.model.get_submodule(case.family.layers)
        layers[1] = case.family.layer(case.twin(), 1)
        return logits(case.model)


def another_method(case):
    with case.attached():
        case.model.forward = types.MethodType(type(case.model).forward, case.twin())
        return logits(case.model)


def hooks_removed(case):
    with case.attached():
        for module in case.model.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        logits(case.model)


def data_parallel(case):
    with case.attached():
        return logits(nn.DataParallel(case.model))


def replica(case):
    with case.attached():
        return logits(case.model._replicate_for_data_parallel())


def without_with(case):
    attachment = case.attached()
    found = logits(case.model)
    attachment.detach()
    assert torch.equal(logits(case.model), case.plain)
    return found


# What changes the weights: the same change, made before an eager guard comes.


def changed(change: Callable[[Case, Any], Any]):
    def run(case):
        changed_before = change(case, case.twin())
        case.plain = logits(changed_before).float()
        case.guarded = case.eager(changed_before).float()
        with case.attached():
            return logits(change(case, case.model)).float()

    return run


def to_dtype(dtype):
    return changed(lambda _, model: model.to(dtype))


def adapters(case, model):
    torch.manual_seed(1)
    return with_lora(case.family, model)


def merged(case, model):
    wrapped = adapters(case, model)
    wrapped.merge_adapter()
    return wrapped


def unloaded(case, model):
    return adapters(case, model).merge_and_unload()


def checkpointed(case):
    def gradient(model):
        model.train()
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        return model.get_input_embeddings().weight.grad

    case.plain = gradient(case.twin())
    with case.attached():
        case.guarded = gradient(case.model)
    case.model = case.twin()
    with case.attached():
        case.model.gradient_checkpointing_enable()
        return gradient(case.model)


REFUSED_GENERATION = [
    ({"use_cache": False}, "`use_cache` must be true"),
    ({"prefill_chunk_size": 2}, "`prefill_chunk_size` must be None"),
    ({"num_beams": 2}, "got beam search"),
    ({"cache_implementation": "static"}, "got 'static'"),
    ({"prompt_lookup_num_tokens": 2}, "got assisted generation"),
]
GUARDED, COPIED, REPLACED = None, "must not be copied or pickled", "decoder must stay the one"
ROUTES = [
    *(
        (f"compiled-{call}-attached-{to}", lambda c, t=to, n=call: compile_around(c, t, n), GUARDED)
        for to, call in [("inner", "compiled"), ("compiled", "inner"), ("compiled", "compiled")]
    ),
    ("compile-in-place", compile_in_place, GUARDED),
    ("compile-forward", compile_forward, GUARDED),
    ("compile-decoder", compile_decoder, GUARDED),
    ("compile-layers", compile_layers, GUARDED),
    ("compile-under-another-guard", compile_under_another_guard, GUARDED),
    ("compile-inside", compile_inside, GUARDED),
    ("compile-then-generate", compile_then_generate, GUARDED),
    ("compile-then-measure", compile_then_measure, GUARDED),
    ("forward-without-decoder", a_forward_that_skips_the_decoder, "must run in each forward pass"),
    ("generate", generate(), GUARDED),
    ("generate-by-position", generate_by_position(), GUARDED),
    ("generate-through-adapters", generate_through_adapters(), GUARDED),
    *(
        (f"generate-{way.__name__[9:]}-{next(iter(options))}", way(**options), message)
        for way in (
            generate,
            generate_by_position,
            generate_by_default,
            generate_through_adapters,
        )
        for options, message in REFUSED_GENERATION
    ),
    ("generate-with-an-assistant", generate_with_an_assistant, "got assisted generation"),
    ("generate-as-an-assistant", generate_as_an_assistant, "were moved, trimmed or offloaded"),
    ("generate-custom", generate(custom_generate=lambda **_: 1), "got `custom_generate`"),
    ("generate-taken-before", generate_taken_before, "taken before the guard was attached"),
    ("generate-of-the-class", generate_of_the_class, "taken before the guard was attached"),
    ("generate-continuously", generate_continuously, "got continuous batching"),
    ("pipeline", generate_in_a_pipeline, GUARDED),
    ("dynamic-cache", dynamic_cache, GUARDED),
    ("static-cache", static_cache, GUARDED),
    ("cache-filled-before", cache_filled_before, "must be filled while the guard is attached"),
    ("cache-with-moved-rows", cache_with_moved_rows, "rows of a KV cache must stay in place"),
    ("cache-trimmed", cache_trimmed, "rows of a KV cache must stay in place"),
    ("deepcopy", deep_copy, COPIED),
    ("pickle", pickled, COPIED),
    ("torch-save", saved_as_a_whole, COPIED),
    ("copy", shallow_copy, "got a replica or a copy"),
    ("another-decoder", another_decoder, REPLACED),
    ("another-decoder-without-a-word", another_decoder_without_a_word, REPLACED),
    ("another-decoder-under-adapters", another_decoder_under_adapters, REPLACED),
    ("another-layer", another_layer, "must run in each forward pass"),
    ("another-method", another_method, "must run in each forward pass"),
    ("hooks-removed", hooks_removed, "but one was removed"),
    ("data-parallel", data_parallel, GUARDED),
    ("replica", replica, "use DistributedDataParallel"),
    ("without-with", without_with, GUARDED),
    ("to-bfloat16", to_dtype(torch.bfloat16), GUARDED),
    ("to-float64", to_dtype(torch.float64), GUARDED),
    ("adapters", changed(adapters), GUARDED),
    ("adapters-merged", changed(merged), GUARDED),
    ("adapters-unloaded", changed(unloaded), GUARDED),
    ("gradient-checkpointing", checkpointed, GUARDED),
]


NAMES = ("Llama", "Gemma2", "GPTNeoX")
# A compilation takes seconds: among the fast rows stands one of each depth.
FAST_COMPILATIONS = {
    "Llama-compiled-compiled-attached-inner",
    "Gemma2-compile-layers",
    "GPTNeoX-compile-decoder",
}


def rows():
    for family in NAMES:
        for name, run, refusal in ROUTES:
            slow = name.startswith("compile") and f"{family}-{name}" not in FAST_COMPILATIONS
            marks = [pytest.mark.slow] if slow else []
            yield pytest.param(family, run, refusal, id=f"{family}-{name}", marks=marks)


@pytest.mark.parametrize(("known", "run", "refusal"), list(rows()), indirect=["known"])
def test_every_route_is_guarded_or_refused(case, run, refusal):
    if refusal is not None:
        with pytest.raises(UserError, match=refusal):
            run(case)
        return
    found = run(case)
    if found.dtype == torch.int64:
        assert torch.equal(found, case.tokens)
    else:
        torch.testing.assert_close(found, case.guarded, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(found, case.plain, atol=1e-2)
