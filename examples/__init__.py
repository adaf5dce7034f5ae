"""Tiny CogVideoX models that generate recognizable clips: their data, training and evaluation."""

from utils.common import torchvision_cpu  # noqa: F401  (must precede any import of torchvision)
