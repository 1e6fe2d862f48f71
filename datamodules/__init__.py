"""Lightning data modules, one data-set family per file."""

from datamodules.pretraining import TinyWorldCorpus
from datamodules.tiny_world_data import TinyWorldData, TinyWorldRequests

__all__ = ["TinyWorldCorpus", "TinyWorldData", "TinyWorldRequests"]
