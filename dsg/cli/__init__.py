"""The composition root behind the `dsg` command."""
