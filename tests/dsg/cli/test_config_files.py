"""What model and data share is stated once."""

import pytest
import yaml

from dsg.cli.config_files import with_shared
from dsg.errors import UserError


@pytest.fixture
def given(tmp_path):
    """Write a configuration, and give the command line that runs it."""

    def write(model, data, data_class="datamodules.TinyWorldData"):
        content = {
            "model": {"class_path": "lightning_modules.EvaluationModule", "init_args": model},
            "data": {"class_path": data_class, "init_args": data},
        }
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(content))
        return ["test", "-c", str(path)]

    return write


def added(arguments):
    result = with_shared(arguments)
    assert result[: len(arguments)] == arguments
    return result[len(arguments) :]


def test_the_data_takes_what_the_model_says(given):
    arguments = given({"model_name": "m", "seed": 3, "base_model_name": "b"}, {})
    # This data module has no `base_model_name`.
    assert added(arguments) == ["--data.init_args.model_name=m", "--data.init_args.seed=3"]


def test_the_command_line_comes_after_the_files(given):
    arguments = given({"model_name": "m", "seed": 3}, {"seed": 3})
    assert added([*arguments, "--model.model_name", "other"]) == [
        "--data.init_args.model_name=other"
    ]
    assert added([*arguments, "--data.init_args.model_name=m"]) == []


def test_what_the_model_leaves_open_stays_open(given):
    assert added(given({"model_name": "m", "seed": None}, {"seed": 1, "model_name": "m"})) == []


def test_a_data_module_inside_of_another_takes_it_too(given):
    inner = {"class_path": "datamodules.TinyWorldData"}
    arguments = given({"model_name": "m"}, {"of": inner}, "datamodules.ItemTextsData")
    assert added(arguments) == ["--data.init_args.of.init_args.model_name=m"]


def test_an_unknown_class_is_left_to_the_parser(given):
    assert added(given({"model_name": "m"}, {}, "datamodules.NoSuchData")) == []


@pytest.mark.parametrize("name", ["seed", "base_model_name"])
def test_a_second_value_that_differs_is_refused(given, name):
    arguments = given({name: "0"}, {name: "1"}, "datamodules.MultipleChoiceData")
    with pytest.raises(UserError) as error:
        with_shared(arguments)
    assert str(error.value) == (
        f"`{name}` of the data must be that of the model, '0', got '1'; give it once, to the model."
    )


@pytest.mark.parametrize("places", [({"seed": 5}, {}), ({"seed": None}, {"seed": 5})])
def test_the_model_of_one_world_is_not_asked_about_another(given, places):
    model, data = places
    named = {"model_name": "tiny_world:0/model"}
    with pytest.raises(UserError, match=r"`seed` must be that of the model's world, 0 of .* got 5"):
        with_shared(given(named | model, data))
    with_shared(given({"model_name": "tiny_world:5/model"} | model, data))
    with_shared(given(named | model, data, "datamodules.TextFilesData"))
