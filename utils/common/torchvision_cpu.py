"""Makes torchvision's Python transforms importable with a CPU-only PyTorch.

The public torchvision wheel is compiled for CUDA. With a CPU build of PyTorch its compiled extension cannot be loaded,
and `import torchvision` fails with "operator torchvision::nms does not exist". `import transformers` fails with it. The
transforms used here do not need the extension, so declaring the two missing operators is enough. Nothing is declared
if the extension loads.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch


def _declare_missing_operators() -> torch.library.Library | None:
    """Returns the library that owns the declarations, or None if none are needed. They live as long as the library."""
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    try:
        for compiled in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(str(compiled))
        return None
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library


_DECLARED = _declare_missing_operators()
