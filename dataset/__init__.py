"""From line files and clips to cached latents and batches. Knows neither the models nor the loop."""

from utils.common import torchvision_cpu  # noqa: F401  (before anything imports torchvision)
