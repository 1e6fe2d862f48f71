"""Disk and hub: rows of files, results, run directories, the cache, the hub's data sets."""
