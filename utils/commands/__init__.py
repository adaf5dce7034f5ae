"""Entry points for `python -m`."""
