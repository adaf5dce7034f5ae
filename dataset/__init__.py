"""Data folder -> cached latents -> batches. Independent of the models and of the training loop."""

from utils.common import torchvision_cpu  # noqa: F401  (must run before torchvision is imported)
