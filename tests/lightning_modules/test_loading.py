"""Models and tokenizers by name and revision, from a folder, the hub's cache and nowhere."""

import re
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from datamodules.parts.loading import load_tokenizer
from dsg.errors import UserError
from dsg.io.results import read_run_facts
from dsg.lm.identity import ModelIdentity
from dsg.lm.pretrained import ADAPTER_WEIGHTS, load_model, short_name
from dsg.sae.loading import load_sae
from lightning_modules import EvaluationModule
from tests.families import FAMILIES, build
from tests.helpers import standard_sae, tiny_model
from tests.hub_folders import write_cache, write_gemma, write_gemma_scope
from tests.lightning_modules.toy import ToyData, guard_settings, make_trainer

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


def test_a_run_tells_the_commit_of_its_model(toy, cache, tmp_path):
    for commit, revisions in ((OLD, ["v1"]), (NEW, ["main"])):
        write_cache(cache, "org/name", commit, toy / "model", revisions)
    snapshot = cache / "models--org--name" / "snapshots" / OLD
    for number, (name, label, commit) in enumerate(
        [
            ("org/name@v1", "org/name", OLD),
            ("org/name", "org/name", NEW),
            (f"org/name@{OLD}", "org/name", OLD),
            (str(snapshot), OLD, OLD),
            (str(toy / "model"), "model", None),
        ]
    ):
        run_dir = tmp_path / str(number)
        run_dir.mkdir()
        module = EvaluationModule(name, guard_settings(toy))
        make_trainer(run_dir).test(module, ToyData(), verbose=False)
        told = read_run_facts(run_dir)["model"]
        assert (told["name"], told["revision"]) == (label, commit)
        # The guard remembers it, and a model that is saved does not carry it on.
        assert module.guard is not None
        assert module.guard.model is not None
        assert module.guard.model.revision == commit
        assert module.model is not None
        module.model.save_pretrained(run_dir / "copy")
        assert ModelIdentity.of(load_model(str(run_dir / "copy"))).revision is None


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


@pytest.fixture
def rewritten(tmp_path):
    """Save a tiny Llama, change the weights of its file, and give the folder."""

    def make(change, **config):
        tiny_model(**config).save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        change(weights)
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return str(tmp_path)

    return make


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("model.norm.weight"), r"whose weights lack model\.norm\.weight; download"),
        (
            lambda w: [w.pop(key) for key in list(w) if ".0." in key],
            r"lack model\.layers\.0\.input_layernorm\.weight, .*, .* and 6 more;",
        ),
        (
            lambda w: w.update({"model.layers.3.mlp.up_proj.weight": torch.zeros(2, 2)}),
            r"add model\.layers\.3\.mlp\.up_proj\.weight;",
        ),
        (
            lambda w: w.update({"model.norm.weight": torch.zeros(3)}),
            r"have model\.norm\.weight of shape \[3\] for \[16\];",
        ),
    ],
)
def test_weights_must_fit_the_model(rewritten, change, said):
    with pytest.raises(UserError, match=said) as caught:
        load_model(rewritten(change))
    assert "\n" not in str(caught.value)


def test_a_head_that_is_not_tied_must_be_there(rewritten):
    with pytest.raises(UserError, match=r"lack lm_head\.weight"):
        load_model(rewritten(lambda w: w.pop("lm_head.weight"), tie_word_embeddings=False))


def test_tied_heads_and_buffers_may_be_left_out_and_old_buffers_left_in(rewritten):
    def change(weights):
        assert "lm_head.weight" not in weights
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(3)

    model = load_model(rewritten(change, tie_word_embeddings=True))
    weights = dict(model.named_parameters(remove_duplicate=False))
    assert weights["lm_head.weight"] is weights["model.embed_tokens.weight"]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_saved_models_of_all_families_load(family, tmp_path):
    saved = build(family)
    saved.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path)).state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in saved.state_dict().items())


def test_old_buffers_of_gpt_2_may_be_left_in(tmp_path):
    [gpt2] = [family for family in FAMILIES if family.name == "GPT2"]
    build(gpt2).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name in ("bias", "masked_bias"):
        weights[f"transformer.h.0.attn.{name}"] = torch.zeros(1)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load_model(str(tmp_path))


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.999])
def test_damaged_weights_are_one_sentence(rewritten, share):
    file = Path(rewritten(dict)) / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(UserError, match=r"whose files are whole, got .* with damaged weights"):
        load_model(str(file.parent))


@pytest.fixture
def adapter(tmp_path):
    """Folder of a LoRA adapter beside its base model."""
    tiny_model().save_pretrained(tmp_path / "base")
    settings = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(load_model(str(tmp_path / "base")), settings)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model


def test_an_adapter_loads_with_all_its_weights(adapter):
    folder, saved = adapter
    loaded = load_model(str(folder)).state_dict()
    names = [name for name in saved.state_dict() if "lora_" in name]
    assert len(names) == 6
    assert all(torch.equal(saved.state_dict()[name], loaded[name]) for name in names)
    # Some save the embedding beside an adapter that leaves it alone.
    weights = load_file(folder / ADAPTER_WEIGHTS)
    weights["base_model.model.model.embed_tokens.weight"] = torch.zeros(30, 16)
    save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    load_model(str(folder))


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_an_adapter_of_another_model_is_refused(adapter):
    folder, _ = adapter
    weights = load_file(folder / ADAPTER_WEIGHTS)
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    moved = {name.replace("layers.1.", "layers.7."): of for name, of in weights.items()}
    for content, said in (
        ({name: of for name, of in weights.items() if name != key}, f"lack {re.escape(key)};"),
        (moved, r"lack .*layers\.1.* and add .*layers\.7.*;"),
    ):
        save_file(content, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(UserError, match=said):
            load_model(str(folder))
    (folder / ADAPTER_WEIGHTS).write_bytes(b"none")
    with pytest.raises(UserError, match="with damaged weights"):
        load_model(str(folder))
