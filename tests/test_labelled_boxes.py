"""A tiny detector judged by box labels: eval, eval --degrade, compile; and the algebra against brute force."""

import json
import shutil

import edgec as package
import numpy as np
import onnx
import pytest
from conftest import document
from edgec.calib.box_labels import BoxLabels
from edgec.compiler import robustness, show
from edgec.compiler.errors import DataError
from edgec.compiler.fidelity import Metric, compare, compare_together
from edgec.compiler.per_image import PerImage
from edgec.compiler.report import html, serial, text
from PIL import Image, ImageDraw
from rich.console import Console
from test_fidelity import Batch, Fake

COUNT, CELL = 40, 8
COLOURS = ("red", "lime")

DECODER = """import numpy as np

def {name}(outputs):
    grid = outputs["grid"]
    label, row, column = np.nonzero(grid > 0.5)
    box = np.stack([column, row, column + 1, row + 1], axis=1) * {scale}
    return np.column_stack([box, grid[label, row, column], label])
"""


def save(path, green):
    """Write a detector of red and green squares of 8 x 8 on a grid, whose reaction to green is multiplied."""
    text = """<ir_version: 8, opset_import: ["" : 13]>
    g (float[N, 3, 32, 32] image) => (float[N, 2, 4, 4] grid) {
      seen = Conv <strides = [8, 8]> (image, eyes)
      grid = Relu (seen)
    }"""
    model = onnx.parser.parse_model(text)
    eyes = np.zeros((2, 3, 8, 8), np.float32)
    eyes[0, 0], eyes[1, 1] = 1 / 64, green / 64
    model.graph.initializer.append(onnx.numpy_helper.from_array(eyes, "eyes"))
    model.graph.node[0].name, model.graph.node[1].name = "Conv_0", "Relu_1"
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """Return a folder with detectors, decoders, and images with YOLO labels: a red and a green square on each."""
    folder = tmp_path_factory.mktemp("squares")
    save(folder / "original.onnx", 1.0)
    save(folder / "spoilt.onnx", 0.3)
    for name, scale in {"fractions": "0.25", "pixels": "8"}.items():
        (folder / f"{name}_decoder.py").write_text(DECODER.format(name="decode", scale=scale))
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        picture, lines = Image.new("RGB", (32, 32)), []
        for label, cell in enumerate(rng.choice(16, 2, replace=False)):
            row, column = divmod(int(cell), 4)
            corner = (CELL * column, CELL * row)
            ImageDraw.Draw(picture).rectangle([*corner, corner[0] + 7, corner[1] + 7], fill=COLOURS[label])
            lines.append(f"{label} {(column + 0.5) / 4} {(row + 0.5) / 4} 0.25 0.25\n")
        picture.save(folder / f"images/{i:02}.png")
        (folder / f"images/{i:02}.txt").write_text("".join(lines))
    return folder


def decoder(folder, units="fractions"):
    return f"{folder / f'{units}_decoder.py'}:decode"


