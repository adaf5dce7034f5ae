"""Ways to save memory, independent of the command line: checkpointing, offloading, quantization and optimizers."""
