"""Several data folders: folder.toml, latent caches, the plan."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from dataset.folder import DataFolder, folder_set_errors, read_folder
from dataset.latent_cache import LatentCache
from tests.conftest import arguments
from utils.common.errors import UserError
from utils.config.args import parse_args
from utils.run.describe import describe
from utils.run.plan import RunPlan
from utils.run.preflight import preflight
from utils.training.loss import weighted_mean


def test_folder_file_replaces_the_flags(tmp_path):
    flags = DataFolder(tmp_path, "a", id_token="SKS", caption_dropout=0.1, flip=True)
    assert read_folder(flags) == flags
    (tmp_path / "folder.toml").write_text(
        '\ufeff# classes\nrepeats = 3\nloss_weight = 2\nid_token = ""\nflip = false\n'
    )
    assert read_folder(flags) == DataFolder(tmp_path, "a", 3, 2, "", 0.1, False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"repeats = 0", "line 1: repeats is 0; it must be a whole number from 1"),
        (b"flip = true\nrepeats = 2.0", "line 2: repeats is 2.0; it must be a whole number"),
        (b"repeats = true", "line 1: repeats is True; it must be a whole"),
        (b"loss_weight = 0", "line 1: loss_weight is 0; it must be a number above 0"),
        (b"loss_weight = nan", "line 1: loss_weight is nan"),
        (b"loss_weight = inf", "line 1: loss_weight is inf"),
        (b"\n\nid_token = 5", "line 3: id_token is 5; it must be a text"),
        (b'id_token = "\\u0000"', "line 1: id_token is .* must be a text"),
        (
            b"caption_dropout = 1.0",
            "line 1: caption_dropout is 1.0; it must be a number that is at least 0 and below",
        ),
        (b"caption_dropout = -0.5", "line 1: caption_dropout is -0.5"),
        (b'flip = "yes"', "line 1: flip is 'yes'; it must be true or false"),
        (
            b"flip = true\nrepeat = 2",
            "line 2: there is no setting 'repeat'; a folder has repeats, loss_weight, id_token",
        ),
        (b"[folder]\nrepeats = 2", "line 1: there is no setting 'folder'"),
        (b"repeats = 2\nrepeats 3", "is not valid TOML: .*line 2"),
        (b"\xff", "cannot be read as UTF-8 text"),
    ],
)
def test_wrong_folder_files_are_refused(tmp_path, content, message):
    (tmp_path / "folder.toml").write_bytes(content)
    with pytest.raises(UserError, match=f"folder.toml,? {message}|folder.toml: {message}"):
        read_folder(DataFolder(tmp_path))


def test_a_folder_is_given_once(tmp_path):
    for name in ("a/inner", "ab", "c"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to("a")
    assert folder_set_errors((tmp_path / "a", tmp_path / "ab", tmp_path / "c")) == []
    (error,) = folder_set_errors((tmp_path / "a", tmp_path / "c", tmp_path / "link"))
    assert error.startswith(f"--data_root {tmp_path}/a {tmp_path}/link: this is the same folder twice")
    (error,) = folder_set_errors((tmp_path / "a" / "inner", tmp_path / "a"))
    assert f"{tmp_path}/a/inner is inside {tmp_path}/a;" in error


@pytest.fixture
def two(data: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Returns a folder of eight clips, and one of three of them that is trained without the token, in a table."""
    other = tmp_path / "other"
    (other / "videos").mkdir(parents=True)
    rows = ["video,prompt"]
    for number, name in enumerate((data / "videos.txt").read_text().split()[:3]):
        shutil.copy(data / name, other / name)
        with (other / name).open("ab") as clip:
            clip.write(b"\0\0\0\x08free" if number else b"")  # another digest; the first clip is in both folders
        rows.append(f"{name},a class {number % 2}")
    (other / "metadata.csv").write_text("\n".join(rows))
    (other / "folder.toml").write_text('repeats = 4\nid_token = ""\nloss_weight = 0.5\nflip = true\n')
    return data, other


