"""Fixtures shared by all tests: one tiny model, tokenizer and SAE each."""

import os

import pytest
import torch

from tests import helpers

# W&B reads it once per process, when any library imports it first.
os.environ["WANDB_MODE"] = "offline"
# Of commands that tests start; several of them run at a time.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that may have to train the embedded benchmark goes first: nobody waits for it."""
    items.sort(key=lambda item: item.path.name != "test_end_to_end.py")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tiny tensors run faster, and repeatably, on one thread."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def model():
    return helpers.tiny_model()


@pytest.fixture(scope="session")
def tokenizer():
    return helpers.tiny_tokenizer()


@pytest.fixture
def sae():
    return helpers.standard_sae()
