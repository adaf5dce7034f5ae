"""The parts of a run, in the order of their use: args, preflight, components, encoders, conditioning, loss, ..."""

from utils.common import torchvision_cpu  # noqa: F401  (before anything imports transformers or torchvision)
