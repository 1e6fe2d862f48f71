"""Questions, passages and a hand-made guard for the tiny model."""

import torch

from dsg.evaluation.items import Passage, Question
from dsg.guard.edit import Clamp
from dsg.guard.gate import DensityGate
from dsg.guard.guard import Guard
from dsg.lm.tokens import padding_id, uncounted_token_ids
from dsg.sae.loading import slice_features
from tests.helpers import HOOK_POINT, standard_sae

_DOMAINS = ("forget", "forget", "near", "retain", "retain")


def make_questions(num: int = 15, seed: int = 0, split: str = "") -> list[Question]:
    """Questions with four options of one to three words, in random words of the tiny tokenizer."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> str:
        return " ".join(f"w{i}" for i in torch.randint(26, (count,), generator=generator).tolist())

    questions = []
    for index in range(num):
        length = int(torch.randint(2, 7, (1,), generator=generator))
        options = tuple(f" {words(1 + (index + option) % 3)}" for option in range(4))
        domain = _DOMAINS[index % 5]
        questions.append(
            Question(
                id=index,
                domain=domain,
                form="statement" if index % 2 else "question",
                prompt=words(length) + split,
                options=options,
                answer=index % 4,
                shown=bool(index % 4 < 2) if domain == "forget" else None,
            )
        )
    return questions


def make_passages(num: int = 7, seed: int = 1) -> list[Passage]:
    """Passages of three to nine words."""
    generator = torch.Generator().manual_seed(seed)
    passages = []
    for index in range(num):
        length = int(torch.randint(3, 10, (1,), generator=generator))
        words = torch.randint(26, (length,), generator=generator).tolist()
        domain = "forget" if index % 3 == 0 else "retain"
        passages.append(Passage(index, domain, " ".join(f"w{i}" for i in words)))
    return passages


QUESTIONS = make_questions()


def tiny_guard(model, tokenizer, threshold: float, clamp_value: float = -30.0) -> Guard:
    """Clamps three features of a random SAE; its densities spread over the tiny questions."""
    del model
    return Guard(
        slice_features(standard_sae(seed=3), [0, 5]),
        hook_point=HOOK_POINT,
        uncounted_ids=uncounted_token_ids(tokenizer),
        pad_id=padding_id(tokenizer),
        gate=DensityGate(threshold),
        edit=Clamp(clamp_value),
    )
