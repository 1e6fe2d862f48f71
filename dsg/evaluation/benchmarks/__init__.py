"""The field's benchmarks, a file or folder each."""
