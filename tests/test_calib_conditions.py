"""Several conditions in one sweep: batches of the same images, the same statistics as alone, and keys of the cache."""

import os
import threading
from collections import Counter

import numpy as np
import pytest
from edgec.calib import cache, observe
from edgec.calib.cache import collect_cached, collect_cached_together, joint_key
from edgec.calib.degrade import CONDITIONS, QRID, transform, under
from edgec.calib.folder import open_folder, together
from edgec.calib.minimax import choose
from edgec.calib.observe import collect, collect_together
from edgec.compiler.errors import DataError
from edgec.compiler.types import InputSpec, Preprocess
from PIL import Image
from zoo import model as parse

NET = """g (float[N,3,8,8] x) => (float[N,4,6,6] y) <float[4,3,3,3] w, float[4] b> {
    c = Conv (x, w, b)
    r = Relu (c)
    y = Sigmoid (r)
}"""
SPEC = InputSpec("x", "float32", (None, 3, 8, 8))
PRE = Preprocess((8, 8))
TENSORS = ("x", "c", "r")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def images(folder, count=11, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture
def place(tmp_path):
    return images(tmp_path / "images")


def opened(place, spec=SPEC):
    return open_folder(place, PRE, (spec,))


def cut_short(path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:3000])


def same(one, two):
    assert list(one) == list(two)
    for name in one:
        a, b = one[name], two[name]
        assert (a.min, a.max, a.images, a.low, a.high) == (b.min, b.max, b.images, b.low, b.high)
        np.testing.assert_array_equal(a.histogram, b.histogram)


# ------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(("size", "batch"), [(1, None), (3, None), (20, None), (3, 4)])
def test_together_is_each_alone(place, size, batch):
    cut_short(place / "04.png")
    folders = under(opened(place, InputSpec("x", "float32", (batch, 3, 8, 8))), ("clean", "noise-low", "mixed"), 1)
    steps = list(together(folders, size))
    assert [set(step) for step in steps] == [set(folders)] * len(steps)
    for name, folder in folders.items():
        for step, alone in zip(steps, folder.batches(size), strict=True):
            found = step[name]
            assert (found.names, found.count, found.rows) == (alone.names, alone.count, alone.rows)
            np.testing.assert_array_equal(found.feed["x"], alone.feed["x"])
    assert sum(step["clean"].count for step in steps) == 10
    assert [r.node for r in folders["noise-low"].skipped] == ["04.png"]


def test_labels_go_along(tmp_path):
    for c in "ab":
        images(tmp_path / "d" / c, 2)
    (step,) = together(under(opened(tmp_path / "d"), ("haze", "clean"), 0), 9)
    assert step["haze"].labels.tolist() == step["clean"].labels.tolist() == [0, 0, 1, 1]


def test_every_image_is_decoded_once(place, monkeypatch):
    seen, lock, folders, really = Counter(), threading.Lock(), under(opened(place), QRID, 0), Image.open

    def counting(path, *args, **options):
        if isinstance(path, os.PathLike):  # not the stream that JPEG is decoded from
            with lock:
                seen[path.name] += 1
        return really(path, *args, **options)

    monkeypatch.setattr(Image, "open", counting)
    assert len(list(together(folders, 4))) == 3
    assert set(seen.values()) == {1} and len(seen) == 11


def test_no_more_samples_wait_than_of_one_folder(tmp_path):
    data = opened(images(tmp_path / "d", 60))
    lock, seen = threading.Lock(), []

    def note(image, name):
        with lock:
            seen.append(name)
        return image

    steps = together({str(i): data.transformed(note, str(i)) for i in range(4)}, 4, workers=3)
    next(steps)
    assert len(seen) <= 4 * 4 + 4 * (3 + 2)  # handed out, and waiting: one sample of four for each worker and two more
    steps.close()


def test_only_copies_of_one_folder(tmp_path):
    one, other = (opened(images(tmp_path / d)) for d in "ab")
    for pair in ({"a": one, "b": other}, {"a": one, "b": one.subset([0])}):
        with pytest.raises(ValueError, match="copies of one folder"):
            next(together(pair))


def test_nothing_readable(tmp_path):
    (tmp_path / "d").mkdir()
    cut_short(tmp_path / "d" / "0.png")
    with pytest.raises(DataError, match="none of its 1 files"):
        list(together(under(opened(tmp_path / "d"), ("clean", "haze"), 0)))


def test_arrays_have_one_condition(tmp_path):
    np.save(tmp_path / "0.npy", np.zeros((2, 3, 8, 8), np.float32))
    data = open_folder(tmp_path, None, (SPEC,))
    (step,) = together(under(data, ("clean",), 0), 4)
    assert step["clean"].count == 2
    with pytest.raises(DataError, match="only images"):
        under(data, ("clean", "haze"), 0)


# ------------------------------------------------------------------------------------- statistics


