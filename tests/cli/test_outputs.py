"""Outputs that cannot be written are found before the model is loaded, and said in one line."""

import json
import os

import pytest
from firp.drafting.choices import Choice, Rung, save_choice
from firp.drafting.trees import TreeConfig
from firp.tools.files import write_atomically


@pytest.fixture
def unloaded(monkeypatch):
    for name in ("options", "tune"):
        monkeypatch.setattr(f"firp.cli.{name}.load_model", lambda *_: pytest.fail("loaded"), raising=True)


def base(folder):
    return (
        "--model",
        folder / "model",
        "--predictor",
        folder / "predictor",
        "--prompts",
        folder / "prompts.jsonl",
        "--device",
        "cpu",
    )


@pytest.mark.parametrize("command", ["bench", "tune"])
@pytest.mark.parametrize("option", ["--json", "--plot"])
@pytest.mark.parametrize(
    "place, reason",
    [
        ("file/below.png", "is a file, expected a folder"),
        ("folder", "it is a folder"),
        ("x" * 300, "File name too long"),
    ],
)
def test_an_output_that_cannot_be_written_is_found_first(
    cli, folder, tmp_path, unloaded, command, option, place, reason
):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    code, _, err = cli(command, *base(folder), option, tmp_path / place)
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert (
        code == 2
        and len(errors) == 1
        and errors[0].startswith(f"error: cannot write {tmp_path}/")
        and reason in errors[0]
    ), err


def test_a_cache_folder_that_cannot_be_written_is_found_before_tuning(cli, folder, tmp_path, monkeypatch, unloaded):
    monkeypatch.setenv("FIRP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").write_text("a file")
    files = "--model", folder / "model", "--predictor", folder / "predictor", "--prompts", folder / "prompts.jsonl"
    code, _, err = cli("tune", *files)
    assert code == 2 and f"cannot write {tmp_path}/cache/trees/" in err and "is a file, expected a folder" in err


def test_a_picture_that_cannot_be_drawn_leaves_the_old_one(tmp_path):
    def draw(path):
        path.write_bytes(b"half")
        raise RuntimeError("half drawn")

    picture = tmp_path / "bench.png"
    picture.write_bytes(b"old")
    with pytest.raises(OSError, match=r"cannot write .*bench.png: half drawn"):
        write_atomically(picture, draw)
    assert picture.read_bytes() == b"old" and os.listdir(tmp_path) == ["bench.png"]


def test_other_machines_entries_outlive_a_failed_write(tmp_path, monkeypatch):
    made = Choice(1, None, {1: (Rung(TreeConfig(1, 1), 1.0, 1.0),)}, "firp tune")
    path = tmp_path / "kept.json"
    save_choice(path, "first machine", made)
    with monkeypatch.context() as context:
        context.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
        with pytest.raises(PermissionError, match=r"kept.json: Permission denied; what was there before is unchanged"):
            save_choice(path, "second machine", made)
    assert list(json.loads(path.read_text())) == ["first machine"] and os.listdir(tmp_path) == ["kept.json"]
