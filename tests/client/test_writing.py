"""A file is written as a whole, and nothing about it changes but its content."""

import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from colaserve_client.writing import write_file


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_reader_sees_the_old_content_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_file(path, "old")
    with path.open() as reader:
        write_file(path, "new 日本")
        assert reader.read() == "old"
    assert path.read_text(encoding="utf-8") == "new 日本"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("bits", [0o600, 0o640, 0o666])
def test_the_mode_and_a_second_name_stay(tmp_path: Path, bits: int) -> None:
    path, plain = tmp_path / "file", tmp_path / "plain"
    plain.write_text("")
    write_file(path, "old, and longer")
    assert mode(path) == mode(plain), "that of any new file"
    path.chmod(bits)
    write_file(path, b"new")
    assert (mode(path), path.read_bytes()) == (bits, b"new")
    (tmp_path / "two").hardlink_to(path)
    write_file(path, "newer")
    assert ((tmp_path / "two").read_text(), path.samefile(tmp_path / "two")) == ("newer", True)


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    real, link, dangling = tmp_path / "folder" / "real", tmp_path / "link", tmp_path / "dangling"
    real.write_text("old")
    link.symlink_to(real)
    dangling.symlink_to("folder/new")
    write_file(link, "new")
    write_file(dangling, "made")
    assert (link.is_symlink(), real.read_text()) == (True, "new")
    assert (dangling.is_symlink(), (tmp_path / "folder" / "new").read_text()) == (True, "made")


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_text()))
    reader.start()
    write_file(pipe, "through")
    reader.join()
    assert (found, stat.S_ISFIFO(pipe.stat().st_mode)) == (["through"], True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_error_that_names_the_file_and_devices_stay() -> None:
    with pytest.raises(OSError, match="No space left on device: '/dev/full'") as caught:
        write_file("/dev/full", "text")
    assert caught.value.errno == errno.ENOSPC
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)
    write_file("/dev/null", "text")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_file_that_cannot_be_written_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "file"
    with pytest.raises(FileNotFoundError, match=str(path)):
        write_file(path, "text")
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        write_file(tmp_path, "text")
    assert os.listdir(tmp_path) == []
