"""--degrade: what is calibrated on, under which key it is kept, and that a clean run is never taken for another one."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zoo
from edgec.calib import cache, minimax
from edgec.calib.degrade import QRID, under
from edgec.calib.folder import open_folder
from edgec.compiler import api, job, pipeline
from edgec.compiler import model as model_io
from edgec.compiler.errors import DataError, UserError
from edgec.compiler.options import Options
from edgec.compiler.proof import Prover
from edgec.compiler.quantization import conditions
from edgec.compiler.quantization import search as searching
from edgec.compiler.quantization.rounder import round_weights
from edgec.compiler.quantization.search import AUTO_METHODS, search
from edgec.compiler.report import facts
from edgec.compiler.types import CalibrationSummary, InputSpec, Preprocess, silent
from PIL import Image

NET = """g (float[N,3,12,12] x) => (float[N,4] y) <float[6,3,3,3] w, float[6] b, float[4,6] v> {
    c = Conv (x, w, b)
    r = Relu (c)
    p = GlobalAveragePool (r)
    f = Flatten (p)
    y = Gemm <transB = 1> (f, v)
}"""
TENSORS = ("x", "r")


@pytest.fixture
def place(tmp_path) -> Path:
    """A model and a folder of 12 uncompressed images, so that another image has the same size."""
    model = zoo.model(NET)
    for i, node in enumerate(model.graph):
        node.name = f"{node.op_type}_{i}"
    model_io.save(model, tmp_path / "model.onnx")
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(12):
        pixels = rng.integers(60, 180, (4, 4, 3), dtype=np.uint8).repeat(3, 0).repeat(3, 1)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i:02}.bmp")
    return tmp_path


def opened(place: Path):
    spec = InputSpec("x", "float32", (None, 3, 12, 12))
    return open_folder(place / "images", Preprocess((12, 12)), (spec,))


def resolved(place: Path, **options) -> job.Job:
    model = model_io.load(place / "model.onnx")
    given = {"device": "x86-avx512-vnni", "threads": 1, "calib": place / "images", "precision": "int8", **options}
    return job.resolve(place / "model.onnx", model, Options(**given), silent)


# ------------------------------------------------------------------------------------- end to end


def test_a_cache_keyed_by_names_would_be_found_out(place, edgec):
    """Same folder, same names: another condition, or another image in an old one's place, is another calibration."""

    def ranges(degrade: str) -> bytes:
        api.calibrate(place / "model.onnx", place / "images", place / "out.json", degrade=degrade, threads=1)
        return (place / "out.json").read_bytes()

    def elsewhere(degrade: str) -> bytes:
        """In another process, which has nothing in its cache."""
        options = ("-o", place / "out.json", "--threads", 1, "--degrade", degrade)
        env = {"XDG_CACHE_HOME": str(place / f"cache of {degrade}")}
        done = edgec("calibrate", place / "model.onnx", place / "images", *options, env=env)
        assert done.returncode == 0, done.stderr
        return (place / "out.json").read_bytes()

    ways = ("clean", "mixed", "minimax")
    written = {way: ranges(way) for way in ways}
    found = {way: json.loads(text) for way, text in written.items()}
    assert (
        len({json.dumps(one["ranges"]) for one in found.values()}) == len({one["key"] for one in found.values()}) == 3
    )
    for way in ways:
        assert ranges(way) == written[way], "from the cache"
    for way in ways[1:]:
        assert elsewhere(way) == written[way]

    image = place / "images" / "03.bmp"
    before = image.stat()
    Image.fromarray(np.full((12, 12, 3), 250, np.uint8)).save(image)
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert image.stat().st_size == before.st_size and image.stat().st_mtime_ns == before.st_mtime_ns
    for way in ways:
        new = json.loads(ranges(way))
        assert new["key"] != found[way]["key"] and new["ranges"] != found[way]["ranges"]


def test_an_unknown_condition_is_named_with_its_neighbours(place, edgec):
    done = edgec("compile", place / "model.onnx", "--calib", place / "images", "--degrade", "blurhigh")
    assert done.returncode == 2
    assert "blurhigh" in done.stderr and "did you mean 'blur-high'" in done.stderr and "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------- clean is as ever


def test_clean_changes_nothing(place):
    images, several = conditions.calibrated_on(folder := opened(place), "clean", 3)
    assert images is folder and not several
    model = model_io.load(place / "model.onnx")
    swept = conditions.sweep(model, TENSORS, images, several, histogram=True, seed=0, threads=1, progress=silent)
    assert swept.key == cache.collect_cached(model, TENSORS, opened(place), histogram=True, threads=1).key
    assert facts._degraded("clean") == ""


@pytest.mark.parametrize("degrade", ["mixed", "minimax", "haze", "all"])
def test_images_to_judge_by_stay_clean(place, degrade):
    this, plain = resolved(place, degrade=degrade), resolved(place)
    assert this.images.transform_name and not this.judged.transform_name
    assert this.judged.manifest() == plain.judged.manifest()
    assert [item.name for item in this.images.items] == [item.name for item in plain.images.items]
    assert set(this.conditions) == (set(QRID) if degrade == "minimax" else set())


# ------------------------------------------------------------------------------------- minimax


