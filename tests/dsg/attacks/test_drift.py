import math

import numpy as np
import pytest
import torch

from dsg.attacks.drift import Drift, measure_drift
from dsg.evaluation.collate import passage_collate
from dsg.evaluation.items import Passage
from dsg.lm.hooks import read_activations
from tests.helpers import HOOK_POINT, tiny_model

PASSAGES = [
    Passage(0, "forget", "w1 w2 w3"),
    Passage(1, "retain", "w4 w5 w6 w7 w8"),
    Passage(2, "retain", "w9"),
]


@pytest.fixture
def collate(tokenizer):
    return passage_collate(tokenizer)


def drift_of(model, changed, batches):
    drift = Drift(HOOK_POINT)
    for batch in batches:
        drift.remember(model, batch)
    values = [drift.values(changed, batch) for batch in batches]
    ids = torch.cat([batch.ids for batch in batches])
    joined = {name: torch.cat([value[name] for value in values]) for name in values[0]}
    found = measure_drift(PASSAGES, {name: v[ids.argsort()] for name, v in joined.items()})
    return {(m.domain, m.metric): m for m in found}


def test_a_model_that_did_not_move(model, collate):
    found = drift_of(model, model, [collate(PASSAGES)])
    assert {key: m.value for key, m in found.items()} == {
        (domain, metric): pytest.approx(1.0, abs=1e-12)
        for domain in ("forget", "retain")
        for metric in ("drift_cosine", "drift_norm_ratio")
    }
    assert found["retain", "drift_cosine"].n == 2


def test_against_numpy_token_by_token(model, collate):
    other = tiny_model(seed=1)
    found = drift_of(model, other, [collate(PASSAGES)])
    for domain in ("forget", "retain"):
        cosines, ratios = [], []
        for passage in PASSAGES:
            if passage.domain != domain:
                continue
            alone = collate([passage]).tokens
            before, after = (
                read_activations(m, HOOK_POINT, alone)[0].double().numpy() for m in (model, other)
            )
            # The first token is bos, which does not count.
            for a, b in zip(after[1:], before[1:], strict=True):
                cosines.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
                ratios.append(np.linalg.norm(a) / np.linalg.norm(b))
        assert found[domain, "drift_cosine"].value == pytest.approx(np.mean(cosines), abs=1e-5)
        assert found[domain, "drift_norm_ratio"].value == pytest.approx(np.mean(ratios), rel=1e-5)
    assert not math.isclose(found["forget", "drift_cosine"].value, 1.0, abs_tol=0.01)


def test_batches_do_not_matter(model, collate):
    other = tiny_model(seed=1)
    together = drift_of(model, other, [collate(PASSAGES)])
    apart = drift_of(model, other, [collate([PASSAGES[2]]), collate(PASSAGES[:2])])
    for key, measurement in together.items():
        assert apart[key].value == pytest.approx(measurement.value, rel=1e-5)
        assert apart[key].n == measurement.n


def test_a_passage_without_a_counted_token_weighs_nothing(model, collate):
    other = tiny_model(seed=1)
    batch = collate([Passage(0, "forget", ""), *PASSAGES[1:]])
    found = drift_of(model, other, [batch])
    assert ("forget", "drift_cosine") not in found
    assert ("retain", "drift_cosine") in found


def test_the_interval_is_that_of_resampled_passages():
    """Passages of one length: the interval of a mean, which theory gives."""
    rng = np.random.default_rng(3)
    cosines = torch.from_numpy(rng.uniform(0.5, 1.0, 200))
    passages = [Passage(i, "retain", "") for i in range(200)]
    tokens = torch.full((200,), 10.0, dtype=torch.float64)
    values = {"cosine_sum": 10 * cosines, "norm_ratio_sum": tokens, "num_tokens": tokens}
    cosine, ratio = measure_drift(passages, values)
    half = 1.96 * cosines.std().item() / 200**0.5
    assert cosine.high - cosine.low == pytest.approx(2 * half, rel=0.1)
    assert cosine.low < cosine.value < cosine.high
    assert (ratio.low, ratio.value, ratio.high) == (1.0, 1.0, 1.0)
