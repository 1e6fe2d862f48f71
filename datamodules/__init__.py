"""Lightning data modules, one data-set family per file."""

from datamodules.mt_bench import MtBenchData
from datamodules.multiple_choice.data import MultipleChoiceData
from datamodules.muse import MuseData
from datamodules.parts.pretraining import TinyWorldCorpus
from datamodules.predictions.data import ItemTextsData, TextRowsData
from datamodules.text_files.data import TextFilesCorpus, TextFilesData
from datamodules.tiny_world.data import TinyWorldData, TinyWorldRequests
from datamodules.tofu.data import TofuData

__all__ = [
    "ItemTextsData",
    "MtBenchData",
    "MultipleChoiceData",
    "MuseData",
    "TextFilesCorpus",
    "TextFilesData",
    "TextRowsData",
    "TinyWorldCorpus",
    "TinyWorldData",
    "TinyWorldRequests",
    "TofuData",
]
