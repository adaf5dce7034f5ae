"""The training step and its parts: loss, trainable parameters, optimizer, schedule and metrics."""
