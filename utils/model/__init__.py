"""Facts about a checkpoint, its loading and encoders, and the inputs of the transformer."""
