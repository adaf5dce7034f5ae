"""Reading the manifest of a data folder: line files, and JSONL and CSV tables."""

from __future__ import annotations

import json

import pytest

from dataset.manifest import Table, find_table, read_manifest
from tests.conftest import LFS_POINTER
from utils.common.errors import UserError

ROWS = [{"video": "a.mp4", "prompt": 'a "red", circle'}, {"video": "b.mp4", "prompt": "two\nlines", "image": "b.png"}]
TABLE = Table("metadata.jsonl", optional=("image",))


@pytest.fixture
def folder(tmp_path):
    for name in ("a.mp4", "b.mp4", "b.png"):
        (tmp_path / name).touch()
    return tmp_path


def test_tables_list_the_samples(folder):
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    samples = read_manifest(folder, table=Table("metadata.jsonl"), id_token="SKS")
    assert [(sample.line, sample.prompt) for sample in samples] == [(1, 'SKS a "red", circle'), (2, "SKS two\nlines")]
    assert [sample.video for sample in samples] == [f"{folder}/a.mp4", f"{folder}/b.mp4"]
    (folder / "metadata.csv").write_text('video,prompt,note\na.mp4,"a ""red"", circle",x\nb.mp4,"two\nlines",y\n')
    rows = read_manifest(folder, table=Table("metadata.csv"), id_token="SKS")
    assert [(sample.video, sample.prompt) for sample in rows] == [(sample.video, sample.prompt) for sample in samples]


def test_absolute_paths_are_accepted(folder):
    (folder / "prompts.txt").write_text("a\n")
    (folder / "videos.txt").write_text(f"{folder / 'a.mp4'}\n")
    assert read_manifest(folder, "prompts.txt", "videos.txt")[0].video == str(folder / "a.mp4")


def test_names_may_start_with_a_tilde(folder, monkeypatch, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    (folder / "a.mp4").rename(home / "a.mp4")
    (home / "prompts.txt").write_text("a\n")
    (folder / "videos.txt").write_text("~/a.mp4\n")
    (sample,) = read_manifest(folder, "~/prompts.txt", "videos.txt")
    assert (sample.prompt, sample.video) == ("a", str(home / "a.mp4"))
    assert find_table(folder, "~/prompts.txt", None) is None


def test_empty_columns_of_a_spreadsheet_are_ignored(folder):
    (folder / "metadata.csv").write_text("video,prompt,,\na.mp4,a cat,,\nb.mp4,a dog,,,,\n")
    assert [sample.prompt for sample in read_manifest(folder, table=Table("metadata.csv"))] == ["a cat", "a dog"]


def test_spaces_before_quotes_are_ignored(folder):
    (folder / "metadata.csv").write_text('video, "prompt"\na.mp4, "a cat, on a mat"\nb.mp4,  a dog \n')
    samples = read_manifest(folder, table=Table("metadata.csv"))
    assert [sample.prompt for sample in samples] == ["a cat, on a mat", "a dog"]


def test_captions_of_several_lines_are_legal(folder):
    text = 'video,prompt\na.mp4,"a cat,\nthen a dog, see notes.txt\n\nlast, ""line"""\n'
    (folder / "metadata.csv").write_text(text)
    (sample,) = read_manifest(folder, table=Table("metadata.csv"))
    assert sample.prompt.count("\n") == 3


def test_git_lfs_pointers_are_called_that(folder):
    (folder / "a.mp4").write_text(LFS_POINTER)
    (folder / "b.png").write_text(LFS_POINTER)
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps({"image": "b.png"} | row) for row in ROWS))
    with pytest.raises(UserError) as caught:
        read_manifest(folder, table=TABLE)
    expected = [("a.mp4", 1), ("b.png", 1), ("b.png", 2)]
    for error, (name, line) in zip(caught.value.errors, expected, strict=True):
        assert f"line {line}: {folder / name} is a Git LFS pointer, not the file; run `git lfs pull`" in error


def test_unquoted_comma_does_not_truncate_a_prompt(folder):
    (folder / "metadata.csv").write_text("video,prompt\na.mp4,a cat, sitting on a mat\n")
    with pytest.raises(UserError, match="line 2: the row has more fields than the header"):
        read_manifest(folder, table=Table("metadata.csv"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"video": "a.mp4", "text": "x"}\n', "has no column 'prompt'; it has video, text"),
        ('{"video": "a.mp4", "prompt": "x"}\n{"video": "b.mp4"}\n', "line 2: 'prompt' is missing or not a text"),
        ('{"video": "a.mp4", "prompt": "x"}\n["b.mp4"]\n', "line 2: not a JSON object"),
        ('{"video": "a.mp4", "prompt": "x"}\n\n{"video"\n', "line 3: not valid JSON ("),
        ('{"video": "c.mp4", "prompt": " "}\n', "line 1: there is no file"),
        ('{"video": "c.mp4", "prompt": " "}\n', "line 1: the prompt is empty"),
        ('{"video": 7, "prompt": "x"}\n', "line 1: 'video' is missing or not a text"),
        (json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[1]), "line 1: 'image' is missing or not a text"),
        ("", "the table is empty"),
        ('{"video": "a.mp4", "prompt": "a\\u0000b"}\n', "line 1: the prompt holds a null character: 'a"),
        ('{"video": "a.mp4", "video": "b.mp4", "prompt": "x"}', "line 1: not valid JSON (it has 'video' twice)"),
        ("[" * 10**5, "line 1: not valid JSON"),
    ],
)
def test_errors_in_tables_name_the_line(folder, text, message):
    (folder / "metadata.jsonl").write_text(text)
    with pytest.raises(UserError) as caught:
        read_manifest(folder, table=TABLE)
    assert any(message in error for error in caught.value.errors), caught.value.errors


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "metadata.csv",
            'video,prompt\na.mp4,"a cat\nb.mp4,a dog\nc.mp4,a cow\n',
            "line 2: not valid CSV .* to line 4",
        ),
        ("metadata.csv", 'video,prompt\na.mp4,a cat\nb.mp4,"a dog\nc.mp4,"a cow"\n', "line 3: not valid CSV"),
        (
            "metadata.csv",
            'video,prompt\na.mp4,"a cat\nb.mp4,a dog\na.mp4,a sign that says stop"\n',
            "line 4: a quoted text that ends here contains what looks like a row: 'b.mp4,a dog'",
        ),
        ("metadata.csv", 'prompt,video\n"a cat,a.mp4\na cow", b.mp4\n', "line 3: a quoted text .* 'a cat,a.mp4'"),
        ("metadata.csv", "video,prompt, prompt\na.mp4,a cat,a dog\n", "has several columns 'prompt'"),
        ("metadata.csv", "video;prompt\na.mp4;a cat\n", "has no column 'prompt'; .* Separate the columns by commas."),
        ("metadata.csv", 'video,prompt\na.mp4,\t"a cat"\n', "line 2: a tab or the like before a quote"),
        ("metadata.csv", LFS_POINTER, "is a Git LFS pointer"),
        (
            "metadata.jsonl",
            '{"video": "a.mp4", "prompt": "a \\ud83d cat"}\n',
            "line 1: the prompt holds half of a surr",
        ),
        ("metadata.jsonl", '{"video": "\\ud83d.mp4", "prompt": "a cat"}\n', "line 1: the video holds half of a surr"),
    ],
)
def test_damaged_tables_are_refused(folder, name, content, message):
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=f"{name},? {message}"):
        read_manifest(folder, table=Table(name))
