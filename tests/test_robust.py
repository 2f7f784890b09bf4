"""compile --robust: another way than clean calibration is kept where held-out images support it, and never else."""

import dataclasses
import io
import json
import time
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zoo
from edgec.calib.degrade import QRID
from edgec.compiler import api, job, pipeline
from edgec.compiler import model as model_io
from edgec.compiler.fidelity import Comparison
from edgec.compiler.options import STEPS, Options
from edgec.compiler.per_image import PerImage
from edgec.compiler.proof import Prover
from edgec.compiler.quantization import robust
from edgec.compiler.quantization.robust import LEAST_DB, TOLERANCE_DB, WAYS, choose, search_robustly
from edgec.compiler.report import html, robust_tables, serial, terminal
from edgec.compiler.types import silent
from PIL import Image
from rich.console import Console
from test_report import full

IMAGES = 80
RNG = np.random.default_rng(11)

#: Colours, and differences of neighbouring pixels, each averaged over the image and weighed against the other.
NET = """g (float[N,3,12,12] x) => (float[N,4] y)
<float[3,3,1,2] colour, float[6,3,1,2] edges, float[4,3] v, float[4,6] u> {
    c = Conv (x, colour)
    cr = Relu (c)
    cp = GlobalAveragePool (cr)
    cf = Flatten (cp)
    cy = Gemm <transB = 1> (cf, v)
    e = Conv (x, edges)
    er = Relu (e)
    ep = GlobalAveragePool (er)
    ef = Flatten (ep)
    ey = Gemm <transB = 1> (ef, u)
    y = Add (cy, ey)
}"""


def watchful(share: float) -> dict[str, np.ndarray]:
    """Weights of NET: edges, which clean images have little of and noisy ones much, make `share` of the outputs."""
    colour, edges = np.zeros((3, 3, 1, 2)), np.zeros((6, 3, 1, 2))
    for c in range(3):
        colour[c, c, 0] = 0.5
        edges[c, c, 0], edges[3 + c, c, 0] = (10, -10), (-10, 10)
    mix = np.array([[3, 1, 1], [1, 3, 1], [1, 1, 3], [2, 1, 2]]) / 5
    return {"colour": colour, "edges": edges, "v": (1 - share) * mix, "u": share * np.concatenate([mix, mix], axis=1)}


@pytest.fixture(scope="module")
def ramps(tmp_path_factory) -> Path:
    """Smooth images: neighbours differ by a few grey values."""
    folder = tmp_path_factory.mktemp("ramps")
    y, x = np.mgrid[:12, :12]
    for i in range(2 * IMAGES):
        place = folder / ("calib", "eval")[i % 2]
        place.mkdir(exist_ok=True)
        slope, wave, base = RNG.normal(size=(2, 3)), RNG.uniform(1, 3, 3), RNG.uniform(80, 170, 3)
        plane = base + x[..., None] * slope[0] + y[..., None] * slope[1] + wave * np.sin(x / 2 + i)[..., None]
        Image.fromarray(np.clip(np.rint(plane), 0, 255).astype(np.uint8)).save(place / f"{i:03}.png")
    return folder


def kept(ramps: Path, share: float, *, precision: str = "int8", without=STEPS, deadline=None):
    model = zoo.model(NET, watchful(share), opset=21)
    for i, node in enumerate(model.graph):
        node.name = f"{node.op_type}_{i}"
    path = ramps / f"model-{share}.onnx"
    model_io.save(model, path)
    options = Options(
        device="x86-avx512-vnni",
        threads=1,
        calib=ramps / "calib",
        eval=ramps / "eval",
        precision=precision,
        without=without,
        robust=True,
    )
    this = replace(job.resolve(path, model, options, silent), deadline=deadline)
    float_model, _ = pipeline.run(model_io.copy(model), pipeline.exact_passes(), None)
    return search_robustly(this, float_model, job.quant_scheme(this), Prover(model))


# ------------------------------------------------------------------------------------- end to end


def test_it_is_adopted_where_clean_calibration_clips_what_noise_makes(ramps):
    found = kept(ramps, 0.1)
    choice = found.choice
    clean, *others = choice.ways
    assert [way.calibration for way in choice.ways] == list(WAYS) and clean.worst.startswith("noise")
    assert choice.kept in ("mixed", "minimax") and sum(way.kept for way in choice.ways) == 1
    best = next(way for way in others if way.kept)
    assert best.worst_error.verdict == "better" and best.worst_error.high < -10
    assert best.errors["clean"].high <= TOLERANCE_DB
    assert best.sqnr_db[best.worst] == max(way.sqnr_db[way.worst] for way in choice.ways)
    assert found.this.options.degrade == choice.kept and found.this.images.transform_name
    assert choice.kept in choice.why


