"""The command on tiny folders: its table, its verdict, its exit status, its file."""

import argparse
import json

import pytest
import torch

from dsg.cli import check
from dsg.errors import UserError
from tests.helpers import D_MODEL, HOOK_POINT, WORDS, standard_sae, tiny_model, tiny_tokenizer


def parse(*words):
    parser = argparse.ArgumentParser(prog="dsg check")
    check.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def signed_identity_sae(order):
    sae = standard_sae(d_sae=2 * D_MODEL)
    both = torch.cat([torch.eye(D_MODEL), -torch.eye(D_MODEL)])
    sae.W_enc.data, sae.W_dec.data = both.T.contiguous(), both[order].clone()
    sae.b_enc.data.zero_()
    sae.b_dec.data.zero_()
    sae.cfg.metadata.hook_name = HOOK_POINT
    sae.cfg.metadata.model_name = "org/folder"
    return sae


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`model/`, `identity/`, `shuffled/` and two files of text: 60 paragraphs of 20 words each."""
    folder = tmp_path_factory.mktemp("check")
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    signed_identity_sae(torch.arange(32)).save_model(folder / "identity")
    order = torch.randperm(32, generator=torch.Generator().manual_seed(3))
    signed_identity_sae(order).save_model(folder / "shuffled")
    generator = torch.Generator().manual_seed(0)
    paragraphs = [
        " ".join(WORDS[i] for i in torch.randint(0, 26, (20,), generator=generator).tolist())
        for _ in range(60)
    ]
    (folder / "a.txt").write_text("\n\n".join(paragraphs[:30]) + "\n\n \n\n")
    lines = (json.dumps({"text": paragraph}) for paragraph in paragraphs[30:])
    (folder / "b.jsonl").write_text("\n".join(lines))
    return folder


def options(folder, sae, *more):
    files = ["--text", folder / "a.txt", folder / "b.jsonl"]
    return parse(
        "--model", folder / "model", "--sae", folder / sae, "--hook_point", HOOK_POINT,
        *files, *more,
    )  # fmt: skip


def test_identity_is_doubtful_only_for_not_being_sparse(folder, capsys):
    out = folder / "fit.json"
    assert check.run(options(folder, "identity", "--json", out, "--clamp_value", "-20")) == 0
    printed = capsys.readouterr().out
    assert "verdict: doubtful" in printed
    assert "16 features are active per token, more than 0.25 of the width 16" in " ".join(
        printed.split()
    )
    for label, value in (
        ("counted tokens", "1200"),
        ("variance unexplained (FVU)", "0.0000"),
        ("active features per token (L0)", "16.00"),
        ("features x width", "32 x 16"),
        ("hook point the SAE records", HOOK_POINT),
        ("model the SAE records", "org/folder"),
        ("added by the reconstruction", "+0.0000"),
    ):
        [line] = [line for line in printed.splitlines() if label in line]
        assert value in line
    found = json.loads(out.read_text())
    assert found["verdict"] == "doubtful"
    assert found["num_texts"] == 60
    assert found["num_tokens"] == 1200
    assert found["l0"] == 16.0
    assert found["loss_added"] == 0.0
    assert found["clamp_value"] == -20.0
    assert found["dead_share"] == 0.0
    assert found["hook_point_agrees"] is True
    assert found["model_agrees"] is None  # the folder is called otherwise
    assert any("not sparse" in reason for reason in found["reasons"])


def test_shuffled_does_not_fit_and_exits_with_1(folder, capsys):
    assert check.run(options(folder, "shuffled")) == 1
    printed = capsys.readouterr().out
    assert "verdict: does not fit" in printed
    assert "of the variance is unexplained; more than 0.7 is no fit." in " ".join(printed.split())


def test_sizes_change_what_is_read_and_nothing_else(folder):
    found = {}
    for name, more in {
        "all": (),
        "small batches": ("--batch_size", "3"),
        "short": ("--max_length", "11"),
        "few": ("--max_texts", "10"),
    }.items():
        out = folder / f"{name}.json"
        check.run(options(folder, "shuffled", "--json", out, *more))
        found[name] = json.loads(out.read_text())
    assert found["small batches"]["fvu"] == pytest.approx(found["all"]["fvu"], rel=1e-6)
    assert found["small batches"]["loss"] == pytest.approx(found["all"]["loss"], abs=1e-6)
    assert found["short"]["num_tokens"] == 60 * 10  # bos is one of the eleven
    assert (found["few"]["num_texts"], found["few"]["num_tokens"]) == (10, 200)


def test_few_texts_are_taken_from_all_files(folder):
    texts = check._texts(options(folder, "identity", "--max_texts", "4"))
    everything = check._texts(options(folder, "identity"))
    assert len(everything) == 60
    assert texts == [everything[0], everything[15], everything[30], everything[45]]


def test_embedded_benchmark_brings_its_own_text():
    words = ("--model", "tiny_world:3/model", "--sae", "x", "--hook_point", HOOK_POINT)
    from datamodules.tiny_world.texts import TinyWorldTexts

    world = TinyWorldTexts(3, "pathogen")
    texts = check._texts(parse(*words))
    assert len(texts) == len(set(texts)) == 200
    assert len(set(texts) & set(world.retain_texts())) == 100
    assert len(set(texts) & set(world.forget_texts())) == 100


def test_embedded_benchmark_is_resolved_and_named(folder, monkeypatch):
    from dsg.cli import lightning_cli

    places = {"tiny_world:3/model": folder / "model", "tiny_world:3/sae": folder / "named"}
    sae = signed_identity_sae(torch.arange(32))
    sae.cfg.metadata.model_name = "tiny_world:3"
    sae.save_model(folder / "named")
    monkeypatch.setattr(lightning_cli, "resolve_benchmark", lambda name: str(places[name]))
    out = folder / "named.json"
    embedded = ("--model", "tiny_world:3/model", "--sae", "tiny_world:3/sae")
    assert check.run(options(folder, "x", *embedded, "--json", out)) == 0
    found = json.loads(out.read_text())
    assert found["model_agrees"] is True
    assert found["model"] == "tiny_world:3/model"


class TestErrors:
    def test_no_text(self, folder):
        words = ("--model", folder / "model", "--sae", folder / "identity")
        with pytest.raises(UserError, match="--text is needed for any model but the embedded one"):
            check.run(parse(*words, "--hook_point", HOOK_POINT))

    def test_empty_text(self, folder):
        (folder / "empty.txt").write_text(" \n\n ")
        with pytest.raises(UserError, match=r"empty\.txt' is empty"):
            check.run(options(folder, "identity", "--text", folder / "empty.txt"))

    def test_missing_text(self, folder):
        with pytest.raises(UserError, match="cannot be read"):
            check.run(options(folder, "identity", "--text", folder / "absent.txt"))

    def test_hook_point(self, folder):
        with pytest.raises(UserError, match="`hook_point` must name"):
            check.run(options(folder, "identity", "--hook_point", "blocks.9.hook_resid_post"))

    def test_width(self, folder):
        standard_sae(d_in=8).save_model(folder / "narrow")
        with pytest.raises(UserError, match="residual width 16, got 8"):
            check.run(options(folder, "narrow"))

    def test_max_texts(self, folder):
        with pytest.raises(UserError, match="--max_texts must be at least 1, got 0"):
            check.run(options(folder, "identity", "--max_texts", "0"))


def test_help_tells_options_and_exit_status(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "Exit status: 0 if it fits or is doubtful, 1 if it does not fit" in text
    assert "(default: -500.0)" in text
    assert "(default: 200)" in text
