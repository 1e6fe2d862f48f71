"""What the modules share: measuring, resuming, ranks, guards, saving."""