def test_clean_is_kept_where_another_way_hurts_clean_images(ramps, monkeypatch):
    """Here the edges are all that counts: room for noise costs clean images most of their steps."""
    monkeypatch.setattr(robust, "WAYS", ("clean", "mixed"))
    found = kept(ramps, 1.0)
    clean, *others = found.choice.ways
    assert found.choice.kept == "clean" and clean.kept
    (mixed,) = others
    assert mixed.worst_error.verdict == "better" and mixed.errors["clean"].low > TOLERANCE_DB
    assert mixed.verdict.startswith("clean images may err by") and "mixed: clean images may err by" in found.choice.why
    assert found.this.options.degrade == "clean" and not found.this.images.transform_name


def test_nothing_is_adopted_where_nothing_differs(ramps):
    """Weights alone, not rounded by what the images say: calibration has no say."""
    found = kept(ramps, 0.1, precision="int4")
    assert found.choice.kept == "clean"
    for way in found.choice.ways[1:]:
        assert way.verdict == robust.NO_BENEFIT and way.worst_error.value == 0 == way.worst_error.differing
    assert "no benefit" in found.choice.why


def test_ways_that_the_time_budget_leaves_no_time_for_are_named(ramps):
    found = kept(ramps, 0.1, deadline=time.monotonic())
    assert found.choice.kept == "clean" and found.choice.not_tried == ("mixed", "minimax") and not found.choice.ways
    assert "time budget" in found.choice.why
    (table,) = robust_tables.tables(found.choice)
    assert "mixed, minimax" in table.notes[1]


def test_compile_goes_on_from_what_was_kept(ramps, tmp_path):
    kept(ramps, 0.1)  # writes the model
    said = set()
    report = api.compile(
        ramps / "model-0.1.onnx",
        tmp_path / "out",
        calib=ramps / "calib",
        eval=ramps / "eval",
        precision="int8",
        robust=True,
        without=STEPS,
        threads=1,
        progress=lambda what, done, total: said.add(what.partition(":")[0]),
    )
    assert report.robust.kept in ("mixed", "minimax") and report.calibration.degrade.startswith(report.robust.kept)
    assert {"1/3 clean", "2/3 mixed", "3/3 minimax"} <= said
    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    assert stored["robust"]["kept"] == report.robust.kept
    assert serial.from_json(stored).robust == report.robust
    assert f"{report.robust.kept} calibration was kept" in (tmp_path / "out" / "report.html").read_text()


# ------------------------------------------------------------------------------------- choosing


def comparison(errors: dict[str, np.ndarray], agree: dict[str, np.ndarray] | None = None) -> Comparison:
    """Return what would have been seen of ways with these errors in dB, (conditions, images), and of their answers."""
    conditions = QRID[: len(next(iter(errors.values())))]

    def one(db: np.ndarray, answers: np.ndarray | None) -> PerImage:
        sums = np.ones((len(db), 4))
        sums[:, 1] = 10 ** (db / 10)
        if answers is None:
            return PerImage("energy", {"y": sums})
        return PerImage("agreement", {"y": sums}, {"y": answers})

    seen = {
        condition: {way: one(db[k], None if agree is None else agree[way][k]) for way, db in errors.items()}
        for k, condition in enumerate(conditions)
    }
    exact = np.full(len(next(iter(errors.values()))[0]), -200.0)
    original = {k: one(exact, None if agree is None else np.ones(len(exact), bool)) for k in conditions}
    return Comparison(seen, original)


def errors(*means: float, noise: float = 1.0, seed: int = 0, images: int = 100) -> np.ndarray:
    """Return errors with exactly these means: what differs between ways are their means and, by the seed, images."""
    rng = np.random.default_rng(seed)
    drawn = noise * rng.normal(size=(len(means), images))
    return np.array(means)[:, None] + drawn - drawn.mean(axis=1, keepdims=True)


