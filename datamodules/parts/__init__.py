"""What the data modules share: batches, training text, corpora."""
