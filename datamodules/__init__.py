"""Lightning data modules, one data-set family per file."""

from datamodules.pretraining import TinyWorldCorpus
from datamodules.text_files_data import TextFilesCorpus, TextFilesData
from datamodules.tiny_world_data import TinyWorldData, TinyWorldRequests

__all__ = [
    "TextFilesCorpus",
    "TextFilesData",
    "TinyWorldCorpus",
    "TinyWorldData",
    "TinyWorldRequests",
]
