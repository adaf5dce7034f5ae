"""Saving, resuming and exporting checkpoints, and reading LoRA files and fine-tuned transformers."""
