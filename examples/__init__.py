"""Tiny CogVideoX models that generate recognisable clips: their data, training and evaluation."""

from utils.common import torchvision_cpu  # noqa: F401  (must precede any import of torchvision)
