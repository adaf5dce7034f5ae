"""The training toolkit: one package per layer; `docs/architecture.md` has the import order."""

from utils.common.requirements import check_requirements

check_requirements()

from utils.common import torchvision_cpu  # noqa: E402, F401  (must run before transformers or torchvision is imported)
