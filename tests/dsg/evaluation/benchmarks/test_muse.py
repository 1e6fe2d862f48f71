"""The metrics of MUSE against numbers worked out by hand."""

import itertools

import numpy as np
import pytest
import torch

from dsg.errors import UserError
from dsg.evaluation.benchmarks.muse import (
    check_retrained,
    knowmem_prompt,
    measure,
    min_k_auc,
    privleak,
    retrained_auc,
)
from dsg.evaluation.collate import passage_collate
from dsg.evaluation.items import Passage
from dsg.evaluation.metrics import rouge_l
from dsg.evaluation.scoring import score_passages
from dsg.io.results import row, write_results


def test_knowmem_prompt_is_that_of_the_official_evaluation():
    examples = [("Who?", "Ann"), ("Where?", "In York")]
    assert knowmem_prompt(examples, "When?") == (
        "Question: Who?\nAnswer: Ann\n\nQuestion: Where?\nAnswer: In York\n\nQuestion: When?\n"
        "Answer: "
    )
    assert knowmem_prompt([], "When?") == "Question: When?\nAnswer: "


def test_rouge_l_by_hand():
    # Longest common subsequence "the cat on mat": 4 of 6 words on either side.
    assert rouge_l("the cat lay on a mat", "The cat sat on the mat.") == pytest.approx(4 / 6)
    # "a c" in order: precision 2/3, recall 2/5; F1 = 2PR/(P+R) = 1/2.
    assert rouge_l("c a c", "a b c d e") == pytest.approx(0.5)
    # Without stemming these have nothing in common.
    assert rouge_l("cats running", "cat runs") == 0.0


def test_min_k_by_hand(model, tokenizer):
    """The mean of the lowest int(0.4 n) log-probabilities, from the model's own logits."""
    texts = ["w1 w2 w3 w4 w5 w6 w7 w8", "w9", "w3 w1 w20 w2 w5 w6"]
    batch = passage_collate(tokenizer)([Passage(i, "forget", t) for i, t in enumerate(texts)])
    values = score_passages(model, batch)
    for number, text in enumerate(texts):
        ids = torch.tensor(tokenizer([text])["input_ids"])
        with torch.no_grad():
            logits = model(ids).logits[0].double().numpy()
        logits -= logits.max(axis=1, keepdims=True)
        log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        said = sorted(log_probs[place, ids[0, place + 1]] for place in range(ids.shape[1] - 1))
        count = {0: 3, 1: 1, 2: 2}[number]  # int(3.2), at least one, int(2.4)
        assert values["min_k"][number] == pytest.approx(sum(said[:count]) / count, abs=1e-5)


def test_auc_counts_pairs():
    # Of the six pairs the holdout text is higher in (-1.5 against -2 and -3) and (-2.5, -3).
    assert min_k_auc([-1.0, -2.0, -3.0], [-1.5, -2.5]) == 0.5
    assert min_k_auc([-1.0], [-1.0]) == 0.5
    assert min_k_auc([-1.0, -1.1], [-4.0, -3.0]) == 0.0
    assert min_k_auc([-4.0, -3.0], [-1.0, -1.1]) == 1.0


def test_auc_equals_counting_all_pairs():
    generator = np.random.default_rng(0)
    for size, other in ((1, 7), (13, 5), (20, 20)):
        # Rounded, so that there are ties.
        forget, holdout = (generator.normal(size=n).round(1).tolist() for n in (size, other))
        pairs = itertools.product(holdout, forget)
        wins = sum((h > f) + 0.5 * (h == f) for h, f in pairs)
        assert min_k_auc(forget, holdout) == pytest.approx(wins / (size * other), abs=1e-15)


@pytest.mark.parametrize(("forget", "name"), [([], "forget"), ([float("nan")], "forget")])
def test_auc_of_nothing_is_refused(forget, name):
    with pytest.raises(UserError, match=f"`{name}` must hold at least one score and no NaN"):
        min_k_auc(forget, [1.0])


