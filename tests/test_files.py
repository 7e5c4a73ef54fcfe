"""Files are whole or not there, for any refusal of the disk, and whenever a process is killed."""

import errno
import os
import signal
import subprocess
import threading

import numpy as np
import pytest
import torch
from firp.tools.files import check_writable, explained, locked, read_once, remove_stale, write_atomically
from firp.train.run_files import write_checkpoint
from safetensors.torch import save_file


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], capture_output=True).returncode
        == 0
    )
    if not mounted:
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def _npz(path):
    with open(path, "wb") as file:
        np.savez(file, values=np.random.default_rng(0).random(20_000))


TOO_LARGE = {
    "text": lambda path: path.write_text("x" * 200_000),
    "npz": _npz,
    "safetensors": lambda path: save_file({"values": torch.zeros(40_000)}, path),
}


@pytest.mark.parametrize("kind", TOO_LARGE)
def test_a_full_disk_keeps_the_old_file(small_disk, kind):
    path = small_disk / "file"
    path.write_text("old")
    with pytest.raises(
        OSError, match=r"cannot write .*file: No space left on device; .* unchanged; free some space"
    ) as raised:
        write_atomically(path, TOO_LARGE[kind])
    assert raised.value.errno == errno.ENOSPC and "\n" not in str(raised.value)
    assert path.read_text() == "old" and os.listdir(small_disk) == ["file"]


def test_a_full_disk_keeps_the_old_checkpoint(small_disk):
    path = small_disk / "checkpoint.pt"
    write_checkpoint(path, {"step": 1})
    with pytest.raises(OSError, match="No space left on device") as raised:
        write_checkpoint(path, {"step": 2, "weights": torch.zeros(40_000)})
    assert raised.value.errno == errno.ENOSPC
    assert torch.load(path, weights_only=True) == {"step": 1} and os.listdir(small_disk) == ["checkpoint.pt"]


def test_a_disk_without_room_for_a_folder_is_one_sentence(small_disk):
    (small_disk / "full").write_bytes(b"x" * os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize)
    with pytest.raises(OSError, match="cannot write"):
        write_atomically(small_disk / "a/b/file", lambda path: path.write_text("x" * 5000))


def test_a_read_only_disk_is_found_before_the_work(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OSError, match=r"Read-only file system; .*; choose a place that can be written"):
        check_writable(small_disk / "figures.json")


def test_a_file_where_a_folder_is_needed_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"{tmp_path}/file is a file, expected a folder"):
        check_writable(tmp_path / "file/below/figures.json")


def test_a_folder_where_a_file_is_to_be_is_refused(tmp_path):
    with pytest.raises(IsADirectoryError, match=r"it is a folder; .*; name a file in it"):
        check_writable(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_too_long_is_one_sentence(tmp_path):
    with pytest.raises(OSError, match="File name too long"):
        check_writable(tmp_path / ("x" * 300))
    write_atomically(tmp_path / ("x" * 255), lambda path: path.write_text("whole"))
    write_atomically(tmp_path / ("é" * 127), lambda path: path.write_text("whole"))


@pytest.mark.parametrize(
    "error", [PermissionError(errno.EACCES, "Permission denied"), OSError(errno.EDQUOT, "Disk quota exceeded")]
)
def test_the_kind_of_error_is_kept(tmp_path, error):
    with (
        pytest.raises(type(error), match=f"cannot write {tmp_path}/file: {error.strerror}") as raised,
        explained(tmp_path / "file"),
    ):
        raise error
    assert raised.value.errno == error.errno and raised.value.__cause__ is error


def test_other_errors_of_a_writer_pass(tmp_path):
    with pytest.raises(ValueError, match="matplotlib is not installed"):
        write_atomically(
            tmp_path / "plot.png", lambda path: (_ for _ in ()).throw(ValueError("matplotlib is not installed"))
        )
    assert not list(tmp_path.iterdir())


def killed_writer(path):
    """A process that dies in the middle of writing; returns the signal that ended it."""

    def write(staged):
        staged.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            write_atomically(path, write)
        finally:
            os._exit(1)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def test_what_killed_writers_left_is_swept_by_the_next(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    for _ in range(2):
        assert killed_writer(path) == signal.SIGKILL
        assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 2
    write_atomically(path, lambda staged: staged.write_text("new"))
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_what_a_live_writer_holds_is_left_alone(tmp_path):
    path = tmp_path / "file"

    def write(staged):
        staged.write_text("first")
        remove_stale(path)
        write_atomically(path, lambda other: other.write_text("second"))
        assert staged.read_text() == "first" and path.read_text() == "second"

    write_atomically(path, write)
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


def test_many_writers_of_one_file_leave_one_of_theirs(tmp_path):
    path, texts = tmp_path / "file", [str(i) * 100_000 for i in range(8)]
    threads = [
        threading.Thread(target=write_atomically, args=(path, lambda staged, text=text: staged.write_text(text)))
        for text in texts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts and list(tmp_path.iterdir()) == [path]


def test_a_folder_is_lent_to_one_at_a_time(tmp_path):
    with locked(tmp_path), pytest.raises(BlockingIOError, match="another process is at work in it"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_a_disk_that_knows_no_locks_is_written_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks available")))
    stale = tmp_path / ".file.firp-of_another"
    stale.mkdir()
    write_atomically(tmp_path / "file", lambda staged: staged.write_text("whole"))
    assert (tmp_path / "file").read_text() == "whole" and stale.is_dir()


def test_a_file_is_read_again_once_it_was_written_again(tmp_path):
    path, reads = tmp_path / "figures", []

    def read(path):
        reads.append(path.read_text())
        return reads[-1]

    for text in ("one", "other"):
        write_atomically(path, lambda staging, text=text: staging.write_text(text))
        assert [read_once(path, read), read_once(path, read)] == [text, text]
    assert reads == ["one", "other"]
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_once(path, read)


def test_what_may_not_be_looked_at_is_left_to_the_reader(tmp_path, monkeypatch):
    monkeypatch.setattr(type(tmp_path), "stat", lambda *_, **__: (_ for _ in ()).throw(PermissionError("no")))
    assert read_once(tmp_path / "figures", lambda path: path.name) == "figures"
