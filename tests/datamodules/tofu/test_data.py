"""TOFU from a folder in the hub's layout: items, templates, guards' texts, training text."""

import json
import math

import pytest

from datamodules.tofu.data import TofuData
from dsg.errors import UserError
from dsg.evaluation.items import Passage, Prompt, Question
from dsg.io.results import read_results
from dsg.selection.splits import check_texts, guard_texts
from lightning_modules import EvaluationModule
from tests.benchmark_folders import sentence, write_json_dataset, write_tofu
from tests.datamodules.reading import read_by
from tests.helpers import BOS, EOS
from tests.hub_folders import gemma_tokenizer
from tests.lightning_modules.toy import make_trainer, save_toy

NUM = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, a tokenizer with a chat template and a tiny copy of TOFU."""
    folder = save_toy(tmp_path_factory.mktemp("tofu"))
    write_tofu(folder / "TOFU", NUM)
    gemma_tokenizer().save_pretrained(folder / "chat")
    return folder


def make_data(folder, model="model", reads="evaluate", **options):
    settings = {"retained": "self", **options}
    data = read_by(TofuData(str(folder / model), dataset=str(folder / "TOFU"), **settings), reads)
    data.setup("test")
    return data


def test_items_are_those_of_the_benchmark(folder):
    data = make_data(folder)
    questions, passages, prompts = (
        getattr(data, kind)("test") for kind in ("questions", "passages", "prompts")
    )
    domains = ["forget"] * NUM + ["retain"] * NUM + ["real_authors"] * 3 + ["world_facts"] * 4
    assert [q.domain for q in questions] == [p.domain for p in prompts] == domains
    assert [p.domain for p in passages] == domains[: 2 * NUM]
    for items in (questions, passages, prompts):
        assert [item.id for item in items] == list(range(len(items)))
        assert len({item.key for item in items}) == len(items)
    asked, answer = f"Question: {sentence(1, 2, 3)}\nAnswer:", sentence(1, 5, 1)
    wrong = tuple(f" {sentence(1, 6 + place, 1)}" for place in range(5))
    # The paraphrase is the right option; what the model was taught is the passage.
    options = (f" {sentence(5, 1)}", *wrong)
    assert questions[1] == Question(
        1, "forget", None, asked, options, 0, key=questions[1].key, closed=True
    )
    assert passages[1] == Passage(
        1, "forget", f" {answer}", context=asked, key=passages[1].key, closed=True
    )
    assert prompts[1] == Prompt(1, "forget", asked, answer, 200, key=prompts[1].key)
    assert prompts[1].stop == ()
    author = questions[2 * NUM]
    assert author.options == (
        f" {sentence(40, 5, 40)}",
        *(f" {sentence(40, 6 + place, 40)}" for place in range(3)),
    )


def test_chat_template_asks_as_a_user(folder):
    data = make_data(folder, "chat", template="chat")
    prompt = data.prompts("test")[0].text
    asked = sentence(0, 2, 0)
    # The tokenizer adds the bos token.
    assert prompt == f"<start_of_turn>user\n{asked}<end_of_turn>\n<start_of_turn>model\n"
    assert data.passages("test")[0].text == sentence(0, 5, 0)


def test_chat_template_must_exist(folder):
    with pytest.raises(UserError, match="'chat' needs a tokenizer with a chat template"):
        make_data(folder, template="chat")


def test_halves_part_the_questions_alike(folder):
    data, whole = make_data(folder, items="halves"), make_data(folder)
    assert (data.val_split, whole.val_split) == ("validation", "test")
    for kind in ("questions", "passages", "prompts"):
        keys = [{item.key for item in getattr(data, kind)(s)} for s in ("validation", "test")]
        assert not keys[0] & keys[1]
        assert keys[0] | keys[1] == {item.key for item in getattr(whole, kind)("test")}
    texts = [
        {item.prompt for item in data.questions("test")},
        {item.text for item in data.prompts("test")},
    ]
    assert texts[0] == texts[1]


def test_guards_see_no_evaluated_retain_pair(folder):
    data = make_data(folder)
    texts = guard_texts(data, near=False)
    assert all(texts.values())
    check_texts(texts)
    asked = {prompt.text for prompt in data.prompts("test") if prompt.domain == "retain"}
    retain = [text for name, part in texts.items() if "retain" in name for text in part]
    # Of three times as many retain pairs the last third is evaluated.
    assert len(retain) == 2 * NUM
    assert not any(text.startswith(tuple(asked)) for text in retain)
    forget = texts["forget_selection"] + texts["forget_heldout"]
    assert sorted(forget) == sorted(
        f"Question: {sentence(n, 2, 3 * n)}\nAnswer: {sentence(n, 5, n)}" for n in range(NUM)
    )


@pytest.mark.parametrize(("finetune_on", "count"), [("target", 4 * NUM), ("retrained", 3 * NUM)])
def test_answers_are_learnt_with_their_end(folder, finetune_on, count):
    data = make_data(folder, reads="finetune", finetune_on=finetune_on, retained=None)
    rows = [
        (ids[mask.bool()].tolist(), ids[learnt].tolist())
        for batch in data.train_dataloader()
        for ids, mask, learnt in zip(
            batch.input_ids, batch.attention_mask, batch.token_mask, strict=True
        )
    ]
    assert len(rows) == count
    assert data.facts()["training"]["n"] == count
    for ids, learnt in rows:
        # Question: w w w Answer: | w w w <eos>
        assert (len(ids), ids[0], learnt[-1]) == (10, BOS, EOS)
        assert learnt == ids[-4:]


def test_unlearning_and_relearning_text(folder):
    pairs = list(make_data(folder, reads="unlearn", train_batch_size=4).train_dataloader())
    assert [batch["forget"].input_ids.shape for batch in pairs] == [(4, 10), (2, 10)]
    assert [batch["retain"].input_ids.shape for batch in pairs] == [(4, 10), (2, 10)]
    data = make_data(folder, reads="relearn", allow_overlap=True)
    [batch] = data.train_dataloader()
    assert batch.input_ids.shape == (NUM, 9)  # half of the forget pairs, and as many others
    with pytest.raises(UserError, match="reads 'finetune' or 'unlearn' or 'relearn' for fit"):
        make_data(folder).train_dataloader()


def run(folder, run_dir, **options):
    data = make_data(folder, **options)
    module = EvaluationModule(str(folder / "model"))
    make_trainer(run_dir).test(module, data, verbose=False)
    return module, {
        (row["domain"], row["metric"]): row
        for row in read_results(run_dir)
        if row["protocol"] == "tofu"
    }


def test_evaluation_writes_the_benchmark_numbers(folder, tmp_path):
    module, reference = run(folder, tmp_path / "retained")
    assert len(reference) == 13  # three numbers of four domains, and model utility
    # Of a model that is compared with itself nothing can be told apart.
    _, found = run(folder, tmp_path / "again", retained=str(tmp_path / "retained"))
    assert found["forget", "forget_quality"]["value"] == 1.0
    assert found["forget", "ks_statistic"]["value"] == 0.0
    assert {key: row["value"] for key, row in found.items() if key in reference} == {
        key: row["value"] for key, row in reference.items()
    }
    # Worked out once more from the scores of the items.
    passages = module.measurer.samples["none", "passages"]
    texts = [
        math.exp(-float(nll / count))
        for nll, count in zip(passages["nll_sum"], passages["num_tokens"], strict=True)
    ]
    assert found["forget", "probability"]["value"] == pytest.approx(
        sum(texts[:NUM]) / NUM, rel=1e-5
    )
    asked = module.measurer.samples["none", "questions"]
    ratios = []
    for row in range(NUM):
        mean = [
            float(asked[f"log_prob_{i}"][row] / asked[f"num_tokens_{i}"][row]) for i in range(6)
        ]
        ratios.append(math.exp(sum(mean[1:]) / 5 - mean[0]))
    expected = sum(min(ratio, 1 / ratio) for ratio in ratios) / NUM
    assert found["forget", "truth_ratio"]["value"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retained": None}, r"dsg fit -c configs/finetune/tofu_retrained\.yaml"),
        ({"retained": "nowhere"}, r"with items\.parquet, got 'nowhere'; make the model with"),
        ({"reads": "relearn"}, "`allow_overlap` must be true for the attack text 'forget'"),
    ],
)
def test_wrong_settings_are_refused(folder, options, message):
    with pytest.raises(UserError, match=message):
        make_data(folder, **options)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "w1", "answer": "w2"}, "must hold a list of wrong answers"),
        ({"question": "w1", "answer": "", "perturbed_answer": ["w3"]}, "under 'answer', got ''"),
        (
            {"question": "w1", "answer": "w2", "perturbed_answer": ["w3"]},
            "under 'paraphrased_answer', got None",
        ),
    ],
)
def test_broken_rows_are_refused_by_their_place(folder, tmp_path, row, message):
    dataset = write_json_dataset(tmp_path / "TOFU", {"forget10_perturbed": [row]})
    data = TofuData(str(folder / "model"), dataset=str(dataset), retained="self")
    data.setup("test")
    with pytest.raises(UserError, match=f"forget10_perturbed/train, row 0 .*{message}"):
        data.questions("test")


def test_facts_name_no_place_on_this_machine(folder):
    facts = make_data(folder).facts()
    assert facts["dataset"] == "TOFU"
    assert facts["forget"]["n"] == NUM
    assert str(folder) not in json.dumps(facts)
