"""Models and tokenizers by name and revision, from a folder, the hub's cache and nowhere."""

import shutil

import huggingface_hub.constants
import pytest
import torch
from transformers import AutoModelForCausalLM

from datamodules.loading import load_tokenizer
from dsg.errors import UserError
from dsg.sae import load_sae
from lightning_modules.loading import load_model, short_name
from tests.helpers import standard_sae, tiny_model
from tests.hub_folders import write_gemma, write_gemma_scope

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return write_gemma(tmp_path_factory.mktemp("gemma"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub, which cannot be asked itself."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def keep(cache, repository, commit, *revisions):
    """Make the place of one commit in the cache, and the names that point to it."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    for revision in revisions:
        (folder / "refs" / revision).write_text(commit)
    return folder / "snapshots" / commit


def test_a_saved_gemma_keeps_its_weights_and_template(gemma):
    model, tokenizer = load_model(str(gemma)), load_tokenizer(str(gemma))
    assert model.dtype == torch.float32
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    reference = AutoModelForCausalLM.from_pretrained(gemma)
    for name, weight in reference.named_parameters():
        assert torch.equal(weight, model.get_parameter(name))
    chat = [{"role": "user", "content": " hi "}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n"
    assert [tokenizer(word)["input_ids"][1:] for word in (" A", "A")] == [
        [tokenizer.convert_tokens_to_ids("ĠA")],
        [tokenizer.convert_tokens_to_ids("A")],
    ]


def test_a_revision_chooses_among_copies(gemma, cache):
    tiny_model(num_layers=1).save_pretrained(keep(cache, "org/name", OLD, "v1"))
    shutil.copytree(gemma, keep(cache, "org/name", NEW, "main"))
    assert load_model("org/name").config.model_type == "gemma2"
    assert load_model(f"org/name@{NEW}").config.model_type == "gemma2"
    for revision in ("v1", OLD):
        assert load_model(f"org/name@{revision}").config.model_type == "llama"
    assert load_tokenizer("org/name@main").eos_token == "<eos>"
    assert short_name("org/name@v1") == "org/name"


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_what_the_cache_does_not_hold_is_one_sentence(load, cache):
    assert not list(cache.iterdir())
    with pytest.raises(UserError) as caught:
        load("google/gemma-2-2b-it@v1")
    message = str(caught.value)
    assert message.startswith("`model_name` names the model 'google/gemma-2-2b-it' of the Hugging")
    assert "(HF_HUB_OFFLINE is set and the cache has no such copy)" in message
    assert "https://huggingface.co/google/gemma-2-2b-it if" in message
    assert "HF_TOKEN" in message
    assert "\n" not in message


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_path_is_not_looked_for_on_the_hub(load, tmp_path):
    with pytest.raises(UserError, match="must be a Hugging Face folder or hub name") as caught:
        load(str(tmp_path / "missing"))
    assert "licence" not in str(caught.value)


def test_pickled_weights_are_not_read(gemma, tmp_path):
    shutil.copytree(gemma, tmp_path / "pickled")
    (tmp_path / "pickled/model.safetensors").unlink()
    torch.save(load_model(str(gemma)).state_dict(), tmp_path / "pickled/pytorch_model.bin")
    with pytest.raises(UserError, match=r"no file named model\.safetensors"):
        load_model(str(tmp_path / "pickled"))


def test_a_pinned_sae_comes_from_its_revision(cache):
    release, sae_id = "gemma-scope-2b-pt-res", "layer_3/width_16k/average_l0_142"
    repository = "google/gemma-scope-2b-pt-res"
    write_gemma_scope(keep(cache, repository, OLD, "v1") / sae_id)
    standard_sae(d_sae=7).save_model(keep(cache, repository, NEW, "main") / sae_id)
    assert load_sae(f"{release}@v1", sae_id).cfg.d_sae == 16_384
    assert load_sae(f"{repository}@{NEW}", sae_id).cfg.d_sae == 7
    with pytest.raises(UserError, match=r"`sae` names the SAE 'google/gemma-scope-2b-pt-res'"):
        load_sae(f"{release}@v2", sae_id)
