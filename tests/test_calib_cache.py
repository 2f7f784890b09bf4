"""The cache of statistics: what changes the key, and what may go wrong with the file."""

import os
import threading

import numpy as np
import pytest
from edgec.calib import cache
from edgec.calib.cache import CalibrationData, collect_cached, directory, key_of
from edgec.calib.folder import open_folder
from edgec.compiler import model as model_io
from edgec.compiler.errors import OutputError
from edgec.compiler.types import InputSpec, Preprocess
from PIL import Image
from zoo import model as parse

NET = "g (float[N,3,8,8] x) => (float[N,3,8,8] y) <float[3,3,1,1] w> { c = Conv (x, w)  y = Relu (c) }"
SPEC = InputSpec("x", "float32", (None, 3, 8, 8))
PRE = Preprocess((8, 8))
TENSORS = ("x", "c", "y")


def images(folder, seed=0, count=4):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path):
    return open_folder(images(tmp_path / "images"), PRE, (SPEC,))


def same(one, two):
    assert list(one) == list(two)
    for name in one:
        a, b = one[name], two[name]
        assert (a.min, a.max, a.images, a.low, a.high) == (b.min, b.max, b.images, b.low, b.high)
        assert (a.histogram is None) == (b.histogram is None)
        if a.histogram is not None:
            np.testing.assert_array_equal(a.histogram, b.histogram)
            assert a.histogram.dtype == b.histogram.dtype


@pytest.mark.parametrize("histogram", [False, True])
def test_second_time_comes_from_the_cache(data, histogram, monkeypatch):
    model = parse(NET)
    first = collect_cached(model, TENSORS, data, histogram=histogram)
    monkeypatch.setattr(cache, "collect_together", None)
    second = collect_cached(model, TENSORS, data, histogram=histogram)
    assert not first.cached and second.cached and first.key == second.key
    same(first.statistics, second.statistics)
    assert [p.name for p in directory().iterdir()] == [f"{first.key}.npz"]


def test_nothing_to_observe(data):
    for _ in range(2):
        assert collect_cached(parse(NET), (), data, histogram=True).statistics == {}


def test_cache_lies_where_the_user_says(tmp_path):
    assert directory() == tmp_path / "cache" / "edgec" / "statistics"


def test_what_changes_the_key(data, tmp_path, monkeypatch):
    key = lambda folder=data, tensors=TENSORS, model="m", histogram=True, seed=0: key_of(  # noqa: E731  # local shorthand
        model, tensors, folder, histogram=histogram, seed=seed
    )
    opened = lambda pre: open_folder(data.path, pre, (SPEC,))  # noqa: E731  # local shorthand
    keys = [
        key(),
        key(model="n"),
        key(tensors=("x", "c")),
        key(histogram=False),
        key(seed=1),
        key(data.subset([0, 1])),
        key(data.transformed(lambda image, name: image, "blur")),
        key(opened(Preprocess((8, 8), color="bgr"))),
        key(opened(Preprocess((8, 8), mean=(0.5,)))),
        key(opened(Preprocess((8, 8), resize="crop"))),
    ]
    monkeypatch.setattr(cache, "__version__", "9.9.9")
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_what_does_not_change_the_key(data):
    key = key_of("m", TENSORS, data, histogram=True, seed=0)
    assumed = open_folder(data.path, Preprocess((8, 8), assumed=("color rgb",)), (SPEC,))
    assert key_of("m", TENSORS[::-1], assumed, histogram=True, seed=0) == key


def test_same_names_with_other_contents_are_calibrated_again(tmp_path):
    model = parse(NET)
    found = [
        collect_cached(model, TENSORS, open_folder(images(tmp_path / d, seed), PRE, (SPEC,)), histogram=False)
        for d, seed in (("a", 1), ("b", 2), ("c", 1))
    ]
    assert [f.cached for f in found] == [False, False, True]
    assert found[0].statistics["c"].max != found[1].statistics["c"].max


