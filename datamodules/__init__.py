"""Lightning data modules, one data-set family per file."""

from datamodules.multiple_choice import MultipleChoiceData
from datamodules.muse import MuseData
from datamodules.pretraining import TinyWorldCorpus
from datamodules.text_files_data import TextFilesCorpus, TextFilesData
from datamodules.tiny_world_data import TinyWorldData, TinyWorldRequests
from datamodules.tofu import TofuData

__all__ = [
    "MultipleChoiceData",
    "MuseData",
    "TextFilesCorpus",
    "TextFilesData",
    "TinyWorldCorpus",
    "TinyWorldData",
    "TinyWorldRequests",
    "TofuData",
]
