import torch

from dsg.lm.compiled import recompile
from tests.guard_reference import make_guard
from tests.helpers import random_ids, standard_sae


def test_a_forward_stays_as_long_as_anybody_needs_it(model):
    layer = model.model.layers[0]
    first, second = recompile([layer]), recompile([layer])
    assert vars(layer)["forward"].__func__ is type(layer).forward
    first()
    assert "forward" in vars(layer)
    second()
    assert "forward" not in vars(layer)


def test_a_forward_of_somebody_else_is_left_alone(model):
    layer = model.model.layers[0]
    own = layer.forward = lambda *_, **__: None
    recompile([layer])()
    assert vars(layer)["forward"] is own


def test_measuring_under_a_guard_leaves_the_guards_forward(model):
    guard, ids = make_guard(standard_sae()), random_ids(2, 4)
    compiled_inside = torch.nn.ModuleList([model.model, model.model.layers[1]])
    with guard.attached(model):
        guard.density(model, ids)
        assert all("forward" in vars(module) for module in compiled_inside)
    assert not any("forward" in vars(module) for module in compiled_inside)