@pytest.fixture(scope="module")
def unlabelled(squares, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unlabelled") / "images"
    shutil.copytree(squares / "images", folder, ignore=shutil.ignore_patterns("*.txt"))
    return folder


def evaluate(folder, name, *, against="original.onnx", images=None, units="fractions", **kwargs):
    return package.evaluate(
        folder / name,
        images or folder / "images",
        against=None if against is None else folder / against,
        metric=decoder(folder, units),
        threads=1,
        **kwargs,
    )


def shown(found, width=100):
    console = Console(record=True, width=width)
    show.quality(found, console)
    return console.export_text()


# --------------------------------------------------------------------------------------------- eval


@pytest.mark.parametrize("units", ["fractions", "pixels"])
def test_a_model_that_misses_one_of_two_classes(squares, units):
    found = evaluate(squares, "spoilt.onnx", units=units)
    assert (found.metric, found.images) == ("boxes-labelled", COUNT)
    assert found.reference == pytest.approx(100.0)
    assert found.value == pytest.approx(100 * 2 / 3)  # F1 of a recall of one half
    assert found.drop == pytest.approx(100 / 3)
    assert found.drop_low == found.drop_high == pytest.approx(found.drop)  # each image loses the same
    boxes = found.boxes
    assert (boxes.truth, boxes.boxes) == ("YOLO", 2 * COUNT)
    assert (boxes.reference_ap50, boxes.reference_ap) == (100.0, 100.0)
    assert (boxes.ap50, boxes.ap) == (50.0, 50.0)


def test_without_labels_the_originals_boxes_are_the_truth(squares, unlabelled):
    found = evaluate(squares, "spoilt.onnx", images=unlabelled)
    assert (found.metric, found.reference) == ("boxes", 100.0)
    assert found.value == pytest.approx(100 * 2 / 3)
    assert (found.boxes.truth, found.boxes.boxes, found.boxes.ap) == ("original", 2 * COUNT, 50.0)
    assert "judged by the original's boxes: 40 images, 80 boxes" in shown(found)


def test_labels_alone_are_enough_to_judge_by(squares, unlabelled):
    found = evaluate(squares, "original.onnx", against=None)
    assert (found.value, found.reference, found.drop) == (pytest.approx(100.0), None, None)
    assert (found.boxes.ap, found.boxes.reference_ap) == (100.0, None)
    with pytest.raises(DataError, match="nothing to judge by"):
        evaluate(squares, "original.onnx", against=None, images=unlabelled)


def test_coco_says_the_same(squares, unlabelled, tmp_path):
    shutil.copytree(unlabelled, tmp_path / "val")
    images, annotations = [], []
    for i, path in enumerate(sorted((squares / "images").glob("*.txt"))):
        images.append({"id": i, "file_name": path.with_suffix(".png").name, "width": 32, "height": 32})
        for line in path.read_text().splitlines():
            label, x, y, w, h = (32 * float(v) for v in line.split())
            box = [x - w / 2, y - h / 2, w, h]
            annotations.append({"image_id": i, "category_id": 5 + int(label / 32), "bbox": box, "iscrowd": 0})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 5}, {"id": 6}]}
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_val.json").write_text(json.dumps(content))
    coco, yolo = (evaluate(squares, "spoilt.onnx", images=path) for path in (tmp_path / "val", squares / "images"))
    assert coco.boxes.truth == "COCO"
    assert (coco.value, coco.drop, coco.boxes.ap) == (yolo.value, yolo.drop, yolo.boxes.ap)


def test_the_terminal_says_what_it_was_judged_by(squares):
    found = shown(evaluate(squares, "spoilt.onnx"))
    assert "judged by box labels: 40 images, 80 boxes (YOLO)" in found
    rows = [line.split() for line in found.splitlines()]
    assert ["box", "F1", "100.00", "66.67", "33.33", "33.33", "-", "33.33"] in rows
    assert ["AP", "at", "IoU", "0.5", "100.00", "50.00", "50.00"] in rows
    assert ["AP,", "IoU", "0.5-0.95", "100.00", "50.00", "50.00"] in rows


def test_a_score_is_not_judged_by_labels(squares):
    (squares / "score.py").write_text("def score(outputs, reference):\n    return 0.5\n")
    found = package.evaluate(
        squares / "spoilt.onnx",
        squares / "images",
        against=squares / "original.onnx",
        metric=f"{squares / 'score.py'}:score",
        threads=1,
    )
    assert (found.metric, found.boxes) == ("metric", None)


def test_broken_labels_are_the_users_mistake(squares, tmp_path, edgec):
    shutil.copytree(squares / "images", tmp_path / "images")
    (tmp_path / "images/03.txt").write_text("0 0.5 0.5 0.2 0.2\n1 2 3\n")
    done = edgec("eval", squares / "original.onnx", tmp_path / "images", "--metric", decoder(squares))
    assert done.returncode == 2
    assert "03.txt, line 2: has 3 values" in done.stderr and "Traceback" not in done.stderr


# --------------------------------------------------------------------------------------------- eval --degrade


