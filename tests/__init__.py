import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may access the model hub

import utils  # noqa: F401  (must precede any import of diffusers; see utils/common/torchvision_cpu.py)
