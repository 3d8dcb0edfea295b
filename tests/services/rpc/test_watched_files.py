"""Files that change while they are watched."""

import logging
import os

import pytest

from colaserve_services.errors import UsageError
from colaserve_services.rpc.watched_files import WatchedFiles


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    return path


def test_a_file_is_read_again_once_for_each_change(file):
    watched = WatchedFiles(file, None)
    assert watched.read_again(file.read_text) is None
    file.write_text("newer")
    assert watched.read_again(file.read_text) == "newer"
    assert watched.read_again(file.read_text) is None
    renamed = file.with_name("renamed")
    renamed.write_text("third")
    os.utime(renamed, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    renamed.rename(file)
    assert watched.read_again(file.read_text) == "third"


def test_what_could_not_be_read_is_read_at_a_later_look_and_complained_of_once(file, caplog):
    caplog.set_level(logging.INFO)
    watched = WatchedFiles(file)

    def fail():
        raise UsageError("no right to read it")

    file.write_text("newer")
    assert [watched.read_again(fail) for _ in range(3)] == [None, None, None]
    assert watched.read_again(file.read_text) == "newer"  # though the file has not changed since
    file.write_text("newest")
    assert watched.read_again(fail) is None
    assert [record.levelname for record in caplog.records] == ["ERROR", "INFO", "ERROR"]


def test_a_file_that_is_away_is_one_that_changed(file):
    watched = WatchedFiles(file)
    file.unlink()

    def read():
        try:
            return file.read_text()
        except OSError as error:
            raise UsageError(str(error)) from error

    assert watched.read_again(read) is None
    file.write_text("back")
    assert watched.read_again(read) == "back"
