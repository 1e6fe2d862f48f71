"""Lightning data modules, one data-set family per file."""

from datamodules.mt_bench import MtBenchData
from datamodules.multiple_choice import MultipleChoiceData
from datamodules.muse import MuseData
from datamodules.predictions import ItemTextsData, TextRowsData
from datamodules.pretraining import TinyWorldCorpus
from datamodules.text_files_data import TextFilesCorpus, TextFilesData
from datamodules.tiny_world_data import TinyWorldData, TinyWorldRequests
from datamodules.tofu import TofuData

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