def test_privleak_by_hand():
    assert privleak(0.5, 0.4) == pytest.approx(25.0)
    assert privleak(0.0, 0.5393) == -100.0
    assert privleak(0.4772, 0.4772) == 0.0


def test_worked_example():
    """Two prompts of each kind, three forget and two holdout texts."""
    prompts = ["verbmem_forget", "knowmem_forget", "knowmem_retain"] * 2
    rouge = torch.tensor([0.25, 0.0, 1.0, 0.75, 0.1, 0.5]).double()
    passages = ["forget", "retain", "holdout", "forget", "holdout", "forget"]
    min_k = torch.tensor([-1.0, 9.0, -1.5, -2.0, -2.5, -3.0]).double()
    found = {(m.domain, m.metric): m for m in measure(prompts, rouge, passages, min_k, 0.4)}
    assert {m.protocol for m in found.values()} == {"muse"}
    assert {key: m.value for key, m in found.items()} == {
        ("forget", "verbmem"): pytest.approx(50.0),
        ("forget", "knowmem"): pytest.approx(5.0),
        ("retain", "knowmem"): pytest.approx(75.0),
        ("forget", "min_k_auc"): pytest.approx(0.5),
        ("forget", "privleak"): pytest.approx(25.0),
    }
    assert {key: m.n for key, m in found.items()} == {
        ("forget", "verbmem"): 2,
        ("forget", "knowmem"): 2,
        ("retain", "knowmem"): 2,
        ("forget", "min_k_auc"): 5,
        ("forget", "privleak"): 5,
    }
    verbmem, leak = found["forget", "verbmem"], found["forget", "privleak"]
    # Two values can be resampled to either of them alone.
    assert (verbmem.low, verbmem.high) == (25.0, 75.0)
    # Resampled AUCs reach 0 and 1: -100 % and 150 % of 0.4.
    assert (leak.low, leak.high) == (-100.0, pytest.approx(150.0))


def test_the_retrained_model_itself_has_no_privleak():
    min_k = torch.tensor([-1.0, -2.0]).double()
    found = measure([], torch.zeros(0), ["forget", "holdout"], min_k, None)
    assert [m.metric for m in found] == ["min_k_auc"]
    assert (found[0].low, found[0].high) == (None, None)


def retrained_run(folder, **changes):
    columns = {
        "experiment": "evaluation",
        "guard": "none",
        "dataset": "muse_news",
        "domain": "forget",
        "split": "test",
        "metric": "min_k_auc",
        "value": 0.51,
        "n": 200,
    }
    write_results(folder, [row(**{**columns, **changes})])
    return str(folder)


def test_reference_is_read_from_a_run(tmp_path):
    assert retrained_auc("muse_news", retrained_run(tmp_path), "test", 200) == 0.51
    assert retrained_auc("muse_books", "official", "test", 200) == 0.5393
    assert retrained_auc("muse_news", "official", "validation", 90) == 0.4772


@pytest.mark.parametrize(
    "changes",
    [
        {"metric": "privleak"},
        {"split": "validation"},
        {"n": 100},
        {"guard": "on"},
        {"dataset": "muse_books"},
        None,
    ],
)
def test_another_reference_is_refused_with_the_commands_that_make_it(changes, tmp_path):
    run = str(tmp_path) if changes is None else retrained_run(tmp_path, **changes)
    with pytest.raises(UserError) as caught:
        retrained_auc("muse_news", run, "test", 200)
    for part in (
        "`retrained` must be a run that measured min_k_auc of muse_news on the 200 texts",
        "dsg fit -c configs/finetune/muse_retrained.yaml --data.corpus news",
        "dsg test -c configs/evaluate/muse_news.yaml --model.model_name",
        "--data.retrained self",
        "`retrained: official`",
    ):
        assert part in str(caught.value)


def test_no_reference_is_no_silent_half():
    with pytest.raises(UserError, match="PrivLeak means nothing, got none; make the model with"):
        check_retrained("muse_news", None)
    with pytest.raises(UserError, match=r"known for .* only, got 'mine'"):
        check_retrained("mine", "official")
    check_retrained("mine", "self")
    check_retrained("muse_books", "official")
