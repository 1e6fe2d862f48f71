"""Multiple-choice questions of the field: prompts, sets, and the papers' question filter."""