def degraded(squares, name="spoilt.onnx", against="original.onnx", images=None):
    return package.robustness(
        squares / name,
        images or squares / "images",
        "noise-low,low-light",
        against=None if against is None else squares / against,
        metric=decoder(squares),
        threads=1,
    )


def test_under_each_condition_by_the_same_labels(squares):
    found = degraded(squares)
    assert (found.metric, list(found.conditions)) == ("boxes-labelled", ["clean", "noise-low", "low-light"])
    for c in found.conditions.values():
        assert c.original.boxes.boxes == c.fidelity.boxes.boxes == 2 * COUNT
        assert c.difference.value == pytest.approx(c.fidelity.drop)
        assert (c.difference.low, c.difference.high) == (c.fidelity.drop_low, c.fidelity.drop_high)
    assert found.conditions["clean"].difference.verdict == "worse"
    light = found.conditions["low-light"].original
    assert (light.reference, light.boxes.reference_ap) == (pytest.approx(100.0), 100.0)
    assert light.value < 100 and light.boxes.ap < 100  # in the dark the original itself misses some
    assert found.notes[0] == "lost: the original's F1 less the result's under the same condition, in points"
    console = shown(found)
    assert "Box F1 under 3 conditions, %, on 40 images each" in console
    assert "judged by box labels: 40 images, 80 boxes (YOLO)" in console
    assert "its loss: beside its box F1 on clean images" in " ".join(console.split())
    assert "Average precision under each condition, %" in console
    assert max(len(line) for line in shown(found, 80).splitlines()) <= 80


def test_without_labels_under_each_condition(squares, unlabelled):
    found = degraded(squares, images=unlabelled)
    assert found.metric == "boxes"
    assert found.conditions["clean"].difference is None
    assert "beside the original's boxes" in shown(found)


def test_an_original_alone_under_each_condition(squares, unlabelled):
    for images, head in ((None, "box F1"), (unlabelled, "beside clean")):
        found = degraded(squares, "original.onnx", None, images)
        assert found.conditions["low-light"].fidelity is None
        assert head in shown(found) and "Average precision" in shown(found)


# --------------------------------------------------------------------------------------------- compile


@pytest.mark.parametrize("how", ["--eval", "--calib"])
def test_compile_judges_by_labels(squares, unlabelled, tmp_path, edgec, how):
    out = tmp_path / "out"
    folders = ["--calib", unlabelled, "--eval", squares / "images"] if how == "--eval" else [how, squares / "images"]
    judge = ["--metric", decoder(squares), "--precision", "int8", "--threads", 1, "--json"]
    report = document(edgec("compile", squares / "original.onnx", "-o", out, *folders, *judge))
    found = report["fidelity"]
    images = COUNT if how == "--eval" else COUNT // 2
    assert (found["metric"], found["images"]) == ("boxes-labelled", images)
    assert (found["boxes"]["truth"], found["boxes"]["boxes"]) == ("YOLO", 2 * images)
    assert found["drop"] == pytest.approx(found["reference"] - found["value"])
    whole = serial.from_json(json.loads((out / "report.json").read_text()))
    assert whole.fidelity.boxes.boxes == 2 * images
    assert text.quality(whole.fidelity) == "box F1 100 % (original 100 %)"
    page = html.render(whole)
    assert f"judged by box labels: {images} images, {2 * images} boxes (YOLO)" in page and "AP at IoU 0.5" in page


def test_the_document_of_eval(squares, edgec):
    args = ("eval", squares / "spoilt.onnx", squares / "images", "--against", squares / "original.onnx")
    entry = document(edgec(*args, "--metric", decoder(squares), "--json"))["conditions"]["clean"]
    assert set(entry["boxes"]) == {"truth", "boxes", "ap50", "ap", "reference_ap50", "reference_ap"}
    assert entry["metric"] == "boxes-labelled"


# --------------------------------------------------------------------------------------------- the algebra


