"""Makes torchvision's Python transforms importable on a CPU-only PyTorch.

The public torchvision wheel is compiled for CUDA. Beside a CPU build of PyTorch its compiled part cannot be loaded,
`import torchvision` fails with "operator torchvision::nms does not exist", and so does `import transformers`. The
transforms used here need no compiled part: declaring the two operators whose absence breaks the import is enough.
Where the compiled part loads, nothing is done.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch


def _declare_missing_operators() -> torch.library.Library | None:
    """Returns the library that holds the declarations (they live as long as it does), or None where none are needed."""
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
