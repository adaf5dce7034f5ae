"""Benchmarks of time and memory. Results are recorded next to the scripts."""

import utils.common.torchvision_cpu  # noqa: F401
