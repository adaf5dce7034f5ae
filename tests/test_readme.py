"""The two READMEs say the same, and what the documentation names exists: links, files, flags, messages."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import ROOT

README, CHINESE = ((ROOT / name).read_text() for name in ("README.md", "README_zh.md"))
PAGES = sorted(
    str(page.relative_to(ROOT))
    for pattern in ("README*.md", "CONTRIBUTING.md", "docs/*.md", "configs/*.md", "examples/*.md", "benchmarks/*.md")
    for page in ROOT.glob(pattern)
)
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FLAG = re.compile(r"(?<![\w-])--([a-z][\w-]*)")
PROGRAM = re.compile(r"\b(?:bash|python3?)(?: -m)? ([\w.][\w./-]*)(.*)")
PACKAGES = r"(?:benchmarks|configs|dataset|docs|examples|tests|utils)"
TRAIN_OPTIONS = ("utils/config/args.py", "utils/config/data_args.py", "utils/config/memory_args.py")
COMMANDS = ("utils.commands.estimate_memory", "utils.commands.export", "utils.commands.inspect_dataset")
# Programs that take no flag of train.py -> the file that declares their flags.
OWN_OPTIONS = {
    "cli_demo.py": "utils/generation/args.py",
    "utils.commands.average": "utils/commands/average.py",
    "utils.commands.export": "utils/commands/export.py",
    "utils.commands.prepare_dataset": "utils/commands/prepare_dataset.py",
    "utils.commands.push_to_hub": "utils/commands/push_to_hub.py",
}
# Programs of other projects, and their flags that the pages name.
FOREIGN_PROGRAMS, FOREIGN_FLAGS = {"venv", "zero_to_fp32.py"}, {"help", "safe_serialization"}


@cache
def tracked_files() -> set[str]:
    return set(subprocess.run(["git", "ls-files"], cwd=ROOT, text=True, capture_output=True, check=True).stdout.split())


def blocks(text: str) -> list[str]:
    """Splits a page into headings, code blocks, table rows, list items and paragraphs."""
    parts = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
    split = [[part] if part.startswith("```") else re.split(r"\n\s*\n|\n(?=[-|])", part) for part in parts]
    return [block.strip() for part in split for block in part if block.strip()]


def kind(block: str) -> str:
    """Returns the level of a heading, the language of a code block, or the number of columns of a table row."""
    if block.startswith("|"):
        return "|" * block.count("|")
    marker = re.match(r"#+ |```\w+|- |!", block)
    return marker[0] if marker else "paragraph"


def shared_content(block: str) -> list[list[str]]:
    """Returns the parts of a block that a translation keeps: code without comments; spans, links and numbers."""
    if code := FENCE.match(block):
        comment = r"(?<=\S) .*" if code[1] == "text" else r" *#.*"
        return [re.sub(comment, "", code[2], flags=re.MULTILINE).splitlines()]
    patterns = r"`[^`]+`", r"\]\([^)]+\)", r"\*\*|<br>", r"\d+(?:[.,]\d+)*"
    return [sorted(re.findall(pattern, block)) for pattern in patterns]


def test_translation():
    english, chinese = blocks(README), blocks(CHINESE)
    assert (english.pop(1), chinese.pop(1)) == ("English | [中文](README_zh.md)", "[English](README.md) | 中文")
    assert [kind(block) for block in english] == [kind(block) for block in chinese]
    for block, translation in zip(english, chinese, strict=True):
        assert shared_content(block) == shared_content(translation), f"{block}\n\n{translation}"


def without_code(page: Path) -> str:
    return FENCE.sub("", page.read_text())


@cache
def anchors(page: Path) -> set[str]:
    """Returns the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(ROOT / page)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file), target


def test_file_tree():
    """Every path of the README's tree is tracked, and every module and script is in the tree."""
    [tree] = [code for language, code in FENCE.findall(README) if language == "text" and "train.py" in code]
    folders: list[str] = []
    paths = set()
    for line in tree.splitlines():
        name = line.split()[0]
        folders[line.index(name) // 4 :] = [name]
        paths.add("".join(folders))
    folders_of_files = {f"{parent}/" for file in tracked_files() for parent in Path(file).parents}
    untracked = paths - tracked_files() - folders_of_files
    assert not untracked
    modules = {file for file in tracked_files() if re.fullmatch(r"(?:(?:dataset|utils)/.*|\w+)\.(?:py|sh)", file)}
    left_out = {file for file in modules - paths if not file.endswith("__init__.py")}
    assert not left_out


@cache
def file_of(program: str) -> str:
    """Returns the source file of a script or of a module that runs with `python -m`."""
    return program if program.endswith((".py", ".sh")) else program.replace(".", "/") + ".py"


@cache
def flags_of(program: str) -> set[str]:
    """Returns the flags of a program, read from its source. All programs but `OWN_OPTIONS` take those of `train.py`."""
    own = "tests/conftest.py" if program == "pytest" else file_of(program)
    sources = [OWN_OPTIONS[program]] if program in OWN_OPTIONS else [own, *TRAIN_OPTIONS]
    declared = r"""^    (\w+): .*= option\(|add_?(?:argument|option)\(\s*"--([\w-]+)|== --([\w-]+)"""
    text = "\n".join((ROOT / source).read_text() for source in sources)
    return {name for names in re.findall(declared, text, re.MULTILINE) for name in names if name} | FOREIGN_FLAGS


@pytest.mark.parametrize("page", PAGES)
def test_commands(page):
    """Each program that a page runs has the flags it is run with. Other flags belong to it or to a user's command."""
    text = re.sub(r"\\\n\s*", "", (ROOT / page).read_text())
    lines = [line for language, code in FENCE.findall(text) if language == "bash" for line in code.splitlines()]
    spans = re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    matches = [PROGRAM.search(line.partition("#")[0]) for line in (*lines, *spans)]
    commands = [match.groups() for match in matches if match and Path(match[1]).name not in FOREIGN_PROGRAMS]
    known = {flag for program in ("cli_demo.py", *COMMANDS) for flag in flags_of(program)}
    for program, arguments in commands:
        known |= flags_of(program)
        assert not set(FLAG.findall(arguments)) - flags_of(program), f"{program} {arguments}"
    unknown = set(FLAG.findall(text)) - known
    assert not unknown


@pytest.mark.parametrize("page", PAGES)
def test_names(page):
    """Paths, modules and messages that a page quotes exist. In messages, `...` stands for values."""
    spans = re.findall(r"`([^`\n]+)`", without_code(ROOT / page))
    for name in spans:
        if re.fullmatch(rf"{PACKAGES}/[\w./-]+", name):
            assert (ROOT / name).exists(), name
        if re.fullmatch(rf"{PACKAGES}(?:\.\w+)+", name):
            assert any((ROOT / path).exists() for path in (name.replace(".", "/"), file_of(name))), name
        if page.startswith("docs/") and "..." in name:
            assert all(part.strip() in source_text() for part in name.split("...")), name


@cache
def source_text() -> str:
    """Returns the sources of the project, with string literals that continue on the next line joined."""
    folders = [ROOT.glob("*.py"), *((ROOT / name).rglob("*.py") for name in ("dataset", "utils"))]
    return re.sub(r'"\n\s*f?"', "", "\n".join(path.read_text() for folder in folders for path in folder))
