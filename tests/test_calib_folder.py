"""Folders: finding, checking, labels, splitting, hashing, batches."""

import threading
import time

import numpy as np
import pytest
from edgec.calib import batches
from edgec.calib.folder import open_folder
from edgec.compiler.errors import DataError
from edgec.compiler.types import InputSpec, Preprocess
from PIL import Image

SPEC = InputSpec("x", "float32", (None, 3, 4, 4))
PRE = Preprocess((4, 4), scale=1.0)


def save(path, value=0, size=(4, 4), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode != "RGB" else (value, value, value)).save(path)


def numbered(root, count, start=0):
    for i in range(count):
        save(root / f"{start + i:03}.png", i % 256)
    return root


def values(batches):
    return [v for b in batches for v in b.feed["x"][: b.count, 0, 0, 0]]


# ------------------------------------------------------------------------------------------ opening


def test_any_depth_sorted_and_only_images(tmp_path):
    for name in ("b/c/2.PNG", "a/1.png", "z.png"):
        save(tmp_path / name)
    save(tmp_path / ".hidden" / "3.png")
    save(tmp_path / "._z.png")
    (tmp_path / "README.txt").write_text("no image")
    data = open_folder(tmp_path, PRE, (SPEC,))
    assert [item.name for item in data.items] == ["a/1.png", "b/c/2.PNG", "z.png"]
    assert len(data) == 3 and data.skipped == () and data.labels() is None


def test_links_are_followed_once(tmp_path):
    numbered(tmp_path / "real", 2)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "set" / "loop").symlink_to(tmp_path / "set")
    assert len(open_folder(tmp_path / "set", PRE, (SPEC,))) == 2


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: None, "no such folder"),
        (lambda p: p.write_text("x"), "a file, not a folder"),
        (lambda p: p.mkdir(), "is empty"),
        (lambda p: (p.mkdir(), (p / "a.txt").write_text("x")), "only files with .txt"),
        (lambda p: (p.mkdir(), (p / "a.png").write_bytes(b"junk")), "none of its 1 files can be read"),
        (lambda p: (p.mkdir(), (p / "a.npy").write_bytes(b"junk")), "none of its 1 files can be read"),
    ],
)
def test_nothing_to_read(tmp_path, make, says):
    make(tmp_path / "d")
    with pytest.raises(DataError) as caught:
        open_folder(tmp_path / "d", PRE, (SPEC,))
    assert says in str(caught.value) and str(tmp_path / "d") in str(caught.value) and caught.value.fix


def test_unreadable_head_is_skipped_counted_and_named(tmp_path):
    numbered(tmp_path, 3)
    (tmp_path / "001.png").write_bytes(b"junk")
    data = open_folder(tmp_path, PRE, (SPEC,))
    assert len(data) == 2
    (refusal,) = data.skipped
    assert (refusal.node, refusal.rule) == ("001.png", "unreadable-image") and refusal.why


