"""eval --degrade on images: one artifact and its original under every condition, from the command line and Python."""

import shutil

import edgec as package
import numpy as np
import onnx
import pytest
from conftest import document
from edgec.calib.degrade import CONDITIONS, QRID
from edgec.compiler import show
from edgec.compiler.errors import DataError, UserError
from PIL import Image
from rich.console import Console

#: Grey level -> class; flat images, so that nothing but noise makes neighbouring pixels differ.
LEVELS = {0: 60, 1: 200}
COUNT = 12


def save(path, edges):
    """Write a classifier of brightness, light or dark; what its neighbours differ by is added `edges` times."""
    text = """<ir_version: 8, opset_import: ["" : 13]>
    g (float[N, 3, 16, 16] image) => (float[N, 2] logits) {
      bright = GlobalAveragePool (image)
      change = Conv (image, across)
      size = Abs (change)
      rough = GlobalAveragePool (size)
      more = Mul (rough, edges)
      grey = Conv (bright, mean)
      sum = Add (grey, more)
      light = Sub (sum, half)
      dark = Neg (light)
      both = Concat <axis = 1> (dark, light)
      logits = Flatten (both)
    }"""
    model = onnx.parser.parse_model(text)
    across = np.zeros((1, 3, 1, 2), np.float32)
    across[:, :, 0] = [1, -1]
    constants = {"across": across, "mean": np.full((1, 3, 1, 1), 1 / 3), "edges": edges, "half": 0.5}
    for name, value in constants.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value, np.float32), name))
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """Return a folder with the original, an artifact that noise spoils, and images in class folders."""
    folder = tmp_path_factory.mktemp("flat")
    save(folder / "original.onnx", 0)
    save(folder / "spoilt.onnx", 30)
    for label, level in LEVELS.items():
        (folder / f"images/{label}").mkdir(parents=True)
        for i in range(COUNT):
            Image.new("RGB", (16, 16), (level + i,) * 3).save(folder / f"images/{label}/{i}.png")
    return folder


def verdicts(found):
    return {name: c.difference.verdict for name, c in found.conditions.items() if c.difference}


def judge(folder, name, degrade="qrid", images=None):
    images = images or folder / "images"
    return package.robustness(folder / name, images, degrade, against=folder / "original.onnx", threads=1)


def test_what_noise_spoils_is_worse_under_noise_only(flat):
    found = judge(flat, "spoilt.onnx")
    assert [name for name, v in verdicts(found).items() if v == "worse"] == ["noise-low", "noise-medium"]
    assert found.conditions["clean"].fidelity.value == 100.0
    assert found.conditions["noise-medium"].fidelity.value == 50.0
    assert found.conditions["noise-medium"].original.value == 100.0
    assert {d.images for c in found.conditions.values() if (d := c.difference)} == {2 * COUNT}


def test_what_noise_spoils_shows_without_labels(flat, tmp_path):
    for file in sorted((flat / "images").rglob("*.png")):
        shutil.copy(file, tmp_path / f"{file.parent.name}-{file.name}")
    found = judge(flat, "spoilt.onnx", images=tmp_path)
    assert found.metric == "agreement"
    assert [name for name, v in verdicts(found).items() if v == "worse"] == ["noise-low", "noise-medium"]
    assert "clean" not in verdicts(found)
    assert found.conditions["low-contrast"].original.drop > 0  # light images become dark


def test_an_artifact_that_is_its_original_differs_nowhere(flat):
    found = judge(flat, "original.onnx", "all")
    assert list(found.conditions) == list(CONDITIONS)
    assert set(verdicts(found).values()) == {"no difference shown"}


def test_clean_is_what_eval_says_without_degrading(flat):
    plain = package.evaluate(flat / "spoilt.onnx", flat / "images", against=flat / "original.onnx", threads=1)
    assert judge(flat, "spoilt.onnx", "blur-low").conditions["clean"].fidelity == plain


def test_a_damaged_image_is_left_out_of_all_conditions(flat, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(flat / "images", images)
    whole = (images / "0/3.png").read_bytes()
    (images / "0/3.png").write_bytes(whole[: len(whole) // 2])
    found = judge(flat, "spoilt.onnx", images=images)
    assert {c.fidelity.images for c in found.conditions.values()} == {2 * COUNT - 1}
    assert {c.original.images for c in found.conditions.values()} == {2 * COUNT - 1}


def test_arrays_are_refused(flat, tmp_path):
    np.save(tmp_path / "samples.npy", np.zeros((4, 3, 16, 16), np.float32))
    with pytest.raises(DataError, match="only images can be changed"):
        judge(flat, "spoilt.onnx", images=tmp_path)


@pytest.mark.parametrize("text", ["mixed", "mixed:0.5", "minimax"])
def test_ways_to_calibrate_are_no_conditions(flat, text):
    with pytest.raises(UserError, match="way to calibrate"):
        judge(flat, "spoilt.onnx", text)


def test_a_model_alone_shows_what_it_loses_itself(flat, tmp_path):
    found = package.robustness(flat / "spoilt.onnx", flat / "images", "noise-medium,blur-low", threads=1)
    assert verdicts(found) == {}
    assert [c.original.value for c in found.conditions.values()] == [100.0, 50.0, 100.0]
    console = Console(record=True, width=100)
    show.quality(found, console)
    assert "verdict" not in console.export_text()


@pytest.mark.parametrize("width", [80, 110])
def test_the_table_is_aligned_and_whole(flat, width):
    console = Console(record=True, width=width)
    show.quality(judge(flat, "spoilt.onnx"), console)
    text = console.export_text()
    said = "Worse than the original under noise-low, noise-medium; no difference shown under the other 6"
    assert " ".join(text.split()).startswith(said)
    rows = [line.rstrip() for line in text.splitlines() if line.strip().split(" ")[0] in QRID]
    assert len(rows) == len(QRID)  # none is wrapped
    assert all(line.endswith(("worse", "no difference shown")) for line in rows)
    assert len({line.index(".") for line in rows}) == 1
    assert max(len(line) for line in text.splitlines()) <= width


def test_the_document(bundle, tiny, edgec):
    found = document(edgec("eval", bundle, tiny / "images", "--degrade", "noise-low,jpeg-low", "--seed", 3, "--json"))
    assert set(found) == {"model", "against", "seed", "conditions", "together", "notes"}
    assert list(found["conditions"]) == ["clean", "noise-low", "jpeg-low"]
    plain = document(edgec("eval", bundle, tiny / "images", "--seed", 3, "--json"))["conditions"]["clean"]
    clean = found["conditions"]["clean"]
    assert {key: clean[key] for key in plain} == plain
    for entry in found["conditions"].values():
        assert set(entry) == {*plain, "original", "difference", "verdict"}
        assert entry["verdict"] == entry["difference"]["verdict"]
        assert entry["difference"]["low"] <= entry["difference"]["value"] <= entry["difference"]["high"]
        assert (entry["original"]["metric"], entry["original"]["images"]) == ("top1", 80)


def test_an_unknown_condition_is_the_users_mistake(bundle, tiny, edgec):
    done = edgec("eval", bundle, tiny / "images", "--degrade", "nois-low")
    assert done.returncode == 2
    assert "did you mean 'noise-low'" in done.stderr
    assert not done.stdout
