"""Label files beside images: found, read, brought to the model's input; and what is wrong with them."""

import json

import numpy as np
import pytest
from edgec.calib import geometry
from edgec.calib.box_labels import find
from edgec.calib.folder import open_folder, together
from edgec.calib.preprocess import apply
from edgec.compiler.errors import DataError
from edgec.compiler.types import InputSpec, Preprocess
from PIL import Image, ImageDraw

SPEC = InputSpec("x", "float32", (None, 3, 32, 64))
PRE = Preprocess(size=(32, 64))


def image(path, size=(40, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)
    return path


def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def coco(path, images, annotations, categories=(7, 3)):
    text(
        path,
        json.dumps(
            {
                "images": [{"id": i, "file_name": n, "width": 40, "height": 20} for i, n in enumerate(images)],
                "annotations": [{"image_id": i, "category_id": c, "bbox": b, **more} for i, c, b, more in annotations],
                "categories": [{"id": c, "name": str(c)} for c in categories],
            }
        ),
    )


def labels(folder, pre=PRE):
    return open_folder(folder, pre, (SPEC,)).with_box_labels().box_labels


# --------------------------------------------------------------------------------------------- YOLO


def test_yolo_beside_the_images(tmp_path):
    image(tmp_path / "a.png"), image(tmp_path / "b.png"), image(tmp_path / "c.png")
    text(tmp_path / "a.txt", "2 0.5 0.5 0.5 0.25\n\n0 0.125 0.25 0.25 0.5\n")
    text(tmp_path / "b.txt", "")
    found = labels(tmp_path)
    assert (found.kind, found.size) == ("YOLO", (32, 64))
    assert found.boxes["a.png"].tolist() == [[0.25, 0.375, 0.75, 0.625, 1, 2], [0, 0, 0.25, 0.5, 1, 0]]
    assert found.boxes["b.png"].shape == found.boxes["c.png"].shape == (0, 6)


@pytest.mark.parametrize("opened", [".", "images", "images/train"])
def test_yolo_in_a_folder_labels_beside_images(tmp_path, opened):
    image(tmp_path / "images/train/a.png")
    text(tmp_path / "labels/train/a.txt", "0 0.5 0.5 1 1\n")
    (boxes,) = labels(tmp_path / opened).boxes.values()
    assert boxes.tolist() == [[0, 0, 1, 1, 1, 0]]


def test_nothing_is_found_where_nothing_is(tmp_path):
    image(tmp_path / "a.png")
    text(tmp_path / "classes.txt", "cat\n")
    assert labels(tmp_path) is None


def test_labels_are_not_looked_at_unless_asked_for(tmp_path):
    image(tmp_path / "a.png")
    text(tmp_path / "a.txt", "a picture of a cat")
    data = open_folder(tmp_path, PRE, (SPEC,))
    assert data.box_labels is None and next(data.batches()).box_labels is None


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("0 0.5 0.5 0.5", "has 4 values"),
        ("0 0.1 0.1 0.2 0.1 0.2 0.2", "has 7 values"),
        ("cat 0.5 0.5 0.5 0.5", "is no box"),
        ("0 0.5 0.5 0.5 x", "is no box"),
        ("-1 0.5 0.5 0.5 0.5", "no class and four fractions"),
        ("0 20 10 5 5", "no class and four fractions"),
        ("0 0.5 0.5 0.5 nan", "no class and four fractions"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, says):
    image(tmp_path / "a.png")
    text(tmp_path / "a.txt", f"0 0.5 0.5 0.5 0.5\n{line}\n")
    with pytest.raises(DataError, match=says) as caught:
        labels(tmp_path)
    assert "a.txt, line 2" in str(caught.value)


def test_a_file_that_is_no_text(tmp_path):
    image(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(DataError, match="cannot be read as text"):
        labels(tmp_path)


def test_labels_without_any_box(tmp_path):
    image(tmp_path / "a.png")
    text(tmp_path / "a.txt", "\n")
    with pytest.raises(DataError, match="hold no box"):
        labels(tmp_path)


# --------------------------------------------------------------------------------------------- COCO


ONE = [(0, 7, [10, 5, 20, 10], {})]
ROWS = [[0.25, 0.25, 0.75, 0.75, 1, 1]]  # category 7 is the second of 3 and 7


@pytest.mark.parametrize(
    ("opened", "file"),
    [
        ("d", "d/annotations.json"),
        ("d", "d/_annotations.coco.json"),
        ("d", "d/instances_any.json"),
        ("d", "d/annotations/instances_default.json"),
        ("d", "instances_d.json"),
        ("d", "annotations/instances_d.json"),
    ],
)
def test_coco_in_and_beside_the_folder(tmp_path, opened, file):
    image(tmp_path / "d/a.png")
    coco(tmp_path / file, ["a.png"], ONE)
    found = labels(tmp_path / opened)
    assert (found.kind, found.boxes["a.png"].tolist()) == ("COCO", ROWS)


def test_the_one_of_several_that_has_the_folders_name(tmp_path):
    image(tmp_path / "val/a.png")
    coco(tmp_path / "annotations/instances_train.json", ["b.png"], [])
    coco(tmp_path / "annotations/instances_val.json", ["a.png"], ONE)
    assert labels(tmp_path / "val").boxes["a.png"].tolist() == ROWS
    (tmp_path / "val").rename(tmp_path / "photos")
    with pytest.raises(DataError, match="which of these"):
        labels(tmp_path / "photos")


def test_images_are_found_by_name_crowds_do_not_count_and_sizes_may_be_missing(tmp_path):
    image(tmp_path / "images/a.png"), image(tmp_path / "x/b.png"), image(tmp_path / "y/b.png")
    annotations = [*ONE, (1, 3, [0, 0, 40, 20], {"iscrowd": 1}), (9, 3, [0, 0, 1, 1], {})]
    coco(tmp_path / "annotations.json", ["val/a.png", "x/b.png", "y/b.png", "else.png"], annotations)
    document = json.loads((tmp_path / "annotations.json").read_text())
    del document["images"][0]["width"]
    text(tmp_path / "annotations.json", json.dumps(document))
    found = labels(tmp_path).boxes
    assert found["images/a.png"].tolist() == ROWS
    assert found["x/b.png"].tolist() == [[0, 0, 1, 1, 0, 0]]
    assert len(found["y/b.png"]) == 0


def test_boxes_are_in_the_pixels_that_the_file_states(tmp_path):
    image(tmp_path / "a.png", (400, 200))  # resized since it was labelled
    coco(tmp_path / "annotations.json", ["a.png"], ONE)
    assert labels(tmp_path).boxes["a.png"].tolist() == ROWS


def test_a_file_beside_with_other_images_is_not_theirs(tmp_path):
    image(tmp_path / "d/a.png")
    coco(tmp_path / "instances_all.json", ["b.png"], [])
    assert labels(tmp_path / "d") is None
    coco(tmp_path / "d/annotations.json", ["b.png"], [])
    with pytest.raises(DataError, match="1 of the 1 images are not in its 'images', such as a.png"):
        labels(tmp_path / "d")


def test_yolo_comes_first(tmp_path):
    image(tmp_path / "a.png")
    text(tmp_path / "a.txt", "0 0.5 0.5 1 1\n")
    coco(tmp_path / "annotations.json", ["a.png"], ONE)
    assert labels(tmp_path).kind == "YOLO"


@pytest.mark.parametrize(
    ("key", "value", "where", "says"),
    [
        ("bbox", [1, 2, 3], "annotations[0]", "'bbox' is [1, 2, 3]"),
        ("bbox", [1, 2, -3, 4], "annotations[0]", "'bbox' is"),
        ("bbox", None, "annotations[0]", "'bbox' is None"),
        ("bbox", [1, 2, 3, float("nan")], "annotations[0]", "'bbox' is"),
        ("category_id", 5, "annotations[0]", "'category_id' is 5, which is no category"),
        ("category_id", "cat", "annotations[0]", "not a whole number"),
        ("image_id", [0], "annotations[0]", "not a whole number"),
        ("file_name", None, "images[0]", "has no 'file_name'"),
        ("id", "one", "images[0]", "not a whole number"),
        ("width", 0, "images[0]", "its size is 0 x 20"),
        ("images", {}, "annotations.json", "no list of objects 'images'"),
        ("annotations", [1], "annotations.json", "no list of objects 'annotations'"),
        ("categories", [{"name": "cat"}], "categories[0]", "'id' is None"),
    ],
)
def test_a_broken_entry_is_named(tmp_path, key, value, where, says):
    image(tmp_path / "a.png")
    coco(tmp_path / "annotations.json", ["a.png"], ONE)
    document = json.loads((tmp_path / "annotations.json").read_text())
    at = next((d for d in (document, document["annotations"][0], document["images"][0]) if key in d), None)
    at[key] = value
    text(tmp_path / "annotations.json", json.dumps(document))
    with pytest.raises(DataError) as caught:
        labels(tmp_path)
    assert where in str(caught.value) and says in str(caught.value)


def test_json_that_is_none_names_the_line(tmp_path):
    image(tmp_path / "a.png")
    text(tmp_path / "annotations.json", '{"images": [],\n "annotations": [}\n')
    with pytest.raises(DataError, match="annotations.json, line 2: is not valid JSON"):
        labels(tmp_path)
    text(tmp_path / "annotations.json", "[]")
    with pytest.raises(DataError, match="no list of objects 'images'"):
        labels(tmp_path)


# --------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize(
    ("resize", "size", "expected"),
    [
        ("stretch", (40, 40), (0, 0, 40, 40)),
        ("crop", (40, 40), (0, 10, 40, 30)),
        ("crop", (100, 40), (10, 0, 90, 40)),
        ("letterbox", (40, 40), (-20, 0, 60, 40)),
        ("letterbox", (40, 10), (0, -5, 40, 15)),
        ("letterbox", (64, 32), (0, 0, 64, 32)),
    ],
)
def test_which_window_of_the_image_is_the_input(resize, size, expected):
    assert geometry.window(resize, size, (64, 32)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("resize", ["stretch", "letterbox", "crop"])
@pytest.mark.parametrize("size", [(300, 200), (120, 310), (64, 32), (1000, 90)])
def test_a_drawn_object_lies_where_its_label_says(resize, size):
    """A white square on black, through the pixels' own way."""
    width, height = size
    square = np.array([0.47 * width, 0.42 * height, 0.56 * width, 0.6 * height]).round()
    picture = Image.new("RGB", size)
    ImageDraw.Draw(picture).rectangle([*square[:2], *(square[2:] - 1)], fill="white")
    pre = Preprocess(size=(96, 160), resize=resize)
    pixels = apply(picture, pre, InputSpec("x", "float32", (1, 3, 96, 160)))[0, 0]
    left, top, right, bottom = geometry.window(resize, size, (160, 96))
    scale = np.array([160 / (right - left), 96 / (bottom - top)] * 2)
    x1, y1, x2, y2 = (square - [left, top, left, top]) * scale
    shown = pixels - 114 / 255 * (np.abs(pixels - 114 / 255) < 1e-6)  # without the border's grey
    rows, columns = shown.sum(1), shown.sum(0)
    # the light is that of the square; half a pixel is what the filter and the grid may shift it by
    assert shown.sum() == pytest.approx((x2 - x1) * (y2 - y1), rel=0.05)
    assert (rows @ (np.arange(96) + 0.5)) / rows.sum() == pytest.approx((y1 + y2) / 2, abs=0.5)
    assert (columns @ (np.arange(160) + 0.5)) / columns.sum() == pytest.approx((x1 + x2) / 2, abs=0.5)


def test_letterboxed_labels(tmp_path):
    image(tmp_path / "a.png", (40, 40))  # in 64 x 32: 32 x 32 in the middle
    text(tmp_path / "a.txt", "0 0.5 0.5 1 1\n1 0.25 0.25 0.5 0.5\n")
    found = labels(tmp_path, Preprocess(size=(32, 64), resize="letterbox")).boxes["a.png"]
    assert found[:, :4].tolist() == [[0.25, 0, 0.75, 1], [0.25, 0, 0.5, 0.5]]


def test_what_a_crop_cuts_off(tmp_path):
    image(tmp_path / "a.png", (40, 40))  # of which the rows 10 to 30 are left
    whole, most, little, none = "0.5 0.5 0.5 0.25", "0.5 0.25 0.5 0.5", "0.5 0.15 0.5 0.25", "0.5 0.1 0.5 0.2"
    text(tmp_path / "a.txt", "".join(f"{i} {box}\n" for i, box in enumerate((whole, most, little, none))))
    found = labels(tmp_path, Preprocess(size=(32, 64), resize="crop")).boxes["a.png"]
    expected = [[0.25, 0.25, 0.75, 0.75, 1, 0], [0.25, 0, 0.75, 0.5, 1, 1], [0.25, 0, 0.75, 0.05, 0, 2]]
    np.testing.assert_allclose(found, expected, atol=1e-12)


# --------------------------------------------------------------------------------------------- in a folder


def test_batches_of_parts_and_of_changed_images_have_them(tmp_path):
    for name in "abcd":
        image(tmp_path / f"{name}.png")
        text(tmp_path / f"{name}.txt", f"{ord(name) - ord('a')} 0.5 0.5 1 1\n")
    data = open_folder(tmp_path, PRE, (SPEC,)).with_box_labels().subset([3, 1])
    changed = data.transformed(lambda picture, name: picture, "same")
    for step in together({"clean": data, "same": changed}, 2):
        for batch in step.values():
            assert [batch.box_labels.boxes[name][0, 5] for name in batch.names] == [3, 1]


def test_arrays_have_none(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 3, 32, 64), np.float32))
    text(tmp_path / "a.txt", "0 0.5 0.5 1 1\n")
    assert labels(tmp_path) is None


def test_finding_needs_no_open_folder(tmp_path):
    image(tmp_path / "a.png")
    text(tmp_path / "a.txt", "0 0.5 0.5 0 0.5\n0 0.5 0.5 1 1\n")
    assert find(tmp_path, ["a.png"], PRE).boxes["a.png"].tolist() == [[0, 0, 1, 1, 1, 0]]  # the one with an area
