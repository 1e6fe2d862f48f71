"""Letter questions, prompts to continue and a benchmark's own numbers in an evaluation run."""

import math
from dataclasses import replace

import numpy as np
import pytest
from torch.utils.data import DataLoader

from datamodules.parts.loading import passage_loader, prompt_loader, question_loader
from dsg.evaluation.items import Prompt, Question, item_key
from dsg.evaluation.items_file import read_items
from dsg.evaluation.summary import Measurement
from dsg.io.results import read_results
from lightning_modules import EvaluationModule
from tests.dsg.evaluation.scoring_helpers import make_passages
from tests.helpers import tiny_model, tiny_tokenizer
from tests.lightning_modules.toy import ToyData, guard_settings, make_trainer, save_toy

LETTERS = (" w0", " w1", " w2", " w3")


class Benchmark(ToyData):
    """Questions with letters, passages after a context, and prompts."""

    def questions(self, split: str) -> list[Question]:
        return [
            replace(
                question,
                form=None,
                options=LETTERS,
                protocol="lm_eval",
                shown=None,
                pool="all",
                key=item_key(question.prompt),
            )
            for question in super().questions(split)
        ]

    def passages(self, split: str):
        del split
        return [replace(passage, context="w1 w2 ") for passage in make_passages(seed=5)]

    def prompts(self, split: str) -> list[Prompt]:
        del split
        return [
            Prompt(i, "forget" if i % 2 else "retain", f"w{i} w{i + 3}", "w1 w2", 3 + i % 2)
            for i in range(7)
        ]

    def measure(self, split: str, samples) -> list[Measurement]:
        total = math.fsum(samples["prompts"]["num_tokens"].tolist())
        return [Measurement(split, "generated_tokens", "own", total, 7)]

    def test_dataloader(self) -> list[DataLoader]:
        size, trainer, tokenizer = self.batch_size, self.trainer, self.tokenizer
        return [
            question_loader(tokenizer, self.questions("test"), size, trainer),
            passage_loader(tokenizer, self.passages("test"), size, trainer),
            prompt_loader(tokenizer, self.prompts("test"), size, trainer),
        ]


def evaluate(toy, run_dir, batch_size=4, **trainer):
    module = EvaluationModule(str(toy / "model"), guard=guard_settings(toy))
    make_trainer(run_dir, **trainer).test(module, Benchmark(batch_size=batch_size), verbose=False)
    return read_results(run_dir)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    toy = save_toy(tmp_path_factory.mktemp("toy"))
    evaluate(toy, toy / "run")
    return toy / "run"


def test_all_kinds_are_measured(run_dir):
    rows = read_results(run_dir)
    found = {(r["guard"], r["domain"], r["metric"], r["protocol"]): r for r in rows}
    assert found["on", "all", "accuracy", "lm_eval"]["n"] == 15
    assert found["off", "retain", "rouge_l", "generation"]["n"] == 4
    assert ("on", "forget", "trigger_rate", "generation") in found
    assert ("on", "forget", "alignment", "lm_eval") in found
    items = read_items(run_dir)
    for guard in ("off", "on"):
        said = [i for i in items if (i["guard"], i["kind"]) == (guard, "prompts")]
        wanted = sum(item["num_tokens"] for item in said)
        assert found[guard, "test", "generated_tokens", "own"]["value"] == wanted


def test_gibberish_is_told_by_what_the_unguarded_model_says(run_dir):
    items = [item for item in read_items(run_dir) if item["kind"] == "prompts"]
    rates = {
        (row["guard"], row["domain"]): row["value"]
        for row in read_results(run_dir)
        if row["metric"] == "gibberish_rate"
    }
    assert len(rates) == 4
    for (guard, domain), rate in rates.items():
        found = {
            state: [i["nll"] for i in items if (i["guard"], i["domain"]) == (state, domain)]
            for state in ("off", guard)
        }
        # Whoever says nothing is not counted.
        nll = {state: [x for x in of if not math.isnan(x)] for state, of in found.items()}
        limit = np.percentile(nll["off"], 99) + math.log(10)
        assert rate == pytest.approx(np.mean([loss > limit for loss in nll[guard]]), abs=1e-6)


def test_every_item_is_on_disk(run_dir):
    items = read_items(run_dir)
    counts = {
        kind: sum(item["kind"] == kind for item in items) for kind in ("questions", "prompts")
    }
    assert counts == {"questions": 30, "prompts": 14}
    data = Benchmark()
    keys = [question.key for question in data.questions("test")]
    asked = [item for item in items if (item["kind"], item["guard"]) == ("questions", "on")]
    assert [item["key"] for item in asked] == keys
    accuracy = sum(item["correct"] for item in asked) / len(asked)
    rows = [r for r in read_results(run_dir) if r["guard"] == "on" and r["domain"] == "all"]
    assert {r["value"] for r in rows if r["metric"] == "accuracy"} == {round(accuracy, 6)}


def test_what_was_generated_without_a_guard_is_what_the_model_says(run_dir):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    items = read_items(run_dir)
    texts = {i["id"]: i["text"] for i in items if (i["kind"], i["guard"]) == ("prompts", "off")}
    for prompt in Benchmark().prompts("test"):
        inputs = tokenizer(prompt.text, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=prompt.max_new_tokens, do_sample=False)
        said = output[0, inputs["input_ids"].shape[1] :]
        assert texts[prompt.id] == tokenizer.decode(said, skip_special_tokens=True)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_several_ranks_equal_one(toy, tmp_path, num_ranks):
    evaluate(toy, tmp_path / "one")
    evaluate(toy, tmp_path / "several", devices=num_ranks, strategy="ddp_fork")
    one, several = (tmp_path / name / "results.jsonl" for name in ("one", "several"))
    assert one.read_bytes() == several.read_bytes()
    assert str(read_items(tmp_path / "one")) == str(read_items(tmp_path / "several"))


def test_batch_size_does_not_matter(toy, tmp_path):
    rows = [evaluate(toy, tmp_path / str(size), size) for size in (2, "auto")]
    for one, other in zip(*rows, strict=True):
        assert one["value"] == pytest.approx(other["value"], abs=1e-4)
        assert {**one, "value": 0, "low": 0, "high": 0} == {
            **other,
            "value": 0,
            "low": 0,
            "high": 0,
        }
