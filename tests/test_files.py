"""Output that appears whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from edgec.compiler.errors import OutputError
from edgec.compiler.files import atomic_file, staged_folder, write_atomic


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make_bundle(out: Path) -> Path:
    out.mkdir()
    (out / "manifest.json").write_text("{}")
    (out / "old.txt").write_text("old")
    return out


@contextmanager
def full_disk(limit: int = 10_000) -> Iterator[None]:
    """Let the kernel refuse to let any file grow beyond `limit` bytes: a real fault, without a disk to fill."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ------------------------------------------------------------------------------------------- one file


@pytest.mark.parametrize("data", [b"\x00\xff", "naïve"])
def test_write_atomic_replaces_and_makes_parents(tmp_path, data):
    path = tmp_path / "a" / "b" / "file"
    write_atomic(path, "before")
    write_atomic(path, data)
    assert path.read_bytes() == (data if isinstance(data, bytes) else data.encode())
    assert names(path.parent) == ["file"]


def test_written_file_has_the_usual_rights(tmp_path):
    (tmp_path / "plain").write_text("")
    write_atomic(tmp_path / "atomic", "")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("fault", [KeyboardInterrupt, ValueError])
def test_interrupted_file_leaves_the_old_one(tmp_path, fault):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(fault), atomic_file(path) as file:
        file.write(b"new")
        raise fault
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


def test_full_disk_leaves_no_file_and_no_parents(tmp_path):
    with full_disk(), pytest.raises(OutputError, match="larger than") as caught:
        write_atomic(tmp_path / "a" / "b" / "file", bytes(100_000))
    assert caught.value.fix and names(tmp_path) == []


def test_file_where_a_parent_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("keep")
    with pytest.raises(OutputError, match="cannot be written"):
        write_atomic(tmp_path / "file" / "inner", "x")
    assert names(tmp_path) == ["file"]


# ------------------------------------------------------------------------------------------- a folder


def test_folder_appears_only_at_the_end(tmp_path):
    out = tmp_path / "deep" / "out"
    with staged_folder(out, force=False) as stage:
        (stage / "sub").mkdir()
        (stage / "sub" / "file").write_text("x")
        assert not out.exists() and stage.parent == out.parent
    assert (out / "sub" / "file").read_text() == "x" and names(out.parent) == ["out"]


@pytest.mark.parametrize("fault", [KeyboardInterrupt, SystemExit, ValueError])
@pytest.mark.parametrize("force", [False, True])
def test_interrupted_folder_leaves_what_was_there(tmp_path, fault, force):
    if force:
        make_bundle(tmp_path / "out")
    before = names(tmp_path)
    with pytest.raises(fault), staged_folder(tmp_path / "out", force) as stage:
        (stage / "file").write_text("x")
        raise fault
    assert names(tmp_path) == before
    assert not force or (tmp_path / "out" / "old.txt").read_text() == "old"


def test_interrupted_folder_takes_its_new_parents_away(tmp_path):
    with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path / "a" / "b" / "out", force=False):
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_existing_folder_is_refused(tmp_path):
    make_bundle(tmp_path / "out")
    with pytest.raises(OutputError, match="exists already") as caught, staged_folder(tmp_path / "out", False):
        pytest.fail("nothing may be done before the check")
    assert "--force" in str(caught.value) and names(tmp_path / "out") == ["manifest.json", "old.txt"]


@pytest.mark.parametrize("old", ["bundle", "empty"])
def test_force_replaces(tmp_path, old):
    out = tmp_path / "out"
    make_bundle(out) if old == "bundle" else out.mkdir()
    with staged_folder(out, force=True) as stage:
        (stage / "new.txt").write_text("new")
        assert out.exists()
    assert names(out) == ["new.txt"] and names(tmp_path) == ["out"]


def test_force_deletes_no_folder_that_is_not_a_bundle(tmp_path):
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter1.tex").write_text("ten years of work")
    with pytest.raises(OutputError, match=re.escape("manifest.json")), staged_folder(out, force=True):
        pytest.fail("nothing may be done before the check")
    assert names(out) == ["chapter1.tex"]


@pytest.mark.parametrize("force", [False, True])
def test_file_in_the_place_of_the_folder(tmp_path, force):
    (tmp_path / "out").write_text("keep")
    with pytest.raises(OutputError, match="is a file"), staged_folder(tmp_path / "out", force):
        pytest.fail("nothing may be done before the check")
    assert (tmp_path / "out").read_text() == "keep"


def test_force_follows_a_link_and_keeps_it(tmp_path):
    make_bundle(tmp_path / "real")
    (tmp_path / "out").symlink_to("real")
    with staged_folder(tmp_path / "out", force=True) as stage:
        (stage / "new.txt").write_text("new")
    assert (tmp_path / "out").is_symlink() and names(tmp_path / "real") == ["new.txt"]


def test_folder_that_appears_meanwhile_is_not_overwritten(tmp_path):
    with pytest.raises(OutputError, match="exists already"), staged_folder(tmp_path / "out", force=False):
        make_bundle(tmp_path / "out")
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "old.txt").exists()


def test_failing_swap_puts_the_old_bundle_back(tmp_path, monkeypatch):
    out = make_bundle(tmp_path / "out")
    rename, calls = Path.rename, []

    def second_fails(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(KeyboardInterrupt), staged_folder(out, force=True):
        pass
    assert names(tmp_path) == ["out"] and names(out) == ["manifest.json", "old.txt"]


def test_full_disk_while_the_folder_is_filled(tmp_path):
    out = tmp_path / "out"
    with full_disk(), pytest.raises(OutputError) as caught, staged_folder(out, force=False) as stage:
        (stage / "big").write_bytes(bytes(100_000))
    assert caught.value.where == str(out) and names(tmp_path) == []


@pytest.mark.parametrize("number, words", [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "quota")])
def test_full_disk_is_named(tmp_path, number, words):
    with pytest.raises(OutputError, match=words), staged_folder(tmp_path / "out", force=False):
        raise OSError(number, os.strerror(number))


def test_other_faults_inside_the_block_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError), staged_folder(tmp_path / "out", force=False):
        (tmp_path / "missing").read_text()
    assert names(tmp_path) == []


def test_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OutputError, match="cannot be written"),
        staged_folder(tmp_path / "file" / "out", False),
    ):
        pytest.fail("nothing may be done before the check")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_write_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="ermission"), staged_folder(tmp_path / "out", force=False):
        pytest.fail("nothing may be done before the check")
