"""The embedded benchmark's fictional world: words, facts, texts, attacks."""
