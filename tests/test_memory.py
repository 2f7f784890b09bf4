"""What was measured once is known the next time, under a key that holds all that it depends on."""

import sqlite3
from importlib import metadata

import pytest
from edgec.compiler import memory
from edgec.compiler.memory import Memory, context


@pytest.fixture
def file(tmp_path):
    return tmp_path / "cache" / "measured.sqlite"


def test_numbers_come_back_bit_for_bit_and_misses_are_counted(file):
    values = [0.1 + 0.2, 1e-300, 3.0]
    first = Memory("key", file)
    assert first.get("a") is None
    first.put("a", values)
    assert (first.get("a"), first.misses) == (values, 1)
    again = Memory("key", file)  # while the first is open: a killed compile never closes it
    assert (again.get("a"), again.misses) == (values, 0)
    again.put("a", [1.0])
    assert first.get("a") == [1.0]


def test_another_context_knows_nothing(file):
    Memory("one", file).put("a", 1)
    assert Memory("other", file).get("a") is None


def test_what_is_damaged_is_made_anew(file, caplog):
    file.parent.mkdir()
    file.write_bytes(b"no database " * 1000)
    made = Memory("key", file)
    assert "damaged" in caplog.text
    made.put("a", 1)
    assert Memory("key", file).get("a") == 1


def test_what_cannot_be_written_costs_nothing_else(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    none = Memory("key", tmp_path / "file" / "measured.sqlite")
    none.put("a", 1)
    assert none.get("a") is None
    assert "not kept" in caplog.text


def test_a_table_that_vanishes_is_forgotten_not_fatal(file):
    kept = Memory("key", file)
    sqlite3.connect(file).execute("DROP TABLE measured")
    kept.put("a", 1)
    assert kept.get("a") is None


def test_each_part_and_the_version_of_onnxruntime_changes_the_key(monkeypatch):
    keys = [context("errors", a=1), context("latencies", a=1), context("errors", a=2), context("errors", a=1, b=None)]
    assert len(set(keys)) == 4 and context("errors", a=1) == keys[0]
    version = metadata.version
    monkeypatch.setattr(memory.metadata, "version", lambda name: version(name) + "+next")
    assert context("errors", a=1) != keys[0]


def test_latencies_are_those_of_one_machine_and_one_number_of_threads(monkeypatch):
    here = memory.of_machine(1)
    assert memory.of_machine(1) == here != memory.of_machine(2)
    monkeypatch.setattr(memory.platform, "node", lambda: "another")
    assert memory.of_machine(1) != here
