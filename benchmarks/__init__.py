"""What the toolkit needs and how long it takes, measured; the records lie beside the scripts."""

import utils.common.torchvision_cpu  # noqa: F401