def counts(rng, n=60):
    """Return columns 2 tp, boxes + objects of an original and of a model."""
    objects, hits = rng.integers(0, 5, n), [rng.integers(0, 5, n) for _ in range(2)]
    pairs = [(2 * np.minimum(h, objects), np.minimum(h, objects) + rng.integers(0, 3, n) + objects) for h in hits]
    return np.column_stack([column for pair in pairs for column in pair]).astype(float)


def test_the_difference_of_two_f1_is_resampled_as_one():
    columns = counts(np.random.default_rng(3))
    found = robustness.paired(PerImage("boxes-labelled", scores=columns), seed=4)

    def lost(i):
        a, b, c, d = columns[i].sum(0)
        return 100 * (a / b - c / d)

    rng = np.random.default_rng(4)
    draws = [lost(rng.integers(0, len(columns), len(columns))) for _ in range(1000)]
    assert found.value == pytest.approx(lost(np.arange(len(columns))), abs=1e-9)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(draws, [2.5, 97.5])), abs=1e-9)
    fidelity = PerImage("boxes-labelled", scores=columns).fidelity(4)
    assert (fidelity.drop, fidelity.drop_low, fidelity.drop_high) == (found.value, found.low, found.high)
    assert fidelity.reference - fidelity.value == pytest.approx(fidelity.drop)


def test_two_models_beside_the_same_labels():
    rng = np.random.default_rng(5)
    a, b = counts(rng), counts(rng)
    b[:, :2] = a[:, :2]
    found = robustness.paired(*(PerImage("boxes-labelled", scores=c) for c in (a, b)))
    f1 = [100 * c.sum(0)[2] / c.sum(0)[3] for c in (a, b)]
    assert found.value == pytest.approx(f1[1] - f1[0], abs=1e-9)
    assert found.differing == int((a[:, 2:] != b[:, 2:]).any(1).sum())


def test_false_boxes_on_images_without_objects_are_seen():
    columns = np.zeros((100, 4))
    columns[:50] = [2, 2, 2, 2]
    columns[50:80, 3] = 3  # where there is nothing, the model sees three
    found = robustness.paired(PerImage("boxes-labelled", scores=columns))
    assert (found.differing, found.verdict) == (30, "worse")


def fakes(rows, size=(10, 20)):
    """Return a batch of four images whose labels are these rows, each image the same."""
    names = ("a", "b", "c", "d")
    labels = BoxLabels("YOLO", size, {name: np.array(rows, dtype=float).reshape(-1, 6) for name in names})
    return [Batch({"i": np.array([0])}, None, 4, names=names, box_labels=labels)]


@pytest.mark.parametrize(
    ("box", "value"),
    [
        ([0.5, 0.5, 1.0, 1.0], 100.0),  # fractions
        ([10, 5, 20, 10], 100.0),  # pixels of an input 20 wide and 10 high
        ([0.5, 0.5, 1.0, 1.9], 0.0),  # fractions that reach out of the image
    ],
)
def test_fractions_and_pixels(box, value):
    metric = Metric(decode=lambda outputs: np.array([[*box, 0.9, 3]]))
    y = np.zeros((4, 2, 3, 3), np.float32)
    found = compare(Fake({"y": y}), {"x": Fake({"y": y})}, fakes([0.5, 0.5, 1, 1, 1, 3]), images=4, metric=metric)["x"]
    assert (found.metric, found.value) == ("boxes-labelled", value)


def test_boxes_are_matched_with_labels_once_for_each_model_and_condition(monkeypatch):
    calls = []
    from edgec.compiler import fidelity

    whole = fidelity.match
    monkeypatch.setattr(fidelity, "match", lambda *args: calls.append(1) or whole(*args))
    y = np.zeros((4, 2, 3, 3), np.float32)
    runs = {name: Fake({"y": y}) for name in ("p", "q")}
    (batch,) = fakes([0.5, 0.5, 1, 1, 1, 0])
    metric = Metric(decode=lambda outputs: np.zeros((0, 6)))
    compare_together(Fake({"y": y}), runs, [{"clean": batch, "noise": batch}], images=4, metric=metric)
    assert len(calls) == 3 * 2 * 4
