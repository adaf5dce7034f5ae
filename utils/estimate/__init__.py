"""Memory prediction and settings search on fake tensors."""