def plan_of(model: Path, out: Path, *roots: Path) -> RunPlan:
    options = ["--data_root", *roots, "--id_token", "SKS", "--train_epochs", 2, "--batch_size", 5]
    return preflight(parse_args(arguments(model, roots[0], out, *options)), 1)


def test_folders_keep_their_entries_and_share_the_epoch(tiny, two, tmp_path):
    """A folder has the same entries in the same place alone and beside others. Entries of both are not made twice."""
    model, out, (first, second) = tiny("5b"), tmp_path / "out", two
    alone = [plan_of(model, out, root) for root in two]
    plan = plan_of(model, out, first, second)
    assert plan.keys == alone[0].keys + alone[1].keys
    assert [len(names.video) for names in plan.keys] == [1] * 8 + [2] * 3
    assert list(plan.encoders) == [alone[0].cache_dir, alone[1].cache_dir] == [root / "videos/latent" for root in two]
    shared = plan.keys[0].video[0]
    assert shared == plan.keys[8].video[0] and plan.cache.folder_of(shared) == alone[0].cache_dir
    for number, names in enumerate(plan.keys):
        for name in {*names.all} - {shared}:
            assert plan.cache.folder_of(name) == alone[number >= 8].cache_dir
    assert plan.missing_entries() == alone[0].missing_entries() | alone[1].missing_entries()
    missing = [each.missing_entries() for each in alone]
    for name in missing[1]:
        LatentCache(alone[1].cache_dir).write(name, torch.zeros(1))
    plan = plan_of(model, out, first, second)
    assert plan.missing_entries() == missing[0] - missing[1]
    assert plan.cache.read(shared) == plan.cache.read(plan.empty_prompt) == torch.zeros(1)

    assert [clip_sample.sample.prompt[:3] for clip_sample in plan.samples] == ["SKS"] * 8 + ["a c"] * 3
    assert (plan.samples_per_epoch, plan.total_steps) == (20, 8)
    assert str(plan.samples[8]) == f"{second}/videos/red_circle_left_white.mp4 (line 2 of {second})"
    text = describe(plan)
    assert "Epoch: 20 samples\n" in text and f"  {first}: 8 samples, 40% of an epoch\n" in text
    assert f'{second}: 3 samples x 4, 60% of an epoch, loss_weight 0.5, id_token "", flip true\n' in text
    (second / "folder.toml").write_text('repeats = 5\nid_token = ""\nflip = true\n')
    changed = plan_of(model, out, first, second)
    assert changed.keys == plan.keys and changed.data_digest != plan.data_digest


def test_errors_of_all_folders_are_reported_together(tiny, two, tmp_path):
    first, second = two
    (second / "folder.toml").write_text("repeats = 0\n")
    (first / "videos.txt").write_text("videos/nothing.mp4\n" * 8)
    third = tmp_path / "third"
    third.mkdir()
    with pytest.raises(UserError) as raised:
        plan_of(tiny("5b"), tmp_path / "out", first, second, third)
    text = "\n".join(raised.value.errors)
    for expected in (
        f"{first}/videos.txt, line 8: there is no file",
        f"{second}/folder.toml, line 1: repeats is 0",
        f"{third}/prompts.txt: there is no such file",
    ):
        assert expected in text


def test_weighted_mean_does_not_depend_on_the_division_of_an_update():
    losses, weights = torch.rand(8, dtype=torch.float64), [1.0, 0.5, 2.0, 1.0, 0.25, 1.0, 3.0, 1.0]
    halves = [weighted_mean(losses[rank::2], weights[rank::2]) for rank in range(2)]
    torch.testing.assert_close(torch.stack(halves).mean(), weighted_mean(losses, weights))
    assert torch.equal(weighted_mean(losses, [1.0] * 8), losses.mean())
