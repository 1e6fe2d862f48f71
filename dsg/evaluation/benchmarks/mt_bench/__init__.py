"""MT-Bench: conversations with a guarded model, and the judge who grades them."""
