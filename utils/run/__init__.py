"""The stages of a run around the loop: preflight checks, plan, cache filling and validation."""