def test_image_cut_short_is_found_while_decoding(tmp_path):
    numbered(tmp_path, 4)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "001.png")
    whole = (tmp_path / "001.png").read_bytes()
    (tmp_path / "001.png").write_bytes(whole[: len(whole) // 2])
    data = open_folder(tmp_path, PRE, (SPEC,))
    first, second = data.subset([0, 1]), data.subset([2, 3])
    assert values(first.batches(2)) == [0]
    assert values(second.batches(2)) == [2, 3]
    assert [r.node for r in data.skipped] == ["001.png"] == [r.node for r in second.skipped]
    assert len(data) == 3 and len(first) == 1
    (tmp_path / "002.png").unlink()
    assert values(data.batches(2)) == [0, 3]  # gone in the meantime: skipped too


def test_all_cut_short(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:4000])
    with pytest.raises(DataError, match="none of its 1 files"):
        list(open_folder(tmp_path, PRE, (SPEC,)).batches(1))


def test_images_need_one_input_of_known_size(tmp_path):
    numbered(tmp_path, 1)
    with pytest.raises(DataError, match="2 inputs: x, y"):
        open_folder(tmp_path, PRE, (SPEC, InputSpec("y", "float32", (1, 2))))
    with pytest.raises(DataError, match="does not say how they fit"):
        open_folder(tmp_path, None, (InputSpec("x", "float32", (1, 3, None, None)),))


# ------------------------------------------------------------------------------------------ labels


def test_sorted_folders_are_classes(tmp_path):
    for name in ("dog/1.png", "cat/sub/1.png", "cat/2.png"):
        save(tmp_path / name)
    data = open_folder(tmp_path, PRE, (SPEC,))
    assert data.labels().tolist() == [0, 0, 1] and data.labels().dtype == np.int64
    assert [b.labels.tolist() for b in data.subset([2, 0]).batches(1)] == [[1], [0]]


def test_numbers_are_their_own_classes(tmp_path):
    for name in ("10", "9", "2"):
        save(tmp_path / name / "a.png")
    assert open_folder(tmp_path, PRE, (SPEC,)).labels().tolist() == [10, 2, 9]


def test_a_class_whose_images_are_all_unreadable_keeps_its_number(tmp_path):
    for name in ("a", "b", "c"):
        save(tmp_path / name / "1.png")
    (tmp_path / "b" / "1.png").write_bytes(b"junk")
    assert open_folder(tmp_path, PRE, (SPEC,)).labels().tolist() == [0, 2]


def test_one_folder_is_no_class(tmp_path):
    numbered(tmp_path / "images", 2)
    assert open_folder(tmp_path, PRE, (SPEC,)).labels() is None


# ------------------------------------------------------------------------------------------ splitting


def test_split_is_seeded_disjoint_and_stratified(tmp_path):
    for c, count in (("a", 90), ("b", 60), ("c", 50)):
        numbered(tmp_path / c, count)
    data = open_folder(tmp_path, PRE, (SPEC,))
    calibration, held = data.split(seed=0)
    names = lambda part: [item.name for item in part.items]  # noqa: E731  # local shorthand
    assert len(held) == 40 and len(calibration) == 160
    assert sorted(names(calibration) + names(held)) == sorted(names(data))
    assert np.bincount(held.labels()).tolist() == [18, 12, 10]
    assert names(data.split(seed=0)[1]) == names(held) != names(data.split(seed=1)[1])
    assert names(held) == sorted(names(held)) and calibration.notes == ()


def test_held_out_numbers_hold_where_shares_are_no_integers(tmp_path):
    for c, count in (("a", 34), ("b", 33), ("c", 33)):
        numbered(tmp_path / c, count)
    calibration, held = open_folder(tmp_path, PRE, (SPEC,)).split(seed=0)
    assert len(held) == 32 and sorted(np.bincount(held.labels())) == [10, 11, 11]
    assert len(calibration) == 68


@pytest.mark.parametrize(("count", "held"), [(2, 1), (3, 1), (10, 5), (63, 31), (100, 32), (300, 60)])
def test_held_out_share(tmp_path, count, held):
    data = open_folder(numbered(tmp_path, count), PRE, (SPEC,))
    calibration, judged = data.split(seed=3)
    assert (len(calibration), len(judged)) == (count - held, held)
    assert bool(calibration.notes) == (held < 32)


def test_a_single_image_is_on_both_sides(tmp_path):
    calibration, held = open_folder(numbered(tmp_path, 1), PRE, (SPEC,)).split(seed=0)
    assert len(calibration) == len(held) == 1 and "one image" in calibration.notes[0]


# ------------------------------------------------------------------------------------------ manifest


def test_manifest_is_of_names_and_contents(tmp_path):
    one, two = numbered(tmp_path / "one", 3), numbered(tmp_path / "two", 3)
    manifest = lambda place: open_folder(place, PRE, (SPEC,)).manifest()  # noqa: E731  # local shorthand
    assert manifest(one) == manifest(two) and len(manifest(one)) == 64
    save(two / "001.png", 77)
    assert manifest(one) != manifest(two)
    save(two / "001.png", 1)
    assert manifest(one) == manifest(two)
    (two / "001.png").rename(two / "0011.png")
    assert manifest(one) != manifest(two)


def test_manifest_of_parts(tmp_path):
    data = open_folder(numbered(tmp_path, 4), PRE, (SPEC,))
    assert data.subset([0, 1]).manifest() != data.subset([0, 2]).manifest()
    assert data.subset([1, 0]).manifest() == data.subset([0, 1]).manifest()
    assert data.transformed(lambda image, name: image, "blur").manifest() != data.manifest()


# ------------------------------------------------------------------------------------------ batches


def test_batches_in_order_and_short_at_the_end(tmp_path):
    data = open_folder(numbered(tmp_path, 7), PRE, (SPEC,))
    batches = list(data.batches(3, workers=4))
    assert [b.count for b in batches] == [3, 3, 1] == [len(b.feed["x"]) for b in batches]
    assert values(batches) == list(range(7)) == values(data.batches(3, workers=1))
    assert batches[2].names == ("006.png",) and batches[0].labels is None


@pytest.mark.parametrize("pad", [False, True])
def test_a_fixed_batch_is_padded_with_the_last_image(tmp_path, pad):
    spec = InputSpec("x", "float32", (4 if not pad else None, 3, 4, 4))
    data = open_folder(numbered(tmp_path, 6), PRE, (spec,))
    last = list(data.batches(4 if pad else 5, pad=pad))[-1]
    assert (last.count, last.rows, len(last.names)) == (2, 4, 2)
    assert last.feed["x"][:, 0, 0, 0].tolist() == [4, 5, 5, 5]


def test_a_skipped_image_leaves_no_hole(tmp_path):
    numbered(tmp_path, 5)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "001.png")
    (tmp_path / "001.png").write_bytes((tmp_path / "001.png").read_bytes()[:3000])
    batches = list(open_folder(tmp_path, PRE, (SPEC,)).batches(2))
    assert [b.count for b in batches] == [2, 2] and values(batches) == [0, 2, 3, 4]