def test_one_touched_image_is_enough(data):
    model = parse(NET)
    before = collect_cached(model, TENSORS, data, histogram=False)
    Image.new("RGB", (8, 8), (255, 0, 0)).save(data.path / "2.png")
    after = collect_cached(model, TENSORS, open_folder(data.path, PRE, (SPEC,)), histogram=False)
    assert not after.cached and after.key != before.key


def test_changed_weights_change_the_key(data):
    models = [parse(NET, {"w": np.full((3, 3, 1, 1), value, np.float32)}) for value in (1, 2)]
    assert len({collect_cached(m, TENSORS, data, histogram=False).key for m in models}) == 2
    stated = collect_cached(models[0], TENSORS, data, histogram=False, fingerprint=model_io.fingerprint(models[0]))
    assert stated.cached


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b"junk" * 50, "flip", "other"])
def test_a_damaged_file_is_made_anew(data, damage):
    model = parse(NET)
    first = collect_cached(model, TENSORS, data, histogram=True)
    path = directory() / f"{first.key}.npz"
    if damage == "flip":
        whole = bytearray(path.read_bytes())
        whole[len(whole) // 2] ^= 0xFF
        path.write_bytes(whole)
    elif damage == "other":
        with path.open("wb") as file:
            np.savez(file, something=np.zeros(3))
    else:
        path.write_bytes(damage(path.read_bytes()))
    second = collect_cached(model, TENSORS, data, histogram=True)
    assert not second.cached
    same(first.statistics, second.statistics)
    assert collect_cached(model, TENSORS, data, histogram=True).cached


def test_a_full_disk_is_not_fatal(data, monkeypatch, caplog):
    def full(path):
        raise OutputError("the disk is full", where=str(path))

    monkeypatch.setattr(cache, "atomic_file", full)
    assert set(collect_cached(parse(NET), TENSORS, data, histogram=False).statistics) == set(TENSORS)
    assert "the disk is full" in caplog.text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(data, tmp_path):
    (tmp_path / "cache").mkdir(mode=0o500)
    assert not collect_cached(parse(NET), TENSORS, data, histogram=False).cached


def test_a_file_in_place_of_the_folder(data, tmp_path, caplog):
    (tmp_path / "cache").write_text("in the way")
    assert set(collect_cached(parse(NET), TENSORS, data, histogram=False).statistics) == set(TENSORS)
    assert "not kept" in caplog.text


def test_writing_is_all_or_nothing(data, monkeypatch):
    def killed(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(np, "savez_compressed", killed)
        with pytest.raises(KeyboardInterrupt):
            collect_cached(parse(NET), TENSORS, data, histogram=False)
    assert not directory().exists() or list(directory().iterdir()) == []
    assert not collect_cached(parse(NET), TENSORS, data, histogram=False).cached


def test_several_writers_at_once(data):
    model = parse(NET)
    found = []
    jobs = [
        threading.Thread(target=lambda: found.append(collect_cached(model, TENSORS, data, histogram=True)))
        for _ in range(4)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    for other in found[1:]:
        same(found[0].statistics, other.statistics)
    assert len(found) == 4 and [p.suffix for p in directory().iterdir()] == [".npz"]


def test_what_was_skipped_is_known_the_second_time(tmp_path):
    folder = images(tmp_path / "images")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "2.png")
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:3000])
    model = parse(NET)
    for cached in (False, True):
        data = open_folder(folder, PRE, (SPEC,))
        assert collect_cached(model, TENSORS, data, histogram=False).cached == cached
        assert [r.node for r in data.skipped] == ["2.png"] and len(data) == 3


def test_calibration_data_provides_statistics(data):
    model = parse(NET)
    provider = CalibrationData(data, histogram=False)
    same(provider.collect(model, TENSORS), collect_cached(model, TENSORS, data, histogram=False).statistics)