def test_the_worst_condition_decides_even_where_it_is_another_one():
    ways = {
        "clean": errors(-40, -20, -30),
        "mixed": errors(-40, -29, -28, seed=1),  # its worst is clean calibration's second, and worse there
        "minimax": errors(-40, -26, -35, seed=2),
    }
    choice = choose(comparison(ways), 0)
    assert choice.kept == "mixed"
    clean, mixed, minimax = choice.ways
    assert (clean.worst, mixed.worst) == ("noise-low", "noise-medium")
    assert mixed.worst_error.value == pytest.approx(-8) and mixed.errors["noise-medium"].verdict == "worse"
    assert minimax.verdict == "mixed is better under its worst condition" and not minimax.kept


@pytest.mark.parametrize(
    ("worst", "clean", "noise", "says"),
    [
        (-20.0, -40, 1.0, robust.NO_BENEFIT),
        (-20.5, -40, 8.0, robust.NO_BENEFIT),  # a gain, but within what the images scatter
        (-19.0, -40, 0.5, "worse under its worst condition"),
        (-20.0 - LEAST_DB / 2, -40, 0.1, "better by less than"),
        (-25.0, -40 + TOLERANCE_DB, 1.0, "clean images may err by"),  # no worse than allowed, but not shown to be
        (-25.0, -40 + TOLERANCE_DB / 2, 0.5, None),
    ],
)
def test_a_way_is_admitted_by_evidence_alone(worst, clean, noise, says):
    ways = {"clean": errors(-40, -20, noise=noise), "mixed": errors(clean, worst, noise=noise, seed=1)}
    choice = choose(comparison(ways), 0)
    assert choice.kept == ("mixed" if says is None else "clean")
    assert says is None or choice.ways[1].verdict.startswith(says)
    assert choice.ways[0].kept is (says is not None)


def test_points_that_are_lost_forbid_what_decibels_allow():
    ways = {"clean": errors(-40, -20), "mixed": errors(-40, -25, seed=1)}
    agree = {"clean": np.ones((2, 100), bool), "mixed": np.ones((2, 100), bool)}
    assert choose(comparison(ways, agree), 0).kept == "mixed"
    agree["mixed"][1, :12] = False
    choice = choose(comparison(ways, agree), 0)
    assert choice.kept == "clean" and choice.ways[1].verdict == "loses 12.00 points under noise-low"
    assert choice.ways[1].losses["noise-low"].verdict == "worse"


def test_chance_rarely_passes(monkeypatch):
    """Ways that differ by nothing but noise: 1 choice in 40 is wrong where tests are exact, and clean hurts no one."""
    monkeypatch.setattr(robust, "TOLERANCE_DB", 100.0)
    wrong = 0
    for trial in range(30):
        rng = np.random.default_rng(trial)
        ways = {way: -20 + 2 * rng.normal(size=(2, 60)) for way in WAYS}
        wrong += choose(comparison(ways), trial).kept != "clean"
    assert wrong <= 3


def test_the_same_images_and_seed_give_the_same_choice():
    ways = {"clean": errors(-40, -20), "mixed": errors(-40, -25, seed=1)}
    assert choose(comparison(ways), 3) == choose(comparison(ways), 3)


def test_too_few_images_show_nothing(ramps, monkeypatch):
    monkeypatch.setattr(robust, "LEAST_IMAGES", 1000)
    found = kept(ramps, 0.1)
    assert found.choice.kept == "clean" and "too few" in found.choice.why and not found.choice.ways


# ------------------------------------------------------------------------------------- the report


@pytest.mark.parametrize("labelled", [True, False])
def test_the_three_views_of_a_choice(labelled):
    ways = {"clean": errors(-40, -20), "mixed": errors(-40, -25, seed=1), "minimax": errors(-39, -24, seed=2)}
    agree = {way: np.ones((2, 100), bool) for way in ways} if labelled else None
    choice = replace(choose(comparison(ways, agree), 0), not_tried=("later",))
    report = replace(full(), robust=choice)
    assert serial.from_json(json.loads(json.dumps(serial.to_json(report)))).robust == choice
    for width in (80, 100):
        out = io.StringIO()
        terminal.render(report, Console(file=out, width=width))
        shown = " ".join(out.getvalue().split())
        assert "Robustness: ways of calibrating" in shown and "not tried, for the time budget: later" in shown
        assert "mixed beside clean calibration" in shown and "noise-low" in shown
    page = html.render(report)
    ET.fromstring(page.partition("\n")[2])
    assert page.count("<svg") > html.render(replace(report, robust=None)).count("<svg")
    assert len(dataclasses.fields(choice)) == 5