def test_decoding_stays_a_bounded_number_ahead(tmp_path):
    data = open_folder(numbered(tmp_path, 60), PRE, (SPEC,))
    lock, seen = threading.Lock(), []

    def note(image, name):
        with lock:
            seen.append(name)
        return image

    batches = data.transformed(note, "note").batches(2, workers=3)
    next(batches)
    time.sleep(0.2)
    assert len(seen) <= 2 * (3 + 2)  # the chunk handed out, and one for each worker and one more
    batches.close()
    time.sleep(0.1)
    assert len(seen) <= 2 * (3 + 2)


def test_a_bug_in_a_transform_is_not_swallowed(tmp_path):
    data = open_folder(numbered(tmp_path, 2), PRE, (SPEC,))

    def broken(image, name):
        raise RuntimeError("bug")

    with pytest.raises(RuntimeError, match="bug"):
        list(data.transformed(broken, "broken").batches(1))


# ------------------------------------------------------------------------------------------ arrays

A, B = InputSpec("a", "float32", (None, 2)), InputSpec("b", "int64", (None, 3))


def test_npz_with_rows_and_without(tmp_path):
    np.savez(tmp_path / "0.npz", a=np.arange(6.0).reshape(3, 2), b=np.arange(9).reshape(3, 3))
    np.savez(tmp_path / "1.npz", a=np.full(2, 7.0), b=np.zeros(3, np.int64))
    data = open_folder(tmp_path, None, (A, B))
    assert len(data) == 4 and data.items[1].name == "0.npz#1"
    first, second = data.batches(3)
    assert first.feed["a"].tolist() == [[0, 1], [2, 3], [4, 5]] and first.feed["a"].dtype == np.float32
    assert second.feed["a"].tolist() == [[7, 7]] and second.feed["b"].dtype == np.int64


def test_npy_for_one_input_beside_images(tmp_path):
    np.save(tmp_path / "0.npy", np.arange(4.0).reshape(2, 2))
    save(tmp_path / "preview.png")
    data = open_folder(tmp_path, None, (A,))
    assert len(data) == 2 and "preview.png" in data.notes[0]
    with pytest.raises(DataError, match="only images can be changed"):
        data.transformed(lambda image, name: image, "blur")


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"a": np.zeros((3, 2))}, "no array named 'b', only a"),
        ({"a": np.zeros((3, 2)), "b": np.zeros((2, 3), np.int64)}, "different numbers of rows"),
        ({"a": np.zeros((3, 5)), "b": np.zeros((3, 3), np.int64)}, "has shape (3, 5)"),
        ({"a": np.zeros((3, 2)), "b": np.zeros((3, 3))}, "is float64, and the input takes int64"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, arrays, says):
    np.savez(tmp_path / "0.npz", **arrays)
    with pytest.raises(DataError) as caught:
        open_folder(tmp_path, None, (A, B))
    assert says in str(caught.value) and "0.npz" in str(caught.value) and caught.value.fix


def test_one_array_for_two_inputs(tmp_path):
    np.save(tmp_path / "0.npy", np.zeros((3, 2)))
    with pytest.raises(DataError, match="2 inputs"):
        open_folder(tmp_path, None, (A, B))


def test_inputs_without_a_common_batch_are_fed_whole(tmp_path):
    specs = (InputSpec("a", "float32", (4, 2)), InputSpec("t", "float32", ()))
    np.savez(tmp_path / "0.npz", a=np.ones((4, 2), np.float32), t=np.float32(0.5))
    (batch,) = open_folder(tmp_path, None, specs).batches(8)
    assert batch.feed["a"].shape == (4, 2) and batch.feed["t"].shape == () and (batch.count, batch.rows) == (1, 1)


def test_rows_of_different_shape_are_not_stacked(tmp_path):
    spec = InputSpec("a", "float32", (None, None))
    for i, length in enumerate((3, 3, 5)):
        np.save(tmp_path / f"{i}.npy", np.zeros((1, length), np.float32))
    assert [b.feed["a"].shape for b in open_folder(tmp_path, None, (spec,)).batches(2)] == [(2, 3), (1, 5)]


def test_a_damaged_archive_is_skipped(tmp_path):
    np.savez(tmp_path / "0.npz", a=np.zeros((1, 2)))
    (tmp_path / "1.npz").write_bytes(b"junk")
    data = open_folder(tmp_path, None, (A,))
    assert len(data) == 1 and data.skipped[0].rule == "unreadable-array"


def test_workers_never_exceed_what_helps():
    assert 1 <= batches.workers_of(None) <= batches._MOST_WORKERS and batches.workers_of(3) == 3
