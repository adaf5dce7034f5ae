import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the model hub for anything

import utils  # noqa: F401  (before any test imports diffusers: see utils/torchvision_cpu.py)
