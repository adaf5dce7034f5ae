import utils  # noqa: F401  (before any test imports diffusers: see utils/torchvision_cpu.py)