def test_one_sweep_gives_what_separate_sweeps_give(place, monkeypatch):
    monkeypatch.setattr(observe, "_samples", lambda images: 48)  # not all elements, so that the draws matter
    cut_short(place / "07.png")
    model, data = parse(NET), opened(place)
    list(data.batches(4))  # the damaged one is known from here on, so all sweeps have the same number of images
    folders = under(data, (*CONDITIONS, "mixed"), 3)
    told = []
    found = collect_together(
        model, TENSORS, folders, histogram=True, batch=4, threads=2, progress=lambda *step: told.append(step)
    )
    assert list(found) == list(folders) and told[-1] == ("calibrating", 10, 10)
    for name, folder in folders.items():
        same(found[name], collect(model, TENSORS, folder, histogram=True, batch=4, threads=1))
    assert len({stats["x"].histogram.tobytes() for stats in found.values()}) == len(folders)
    assert collect_together(model, (), folders, histogram=True) == {name: {} for name in folders}


def test_what_is_not_finite_under_one_condition_is_named(place):
    model = parse("g (float[N,3,8,8] x) => (float[N,3,8,8] y) { l = Log (x)  y = Relu (l) }")

    def black(image, name):
        return Image.new("RGB", image.size)

    data = opened(place)
    white = data.transformed(lambda image, name: Image.new("RGB", image.size, (9, 9, 9)), "w")
    with pytest.raises(DataError, match="tensor 'l' holds infinite"):
        collect_together(model, ("l",), {"w": white, "b": data.transformed(black, "b")}, histogram=False)


# ------------------------------------------------------------------------------------- the cache


def test_clean_then_mixed_in_the_same_folder(place):
    """QRID's error: its cache was keyed by file names, so the mixed run got the clean run's scales."""
    model = parse(NET)
    clean = collect_cached(model, TENSORS, opened(place), histogram=True)
    mixed = collect_cached(model, TENSORS, opened(place).transformed(*transform("mixed", 0)), histogram=True)
    again = collect_cached(model, TENSORS, opened(place), histogram=True)
    assert not mixed.cached and again.cached and clean.key == again.key != mixed.key
    for name in TENSORS:
        a, b = (choose(dict(only=found.statistics[name]), "mse") for found in (clean, mixed))
        assert a != b, name
    same(clean.statistics, again.statistics)


def test_same_name_size_and_time_but_other_pixels(place):
    model, path = parse(NET), place / "02.png"
    bmp = place / "02.bmp"  # no compression: the size stays
    Image.open(path).save(bmp)
    path.unlink()
    before = collect_cached_together(model, TENSORS, under(opened(place), ("clean", "haze"), 0), histogram=False)
    stat = bmp.stat()
    Image.open(bmp).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(bmp)
    os.utime(bmp, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (bmp.stat().st_size, bmp.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    after = collect_cached_together(model, TENSORS, under(opened(place), ("clean", "haze"), 0), histogram=False)
    assert all(not after[c].cached and after[c].key != before[c].key for c in before)
    assert joint_key(before) != joint_key(after)


@pytest.mark.parametrize("change", ["fraction", "seed", "version", "names", "one more"])
def test_all_of_the_plan_is_in_the_key(place, monkeypatch, change):
    def key(text="mixed:0.5", seed=0):
        return opened(place).transformed(*transform(text, seed)).manifest()

    before = key("haze,noise-low") if change in ("names", "one more") else key()
    if change == "version":
        monkeypatch.setattr("edgec.calib.degrade.VERSION", -1)
    after = {
        "fraction": lambda: key("mixed:0.6"),
        "seed": lambda: key(seed=1),
        "version": key,
        "names": lambda: key("haze,noise-medium"),
        "one more": lambda: key("haze,noise-low,clean"),
    }[change]()
    assert before != after and key("haze,clean") == key("clean, haze")


def test_one_condition_more_sweeps_only_what_is_missing(place, monkeypatch):
    model, swept = parse(NET), []

    def watched(model, tensors, folders, **rest):
        swept.append(tuple(folders))
        return collect_together(model, tensors, folders, **rest)

    monkeypatch.setattr(cache, "collect_together", watched)

    def found(*conditions):
        return collect_cached_together(model, TENSORS, under(opened(place), conditions, 0), histogram=True)

    clean = collect_cached(model, TENSORS, opened(place), histogram=True)
    two = found("clean", "haze")
    three = found("noise-low", "haze", "clean")
    assert swept == [("",), ("haze",), ("noise-low",)]
    assert {c: f.cached for c, f in three.items()} == {"noise-low": False, "haze": True, "clean": True}
    assert list(three) == ["noise-low", "haze", "clean"] and two["clean"].key == clean.key
    same(three["haze"].statistics, two["haze"].statistics)
    same(three["clean"].statistics, clean.statistics)
    other_way = found("clean", "haze", "noise-low")
    assert joint_key(other_way) == joint_key(three) != joint_key(two)
    assert all(f.cached for f in other_way.values()) and len(swept) == 3


def test_what_was_skipped_is_known_from_the_cache(place):
    cut_short(place / "04.png")
    model = parse(NET)
    for cached in (False, True):
        data = opened(place)
        found = collect_cached_together(model, TENSORS, under(data, ("clean", "haze"), 0), histogram=False)
        assert [f.cached for f in found.values()] == [cached] * 2
        assert [r.node for r in data.skipped] == ["04.png"] and len(data) == 10
        assert {stats.images for f in found.values() for stats in f.statistics.values()} == {10}
