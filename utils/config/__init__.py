"""Command-line options and the DeepSpeed config."""
