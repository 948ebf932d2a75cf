"""Writes that fail at any operation leave whole files and whole lines."""

import errno
import os

import pytest

from recipes import durable

OPERATIONS = ("pwrite", "ftruncate", "open")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EMFILE])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_failed_append_leaves_whole_lines(tmp_path, monkeypatch, operation, code):
    file = tmp_path / "rows"
    file.write_bytes(b"one\nha")  # half a line of a crash
    real, calls = getattr(os, operation), []

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) == 1:
            raise OSError(code, os.strerror(code))
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(durable.os, operation, failing)
        with pytest.raises(OSError, match=os.strerror(code)):
            durable.append_lines(file, "two\n")
    assert file.read_bytes() in (b"one\n", b"one\nha")
    durable.append_lines(file, "two\n")
    assert file.read_bytes() == b"one\ntwo\n"


def test_a_short_write_then_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    file, real, calls = tmp_path / "rows", os.pwrite, []
    file.write_bytes(b"one\n")

    def full(descriptor, data, at):
        calls.append(1)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "full")
        return real(descriptor, data[:2], at)

    monkeypatch.setattr(durable.os, "pwrite", full)
    with pytest.raises(OSError, match="full"):
        durable.append_lines(file, "two\n")
    assert file.read_bytes() == b"one\n"


def test_half_a_line_of_a_crash_is_cut_before_the_next(tmp_path):
    file = tmp_path / "rows"
    for before, kept in [(b"one\ntw", b"one\n"), (b"tw", b""), (b"", b""), (b"one\n" + b"x" * 70_000, b"one\n")]:
        file.write_bytes(before)
        durable.append_lines(file, "new\n")
        assert file.read_bytes() == kept + b"new\n"


def test_a_failed_replacement_keeps_the_earlier_file(tmp_path, monkeypatch):
    file = tmp_path / "summary.json"
    file.write_bytes(b"earlier")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(durable.os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        durable.replace_text(file, "new")
    assert file.read_bytes() == b"earlier" and [path.name for path in tmp_path.iterdir()] == [file.name]
