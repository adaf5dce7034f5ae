"""The training toolkit: one package per layer; `docs/architecture.md` has the import order."""

from utils.common import torchvision_cpu  # noqa: F401  (must run before transformers or torchvision is imported)
