"""`dsg demo`: the whole loop on the embedded benchmark or on the user's own text."""