@pytest.mark.parametrize("without", [(), ("ranges",)])
def test_minimax_chooses_ranges_for_all_conditions_and_judges_on_the_mixture(place, without):
    this = resolved(place, degrade="minimax", without=without)
    model, _ = pipeline.run(model_io.load(place / "model.onnx"), pipeline.exact_passes(), None)
    scheme = job.quant_scheme(this)
    found = search(this, model, scheme, Prover(model))
    assert found.calibration.method == found.quantizer.method and found.calibration.degrade == "minimax"
    tried = [step.detail for step in found.steps if step.name == "ranges"]
    assert [set(one.split(" > ")) for one in tried] == ([] if without else [{"minimax", *AUTO_METHODS}])
    assert found.quantizer.method == "minimax" or not without
    assert found.judge.images.transform_name == resolved(place, degrade="mixed").images.transform_name
    assert found.judge.images.transform_name

    clean = resolved(place).images
    tensors = tuple(found.quantizer.ranges)
    seen = cache.collect_cached_together(
        found.quantizer.model, tensors, under(clean, QRID, this.options.seed), histogram=True, threads=1
    )
    for tensor, chosen in found.quantizer.ranges.items():
        by = {k: one.statistics[tensor] for k, one in seen.items()}
        assert chosen == minimax.choose(by, found.quantizer.method)
    assert found.calibration.key == cache.joint_key(seen)


def test_weights_alone_are_calibrated_too(place):
    model, _ = pipeline.run(model_io.load(place / "model.onnx"), pipeline.exact_passes(), None)
    this = resolved(place, degrade="mixed", precision="int4")
    found = search(this, model, job.quant_scheme(this), Prover(model))
    assert [step.name for step in found.steps] == ["rounding"]
    assert found.calibration.method == "weights alone" and found.calibration.degrade.startswith("mixed")
    assert found.calibration.images == len(this.images)


def test_degraded_images_are_rounded_on_in_larger_numbers(place, monkeypatch):
    monkeypatch.setattr(searching, "_EIGHT_BIT_IMAGES", 3)
    monkeypatch.setattr(searching, "_DEGRADED_IMAGES", 5)
    walked = []

    def walk(model, quantize, feeds, **rest):
        walked.append(sum(len(feed["x"]) for feed in feeds))
        return round_weights(model, quantize, feeds, **rest)

    monkeypatch.setattr(searching, "round_weights", walk)
    model, _ = pipeline.run(model_io.load(place / "model.onnx"), pipeline.exact_passes(), None)
    for degrade in ("clean", "mixed", "minimax"):
        this = resolved(place, degrade=degrade)
        search(this, model, job.quant_scheme(this), Prover(model))
    assert walked == [3, 5, 5]


def test_statistics_of_all_conditions_are_what_the_report_looks_at(place):
    this = resolved(place, degrade="minimax")
    model = model_io.load(place / "model.onnx")
    swept = conditions.sweep(
        model, TENSORS, this.images, this.conditions, histogram=True, seed=0, threads=1, progress=silent
    )
    for tensor in TENSORS:
        each = [found[tensor] for found in swept.conditions.values()]
        assert swept.statistics[tensor].min == min(s.min for s in each)
        assert swept.statistics[tensor].max == max(s.max for s in each)


# ------------------------------------------------------------------------------------- refusals


CLASHES = [
    ({"degrade": "mixed", "ranges": Path("r.json"), "calib": None}, "--ranges"),
    ({"robust": True, "ranges": Path("r.json")}, "--ranges"),
    ({"degrade": "mixed", "robust": True}, "--robust --degrade mixed"),
    ({"robust": True, "method": "mse"}, "--method mse"),
    ({"degrade": "minimax", "method": "mse"}, "--method mse"),
    ({"degrade": "mixed", "precision": "fp16"}, "--precision fp16"),
    ({"degrade": "mixed", "calib": None, "precision": "auto"}, "--degrade mixed"),
    ({"robust": True, "calib": None, "precision": "auto"}, "--robust"),
    ({"degrade": "mixed:2"}, "mixed:2"),
]


@pytest.mark.parametrize(("options", "where"), CLASHES, ids=[w for _, w in CLASHES])
def test_what_cannot_be_is_refused(place, options, where):
    with pytest.raises(UserError) as caught:
        resolved(place, **options)
    assert where in caught.value.where and caught.value.fix and caught.value.exit_code == 2


@pytest.mark.parametrize("options", [{"degrade": "mixed"}, {"degrade": "minimax"}, {"robust": True}])
def test_arrays_cannot_be_degraded(place, options):
    (place / "arrays").mkdir()
    np.save(place / "arrays" / "x.npy", np.zeros((40, 3, 12, 12), np.float32))
    with pytest.raises(DataError, match="arrays"):
        resolved(place, calib=place / "arrays", **options)
    assert resolved(place, calib=place / "arrays").images is not None


def test_calibrate_refuses_as_compile_does(place):
    with pytest.raises(UserError, match="minimax"):
        api.calibrate(place / "model.onnx", place / "images", degrade="minimax", method="mse")
    np.save(place / "x.npy", np.zeros((4, 3, 12, 12), np.float32))
    (place / "arrays").mkdir()
    (place / "x.npy").rename(place / "arrays" / "x.npy")
    with pytest.raises(DataError, match="arrays"):
        api.calibrate(place / "model.onnx", place / "arrays", degrade="mixed")


@pytest.mark.parametrize(
    ("degrade", "says"),
    [
        ("mixed:0.875", "87.5 % of the images degraded"),
        ("minimax", "minimax"),
        ("haze", "each image under haze"),
        ("haze,rescale", "each image under one of haze, rescale"),
    ],
)
def test_the_report_says_what_was_calibrated_on(degrade, says):
    from test_report import full

    summary = CalibrationSummary("images", 400, 100, "mse", degrade=degrade)
    lines = dict(facts.of_report(replace(full(), calibration=summary)))
    assert says in lines["calibration"]
