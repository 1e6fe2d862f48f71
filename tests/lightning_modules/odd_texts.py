"""A data module whose texts go round on no number of ranks."""

from torch.utils.data import DataLoader

from datamodules.parts.loading import selection_loader
from tests.lightning_modules.toy import ToyData, texts


class OddTexts(ToyData):
    """Odd numbers of texts and of batches for each purpose; `select` is what it is for."""

    def forget_texts(self) -> list[str]:
        return texts(23, 20, 0, 10)

    def retain_texts(self) -> list[str]:
        return texts(17, 21, 8, 26)

    def calibration_texts(self, near: bool) -> list[str]:
        return texts(19, 22, 8, 26) + (texts(8, 23, 4, 14) if near else [])

    def heldout_texts(self) -> list[str]:
        return texts(11, 24, 8, 26)

    def val_dataloader(self) -> DataLoader:
        return selection_loader(self)
