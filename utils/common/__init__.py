"""Helpers that every package uses: user errors, process lifetime, heartbeats, seeds and atomic writes."""
