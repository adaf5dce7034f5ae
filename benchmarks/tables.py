"""Writes the tables of predicted and measured figures into the documentation.

    python -m benchmarks.tables

A table stands between `<!-- table: name -->` and `<!-- end of table -->`. A figure is the measurement of the first
results folder that has the row, or else the prediction, and says which of the two it is.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.decide import Measured, read_results
from benchmarks.on_gpu import RESULTS, RESULTS_FILE
from benchmarks.rows import ROWS
from utils.common.filesystem import ROOT
from utils.model.published_configs import published_spec

PAGES = ("README.md", "README_zh.md", "docs/memory_and_speed.md")
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
# model -> rows of the default and of the smallest LoRA settings
MODELS = {
    "CogVideoX-2b": ("2b-lora", "2b-lora-smallest"),
    "CogVideoX-5b": ("train_ddp_t2v.sh", "5b-lora-smallest"),
    "CogVideoX-5b-I2V": ("train_ddp_i2v.sh", "5b-i2v-lora-smallest"),
    "CogVideoX1.5-5B": ("1.5-lora-default", "1.5-lora-smallest"),
    "CogVideoX1.5-5B-I2V": ("1.5-i2v-lora-default", "1.5-i2v-lora-smallest"),
}
ENGLISH = {
    "models": "| model | task | native clip | precision | LoRA, default: GiB | LoRA, smallest: GiB |",
    "t2v": "text to video",
    "i2v": "image to video",
    "comma": ", ",
    "predicted": "{} predicted",
    "measured": "{} measured [{}]",
    "source": "[{}] measured on an {} at commit {}, with {}.",
}
CHINESE = {
    "models": "| 模型 | 任务 | 原生规格 | 精度 | LoRA 默认设置：GiB | LoRA 最省设置：GiB |",
    "t2v": "文生视频",
    "i2v": "图生视频",
    "comma": "，",
    "predicted": "{}（预测）",
    "measured": "{}（实测 [{}]）",
    "source": "[{}] 在 {} 上实测，提交 {}，{}。",
}


class Figures:
    """The figures of one page.

    Args:
        predicted: predictions by row.
        measured: results by item, of one GPU each.
    """

    def __init__(self, predicted: dict[str, Any], measured: list[Measured], words: dict[str, str]) -> None:
        self.predicted, self.measured, self.words = predicted, measured, words
        self.sources: list[tuple[str, ...]] = []

    def cell(self, row: str, name: str, predicted_name: str | None, digits: int = 1) -> str:
        """Returns a measured or predicted figure of a row, with its mark; a dash if there is none.

        Args:
            name: key of the measurement.
            predicted_name: key of the prediction; None if it is not predicted.
        """
        for results in self.measured:
            if name in (line := results.get(f"row/{row}", {})):
                return self.words["measured"].format(f"{line[name]:.{digits}f}", self._number(line))
        if predicted_name is None or row not in self.predicted:
            return "-"
        return self.words["predicted"].format(f"{self.predicted[row][predicted_name]:.{digits}f}")

    def _number(self, line: dict[str, Any]) -> int:
        """Returns the number of the note that describes where a line was measured."""
        versions = ", ".join(f"{name} {number}" for name, number in line["versions"].items())
        source = (line["gpu"], line["commit"], f"{versions}, CUDA {line['cuda']}")
        if source not in self.sources:
            self.sources.append(source)
        return self.sources.index(source) + 1

    def notes(self) -> Iterator[str]:
        """Yields a paragraph for each machine, commit and set of versions."""
        for number, source in enumerate(self.sources, 1):
            yield ""
            yield self.words["source"].format(number, *source)


def models_table(figures: Figures) -> Iterator[str]:
    """The models with the memory of LoRA training."""
    words = figures.words
    yield words["models"]
    yield "|---|---|---|---|---|---|"
    for model, rows in MODELS.items():
        spec = published_spec(model)
        assert spec is not None
        native = f"{spec.native}{words['comma']}{spec.fps:g} fps"
        precision = "fp16" if spec.trained_in_fp16 else "bf16"
        memory = " | ".join(figures.cell(row, "reserved_gib", "peak_gib") for row in rows)
        yield f"| `THUDM/{model}` | {words[spec.task]} | {native} | {precision} | {memory} |"


def recipes_table(figures: Figures) -> Iterator[str]:
    """All rows that one GPU can run."""
    yield "| recipe | GPU memory, GiB | seconds per update | utilization | host memory, GiB | compute, TFLOP |"
    yield "|---|---|---|---|---|---|"
    for row in (row.name for row in ROWS if row.zero is None):
        cells = [
            figures.cell(row, "reserved_gib", "peak_gib"),
            figures.cell(row, "seconds", None, 2),
            figures.cell(row, "utilization", None, 2),
            figures.cell(row, "host_gib", "host_gib", 0),
            figures.cell(row, "tflop", "tflop", 0),
        ]
        yield f"| {row} | {' | '.join(cells)} |"


def flags_table(figures: Figures) -> Iterator[str]:
    """The flags of the rows."""
    yield "| recipe | flags |"
    yield "|---|---|"
    for row in (row for row in ROWS if row.zero is None):
        yield f"| {row.name} | `{' '.join(['--model_path', f'THUDM/{row.model}', row.flags]).strip()}` |"


TABLES: dict[str, Callable[[Figures], Iterator[str]]] = {
    "models": models_table,
    "recipes": recipes_table,
    "flags": flags_table,
}


def render(text: str, predicted: dict[str, Any], measured: list[Measured], words: dict[str, str]) -> str:
    """Returns a page with new tables."""

    def table(match: re.Match[str]) -> str:
        figures = Figures(predicted, measured, words)
        lines = [*TABLES[match[2]](figures), *figures.notes()]
        return match[1] + "".join(f"{line}\n" for line in lines) + match[3]

    return TABLE.sub(table, text)


def render_page(page: str) -> str:
    """Returns a page of the documentation with the tables that follow from the recorded results."""
    predicted = json.loads((RESULTS / "predicted.json").read_text())
    measured = [read_results(path.parent) for path in sorted(RESULTS.glob(f"*/{RESULTS_FILE}"))]
    return render((ROOT / page).read_text(), predicted, measured, CHINESE if page.endswith("_zh.md") else ENGLISH)


def main() -> None:
    for page in PAGES:
        Path(ROOT / page).write_text(render_page(page))


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    main()
