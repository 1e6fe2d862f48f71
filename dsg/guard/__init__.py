"""The guard: gate, edit, hooks, KV cache, stack, artifact, and how one is made."""
