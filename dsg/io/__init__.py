"""Disk and hub: rows of files, results, run directories, the cache, the hub's data sets."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
