"""What the toolkit needs and how long it takes, measured; the records lie beside the scripts."""

import utils.torchvision_cpu  # noqa: F401
