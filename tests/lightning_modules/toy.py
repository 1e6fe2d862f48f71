"""A data module over the tiny tokenizer's words, and the runs of the tests."""

from pathlib import Path
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader

from datamodules.parts.batches import GlobalBatches, ResumableLoader
from dsg.evaluation.collate import passage_collate, question_collate
from dsg.evaluation.items import Passage, Question
from dsg.guard.recipes import GuardSettings
from dsg.lm.tokens import TokenBatch, length_batches, pad_sequences, padding_id, uncounted_token_ids
from tests.dsg.evaluation.scoring_helpers import make_passages, make_questions
from tests.helpers import HOOK_POINT, standard_sae, tiny_model, tiny_tokenizer


def save_toy(folder: Path) -> Path:
    """Write `model` (with tokenizer) and `sae` as ordinary folders."""
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    standard_sae().save_model(str(folder / "sae"))
    return folder


def guard_settings(folder: Path, **changes: Any) -> GuardSettings:
    settings: dict[str, Any] = {
        "hook_point": HOOK_POINT,
        "sae": str(folder / "sae"),
        "num_features": 1,
        "ratio_percentile": 50.0,
        "threshold_percentile": 60.0,
        "clamp_value": -30.0,
        "batch_size": 4,
    }
    return GuardSettings(**{**settings, **changes})


def texts(num: int, seed: int, low: int, high: int) -> list[str]:
    """Texts of random words `w<low>` to `w<high - 1>`."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(num):
        length = int(torch.randint(5, 12, (1,), generator=generator))
        words = torch.randint(low, high, (length,), generator=generator).tolist()
        found.append(" ".join(f"w{word}" for word in words))
    return found


class ToyData(lightning.LightningDataModule):
    """Implements all protocols; forget texts use the first words, retain texts the last.

    Args:
        kind: What the training batches are: `attack`, `unlearning` or `requests`.
        batch_size: Of all loaders; decides nothing but speed in evaluations.
    """

    name = "toy"
    val_split = "validation"
    request_domains = ("first", "second")

    def __init__(self, kind: str = "attack", batch_size: int = 4) -> None:
        super().__init__()
        self.kind = kind
        self.batch_size = batch_size
        self.tokenizer: Any = None
        self.forget_seed = 20

    def setup(self, stage: str) -> None:
        del stage
        self.tokenizer = tiny_tokenizer()

    def questions(self, split: str) -> list[Question]:
        questions = make_questions(num=15, seed=0 if split == "validation" else 1)
        if self.kind != "requests":
            return questions
        return [
            Question(
                q.id,
                self.request_domains[q.id % 2] if q.domain == "forget" else q.domain,
                q.form,
                q.prompt,
                q.options,
                q.answer,
            )
            for q in questions
        ]

    def passages(self, split: str) -> list[Passage]:
        return make_passages(seed=2 if split == "validation" else 3)

    def forget_texts(self) -> list[str]:
        if self.kind == "requests":
            request = self._request()
            return texts(24, 30 + request, 5 * request, 5 * request + 8)
        return texts(24, self.forget_seed, 0, 10)

    def retain_texts(self) -> list[str]:
        return texts(24, 21, 8, 26)

    def calibration_texts(self, near: bool) -> list[str]:
        return texts(16, 22, 8, 26) + (texts(8, 23, 4, 14) if near else [])

    def heldout_texts(self) -> list[str]:
        return texts(16, 24, 8, 26)

    def facts(self) -> dict[str, Any]:
        return {"texts": 10}

    def train_dataloader(self) -> DataLoader:
        request = self._request()
        forget = self._batches(texts(10, 30 + request, 5 * request, 5 * request + 8))
        retain = self._batches(self.retain_texts()[:10])
        items: list[Any] = forget
        if self.kind != "attack":
            items = [
                {"id": index, "forget": f, "retain": r}
                for index, (f, r) in enumerate(zip(forget, retain, strict=True))
            ]
        keeps_rest = self.trainer is not None and self.trainer.lightning_module.keeps_rest
        batches = [[index] for index in range(len(items))]
        return self._loader(items, batches, lambda batch: batch[0], keep_rest=keeps_rest)

    def val_dataloader(self) -> list[DataLoader]:
        return self._evaluation("validation")

    def test_dataloader(self) -> list[DataLoader]:
        return self._evaluation("test")

    def _request(self) -> int:
        return self.trainer.current_epoch if self.trainer and self.kind == "requests" else 0

    def _evaluation(self, split: str) -> list[DataLoader]:
        return [
            self._loader(
                items, length_batches([1] * len(items), self.batch_size), make(self.tokenizer)
            )
            for items, make in (
                (self.questions(split), question_collate),
                (self.passages(split), passage_collate),
            )
        ]

    def _loader(
        self, items: Any, batches: list[list[int]], collate: Any, keep_rest: bool = True
    ) -> DataLoader:
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        sampler = GlobalBatches(batches, rank, world_size, keep_rest=keep_rest)
        return ResumableLoader(
            items,
            batch_sampler=sampler,
            collate_fn=lambda batch: collate(batch) if batch else None,
        )

    def _batches(self, found: list[str]) -> list[TokenBatch]:
        rows = self.tokenizer(found)["input_ids"]
        ids, pad_id = uncounted_token_ids(self.tokenizer), padding_id(self.tokenizer)
        return [
            pad_sequences(rows[start : start + 4], pad_id, ids) for start in range(0, len(rows), 4)
        ]


def make_trainer(run_dir: Path, **changes: Any) -> lightning.Trainer:
    """A silent CPU trainer that measures before it trains."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "default_root_dir": run_dir,
        "max_epochs": 2,
        "num_sanity_val_steps": -1,
        "use_distributed_sampler": False,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return lightning.Trainer(**{**settings, **changes})
