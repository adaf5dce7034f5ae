"""Peak compute of common GPUs."""

from __future__ import annotations

# Dense bf16 TFLOP/s by data sheet.
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "RTX 4090": 165}
# Parts of the names of related GPUs with another peak.
OTHER_PEAK = ("H100 PCIe", "NVL", "4090 D", "Laptop", "MIG")


def peak_tflops(name: str) -> float | None:
    """Returns the dense bf16 TFLOP/s of a GPU by the name that its driver reports; None if unknown."""
    if any(part in name for part in OTHER_PEAK):
        return None
    return next((tflops for part, tflops in PEAK_TFLOPS.items() if part in name), None)
