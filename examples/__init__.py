"""A tiny CogVideoX that really generates: its world, how it was trained, what it can do and how that is measured."""

from utils.common import torchvision_cpu  # noqa: F401  (before anything imports torchvision)
