import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from dsg.errors import UserError
from dsg.guard.inputs import ForwardInputs, named_arguments
from tests.guard_reference import make_guard
from tests.helpers import random_ids, standard_sae, tiny_model

IDS = random_ids(2, 4)


class Toy(nn.Module):
    def forward(self, input_ids, attention_mask=None, past_key_values=None, inputs_embeds=None):
        raise NotImplementedError


def inputs(*args, given=None, **kwargs):
    return ForwardInputs.of(named_arguments(Toy(), args, kwargs), given or {})


def test_arguments_by_name_and_position():
    module = Toy()
    assert named_arguments(module, (1, 2), {}) == {"input_ids": 1, "attention_mask": 2}
    mixed = named_arguments(module, (1,), {"attention_mask": 3, "unheard_of": 4})
    assert mixed == {"input_ids": 1, "attention_mask": 3, "unheard_of": 4}
    assert named_arguments(module, (), {"attention_mask": 3}) == {"attention_mask": 3}


def test_positional_and_keyword_inputs_are_the_same():
    mask = torch.ones_like(IDS)
    for each in (inputs(IDS, mask), inputs(input_ids=IDS, attention_mask=mask)):
        assert each.input_ids is IDS
        assert each.attention_mask is mask
        assert each.shape == (2, 4)


def test_attention_mask_of_a_filled_cache_is_cut_to_this_calls_tokens():
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    counted = inputs(IDS, mask).counted([], None)
    assert counted.tolist() == [[True, True, True, False], [True] * 4]


def test_masks_of_static_caches_are_refused():
    for mask in (torch.ones(2, 1, 4, 4), {"full_attention": None}):
        with pytest.raises(UserError, match=r"`attention_mask` must have shape \[batch, seq\]"):
            inputs(IDS, mask).counted([], None)


def test_outer_ids_stand_for_embeddings_of_the_same_length_only():
    embeds = torch.zeros(2, 4, 16)
    assert inputs(None, inputs_embeds=embeds, given={"input_ids": IDS}).input_ids is IDS
    prompt_tuned = inputs(None, inputs_embeds=torch.zeros(2, 6, 16), given={"input_ids": IDS})
    with pytest.raises(UserError, match="`token_mask` must be given with `inputs_embeds`"):
        prompt_tuned.counted([], None)


def test_models_that_embed_ids_themselves_are_guarded():
    class Embedding(LlamaForCausalLM):
        def forward(self, input_ids=None, **kwargs):
            return super().forward(inputs_embeds=self.model.embed_tokens(input_ids), **kwargs)

    plain = tiny_model()
    model = Embedding(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    guard = make_guard(standard_sae())
    with guard.attached(model) as attachment:
        model(IDS)
    assert torch.equal(attachment.density, guard.density(plain, IDS))


def test_prompt_defaults_to_everything_and_tolerates_padding():
    counted = torch.tensor([[False, True, True, True], [True, True, True, False]])
    assert inputs(IDS).prompt(counted) is None
    mask = torch.tensor([[False, True, False, False], [True, False, False, True]])
    assert torch.equal(inputs(IDS, given={"prompt_mask": mask}).prompt(counted), mask)
    behind = torch.tensor([[False, False, True, True], [True, True, True, True]])
    with pytest.raises(UserError, match="must mark the beginning of each sequence"):
        inputs(IDS, given={"prompt_mask": behind}).prompt(counted)
