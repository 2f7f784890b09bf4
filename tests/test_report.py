"""The three views of a report. `full` is a ResNet-20 on a CPU with VNNI, `minimal` one without images or target."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgec.backends.ort import OperatorTime
from edgec.compiler.errors import UserError
from edgec.compiler.findings import Finding
from edgec.compiler.report import axes, charts, html, serial, terminal, text
from edgec.compiler.report.style import CSS
from edgec.compiler.types import (
    Artifact,
    Attempt,
    Budget,
    CalibrationSummary,
    DeviceProfile,
    Fact,
    Fidelity,
    InputSpec,
    Inspection,
    Layer,
    Measurement,
    OutputFidelity,
    PassRecord,
    Preprocess,
    Proof,
    Range,
    Refusal,
    Report,
    StepRecord,
)
from rich.console import Console

CPU = DeviceProfile(
    name="local",
    title="Intel Xeon Platinum 8481C",
    vendor="Intel",
    kind="cpu",
    arch="x86_64",
    features=("avx2", "avx512f", "avx512_vnni"),
    cores=2,
    is_local=True,
)

#: Own SQNR in dB of the 19 convolutions, in the order of execution; the classifier behind them is in float.
SQNR = (
    39.8, 36.1, 35.2, 36.9, 34.8, 35.9, 33.0, 34.6, 35.4, 33.9,
    34.1, 33.2, 34.4, 31.7, 32.9, 30.8, 31.5, 27.9, 24.6,
)  # fmt: skip


def measured(name: str, median: float, speedup: float | None = None) -> Measurement:
    around = (None, None) if speedup is None else (0.975 * speedup, 1.027 * speedup)
    return Measurement(
        name=name,
        target="local",
        median_ms=median,
        low_ms=0.99 * median,
        high_ms=1.008 * median,
        p90_ms=1.05 * median,
        p99_ms=1.31 * median,
        runs=1200,
        threads=1,
        provider="CPUExecutionProvider",
        speedup=speedup,
        speedup_low=around[0],
        speedup_high=around[1],
    )


def judged(value: float, low: float, high: float, sqnr_db: float) -> Fidelity:
    outputs = (OutputFidelity("logits", sqnr_db, 1 - 10 ** (-sqnr_db / 10) / 2, value),)
    return Fidelity("agreement", 100, 100.0, value, 100 - value, low, high, outputs)


def layers() -> tuple[Layer, ...]:
    found = [
        Layer(
            node="/conv1/Conv" if i == 0 else f"/layer{1 + (i - 1) // 6}/{(i - 1) % 6 // 2}/conv{1 + (i - 1) % 2}/Conv",
            op="Conv",
            precision="uint8 x int8",
            output_range=Range(0.0, 1.9 + 0.31 * i),
            scale=(1.9 + 0.31 * i) / 255,
            sqnr_db=db,
            macs=442_368 if i == 0 else 2_359_296,
        )
        for i, db in enumerate(SQNR)
    ]
    why = "its own SQNR would be 9.4 dB, below 12"
    return (*found, Layer("/linear/Gemm", "Gemm", "float32", macs=640, reason=why))


def full() -> Report:
    int8 = measured("int8", 0.341, 1.85)
    fidelity = judged(98.2, 0.8, 3.1, 28.6)
    baseline = measured("fp32", 0.629)
    exact = Fidelity("agreement", 100, 100.0, 100.0, 0.0, 0.0, 0.0, (OutputFidelity("logits", None, 1.0, 100.0),))
    kept = Refusal("/linear/Gemm", "kept-float", "its own SQNR would be 9.4 dB, below 12")
    idle = tuple(
        Refusal(
            f"/layer{i}/0/Add",
            "no-integer-input",
            "none of its inputs is an integer tensor, so rounding it would only cost",
        )
        for i in (1, 2, 3)
    )
    return Report(
        model="resnet20_cifar10.onnx",
        device=CPU,
        backend="ort",
        target="local",
        precision="int8",
        headline="",
        original=measured("original", 0.641, 0.98),
        baseline=baseline,
        result=int8,
        fidelity=fidelity,
        budget=Budget(max_drop=2.0, drop_stated=True),
        size_before_bytes=1_074_213,
        size_after_bytes=311_402,
        passes=(
            PassRecord("raise-opset", "normalise", True, True, 0.021, 412, 412, 1, proof=Proof(0.0, 1e-4, 2)),
            PassRecord("normalise", "normalise", True, True, 0.184, 412, 90, 322, proof=Proof(2.4e-7, 1e-4, 2)),
            PassRecord("fold-batch-norm", "fold", True, True, 0.047, 90, 71, 19, proof=Proof(8.1e-7, 1e-4, 2)),
            PassRecord("quantize", "quantize", False, True, 0.096, 71, 149, 28, (kept, *idle)),
        ),
        attempts=(
            Attempt("fp32", "fp32", baseline, exact, 1_069_880, False, "the baseline"),
            Attempt("int8", "int8", measured("int8", 0.329, 1.91), judged(96.9, 1.4, 4.9, 26.0), 308_190, False,
                    "loses 3.10 points of agreement, more than 2"),
            Attempt("int8, 1 in float", "int8", int8, fidelity, 311_402, True, "the fastest inside the budget"),
            Attempt("int8, 2 in float", "int8", measured("int8, 2 in float", 0.372, 1.69), judged(98.6, 0.4, 2.6, 29.3),
                    348_900, False, "inside the budget, but slower than the chosen one"),
        ),
        layers=layers(),
        refusals=(kept, *idle),
        calibration=CalibrationSummary(
            "images", 400, 100, "mse", (Refusal("broken.jpg", "unreadable", "truncated after 312 bytes"),), 812.4
        ),
        preprocess=Preprocess(
            (32, 32), "stretch", "rgb", 1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "NCHW",
            ("resize", "color"),
        ),
        warnings=("preprocessing was not stated in full; assumed: resize, color",),
        advice=("judged without labels; --eval DIR with class folders gives top-1",),
        versions={"edgec": "0.1.0", "python": "3.11.9", "onnxruntime": "1.31.1", "onnx": "1.23.2"},
        machine="Intel Xeon Platinum 8481C",
        seconds=21.4,
        seed=0,
    )  # fmt: skip


def minimal() -> Report:
    missing = Measurement("original", "none", None, reason="this machine is not a Raspberry Pi 5")
    return Report(
        model="a.onnx",
        device=DeviceProfile("raspberry-pi-5", "Raspberry Pi 5", "Raspberry Pi", "soc", "aarch64"),
        backend="ort",
        target="none",
        precision="fp32",
        headline="",
        original=missing,
        baseline=dataclasses.replace(missing, name="fp32"),
        result=dataclasses.replace(missing, name="fp32"),
        fidelity=None,
        budget=Budget(),
        size_before_bytes=900,
        size_after_bytes=850,
    )


HOSTILE = "<script>alert('x')</script>&\"\x1b[31m\u202e[red]\n.onnx"


def hostile() -> Report:
    """A model whose names attack the page and the terminal."""
    report = full()
    refusal = Refusal(HOSTILE, HOSTILE, HOSTILE)
    return dataclasses.replace(
        report,
        model=HOSTILE,
        headline=HOSTILE,
        refusals=(refusal,),
        layers=tuple(dataclasses.replace(x, node=HOSTILE, reason=HOSTILE) for x in report.layers),
        passes=(dataclasses.replace(report.passes[0], name=HOSTILE, notes=(HOSTILE,)),),
        attempts=tuple(dataclasses.replace(a, name=HOSTILE, verdict=HOSTILE) for a in report.attempts),
        warnings=(HOSTILE,),
        advice=(HOSTILE,),
        machine=HOSTILE,
        versions={HOSTILE: HOSTILE},
    )


def lines(render: Any, *args: Any, width: int = 80) -> list[str]:
    """What a view prints into a file: plain text, trailing blanks dropped."""
    out = io.StringIO()
    render(*args, Console(file=out, width=width))
    return [line.rstrip() for line in out.getvalue().splitlines()]


def through_json(report: Report) -> Report:
    return serial.from_json(json.loads(json.dumps(serial.to_json(report), allow_nan=False)))


# ------------------------------------------------------------------------------------------ JSON


@pytest.mark.parametrize("make", [full, minimal, hostile])
def test_json_gives_the_same_report_back(make: Any) -> None:
    assert through_json(make()) == make()
    assert serial.to_json(make())["schema"] == 1


def test_not_a_number_never_reaches_json() -> None:
    report = full()
    layer = dataclasses.replace(report.layers[0], sqnr_db=math.inf, output_range=Range(-math.inf, math.nan))
    broken = dataclasses.replace(report, layers=(layer,), result=dataclasses.replace(report.result, median_ms=math.nan))
    back = through_json(broken)  # json.dumps raises ValueError on NaN
    assert back.layers[0].sqnr_db is None
    assert back.result.median_ms is None
    assert back.layers[0].output_range is not None and math.isnan(back.layers[0].output_range.max)


def test_a_missing_measurement_stays_null_with_its_reason() -> None:
    data = serial.to_json(minimal())
    assert data["result"]["median_ms"] is None
    assert data["result"]["reason"] == "this machine is not a Raspberry Pi 5"
    assert data["fidelity"] is None


def test_plain_takes_paths_and_numpy_numbers_but_no_arrays() -> None:
    artifact = Artifact("ort", "int8", Path("out") / "x", "model.onnx", ("a", "b"))
    assert serial.plain(artifact)["folder"] == str(Path("out") / "x")
    assert serial.plain([np.int64(3), np.float32(0.5), np.float64("nan")]) == [3, 0.5, None]
    with pytest.raises(TypeError, match="ndarray"):
        serial.plain({"a": np.zeros(3)})


def damage(path: str, value: Any) -> dict[str, Any]:
    data = serial.to_json(full())
    *folders, last = path.split(".")
    part: Any = data
    for name in folders:
        part = part[int(name)] if name.isdigit() else part[name]
    if value is KeyError:
        del part[last]
    else:
        part[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema", 2, "newer edgec"),
        ("schema", KeyError, "not an edgec report"),
        ("model", KeyError, "report.model: .*missing"),
        ("model", 7, "report.model: .*expected str"),
        ("seed", True, "report.seed: .*expected int"),
        ("seed", "7", "report.seed: .*expected int"),
        ("device.kind", "toaster", "report.device.kind: .*one of cpu, gpu, soc"),
        ("passes.1.proof.tolerance", "x", r"report.passes\[1\].proof.tolerance"),
        ("attempts", {}, "report.attempts: .*a list"),
        ("versions", [], "report.versions: .*an object"),
        ("preprocess.size", [1, 2, 3], "report.preprocess.size: .*2 values"),
        ("result", None, "report.result: .*an object"),
    ],
)
def test_a_damaged_report_is_the_users_fault_and_says_where(path: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        serial.from_json(damage(path, value))
    assert caught.value.exit_code == 2 and caught.value.fix


def test_fields_may_come_and_go_within_a_schema() -> None:
    data = damage("from_the_future", 1)
    del data["warnings"], data["result"]["speedup"]
    report = serial.from_json(data)
    assert report.warnings == () and report.result.speedup is None


@pytest.mark.parametrize("data", [None, [], "x", {}, {"schema": "1"}])
def test_anything_else_is_no_report(data: Any) -> None:
    with pytest.raises(UserError, match="not an edgec report"):
        serial.from_json(data)


# ------------------------------------------------------------------------------------------ headline and numbers


def with_result(report: Report, result: Measurement) -> Report:
    return dataclasses.replace(report, result=result)


def test_headline() -> None:
    assert text.headline(full()) == (
        "INT8 for this CPU: 1.85x faster than FP32 (0.341 ms against 0.629 ms, 95 % interval 1.80-1.90), "
        "top-1 agreement 98.2 %, file 1074 kB -> 311 kB"
    )
    assert text.headline(minimal()) == (
        "FP32 for Raspberry Pi 5: latency not measured (this machine is not a Raspberry Pi 5), file 900 B -> 850 B"
    )


@pytest.mark.parametrize(
    ("result", "claim"),
    [
        (measured("int8", 1.0, 0.629), "1.59x slower than FP32 (1.00 ms against 0.629 ms, 95 % interval 1.55-1.63)"),
        (measured("int8", 0.62, 1.01), "as fast as FP32 (0.620 ms against 0.629 ms, 95 % interval 0.98-1.04)"),
        (measured("int8", 0.34), "1.85x faster than FP32 (0.340 ms against 0.629 ms)"),
        (measured("fp32", 0.629), "0.629 ms a call (original: 0.641 ms)"),
        (Measurement("int8", "local", None, reason="it crashed"), "latency not measured (it crashed)"),
    ],
)
def test_the_headline_claims_what_was_measured(result: Measurement, claim: str) -> None:
    assert text.headline(with_result(full(), result)).startswith(f"INT8 for this CPU: {claim}, top-1")


def test_each_metric_reads_as_what_it_is() -> None:
    agreement = full().fidelity
    assert agreement is not None
    top1 = dataclasses.replace(agreement, metric="top1", reference=81.35, value=81.2)
    energy = dataclasses.replace(agreement, metric="energy", value=99.86, drop=0.14)
    unjudged = dataclasses.replace(agreement, value=None, reason="the model has no float output to compare")
    assert text.quality(top1) == "top-1 81.2 % (original 81.35 %)"
    assert text.quality(energy) == "error energy 0.14 % of the signal's"
    assert text.quality(unjudged) == "quality not judged (the model has no float output to compare)"
    assert text.quality(None) == ""


@pytest.mark.parametrize(
    ("got", "wanted"),
    [
        (text.ms(0.0341), "0.0341 ms"),
        (text.ms(0.3), "0.300 ms"),
        (text.ms(123.4), "123 ms"),
        (text.ms(None), "not measured"),
        (text.size(512), "512 B"),
        (text.size(311_402), "311 kB"),
        (text.size(12_345_678), "12.3 MB"),
        (text.size(24_000_000_000), "24.0 GB"),
        (text.points(1.0), "1 point"),
        (text.points(-0.001), "0 points"),
        (text.percent(81.35), "81.35 %"),
        (text.percent(math.nan), "-"),
        (text.si(2_359_296), "2.36 M"),
        (text.si(640), "640"),
        (text.seconds(0.021), "0.02 s"),
        (text.seconds(200), "3 min 20 s"),
        (text.count(1200, "pass"), "1,200 passes"),
        (text.interval(-0.3, 0.5, 2), "-0.30 to 0.50"),
        (text.clean("a\nb\x1b\u202e"), "a b??"),
    ],
)
def test_numbers_as_people_read_them(got: str, wanted: str) -> None:
    assert got == wanted


# ------------------------------------------------------------------------------------------ terminal


def test_the_report_on_80_columns() -> None:
    printed = lines(terminal.render, full())
    golden = """\
INT8 for this CPU: 1.85x faster than FP32 (0.341 ms against 0.629 ms, 95 %
interval 1.80-1.90), top-1 agreement 98.2 %, file 1074 kB -> 311 kB
warning        preprocessing was not stated in full; assumed: resize, color

Latency of one call, ms
                 median  95 % interval    p90    p99  speed-up  95 % interval
  original        0.641  0.635 - 0.646  0.673  0.840     0.98x    0.96 - 1.01
  FP32 baseline   0.629  0.623 - 0.634  0.660  0.824
  INT8 result     0.341  0.338 - 0.344  0.358  0.447     1.85x    1.80 - 1.90
  on local, CPUExecutionProvider, batch 1, 1 thread, 1200 runs each
  speed-up is against the FP32 baseline, from pairs of runs

Quality on 100 held-out images
                   original %  result %  lost, points  95 % interval
  top-1 agreement      100.00     98.20          1.80    0.80 - 3.10
  within the budget of 2 points, as stated

Outputs against the original's
  output  SQNR dB   cosine  top-1 agreement %
  logits     28.6  0.99931              98.20

Candidates
     candidate         median ms  lost, points     size  verdict
     fp32                  0.629          0.00  1070 kB  the baseline
     int8                  0.329          3.10   308 kB  loses 3.10 points of
                                                         agreement, more than 2
  *  int8, 1 in float      0.341          1.80   311 kB  the fastest inside the
                                                         budget
"""
    assert printed[: golden.count("\n")] == golden.splitlines()
    assert "  fold-batch-norm  exact        19        0   90 -> 71  0.05 s      8.1e-07" in printed
    assert "  quantize         lossy        28        4  71 -> 149  0.10 s            -" in printed
    assert "      3  no-integer-input  /layer1/0/Add  none of its inputs is an integer" in printed
    assert "                           and 1 more" in printed
    assert "  all of them: edgec inspect --why" in printed
    assert printed[-1] == "advice         judged without labels; --eval DIR with class folders gives top-1"


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("make", [full, minimal, hostile, lambda: explained()])
def test_plain_output_fits_and_has_no_colour_codes(make: Any, width: int) -> None:
    printed = lines(terminal.render, make(), width=width)
    assert max(map(len, printed)) <= width
    assert all(line.isascii() and line.isprintable() for line in printed)


def test_names_are_not_read_as_markup() -> None:
    assert any("[red]" in line for line in lines(terminal.render_why, hostile(), width=200))


def test_a_missing_measurement_gives_its_reason() -> None:
    printed = lines(terminal.render, minimal())
    assert "  original, FP32 result: not measured, this machine is not a Raspberry Pi 5" in printed
    assert "  not judged: there were no images to compare on" in printed
    partly = with_result(full(), Measurement("int8", "local", None, reason="it crashed"))
    printed = lines(terminal.render, partly)
    assert any(re.match(" +INT8 result +not measured$", line) for line in printed)
    assert "  INT8 result: not measured, it crashed" in printed


def test_a_result_that_is_the_baseline_is_shown_once() -> None:
    report = dataclasses.replace(full(), precision="fp32", result=full().baseline)
    printed = lines(terminal.render, report)
    assert not any(line.startswith("  FP32 baseline") for line in printed)
    assert any(line.startswith("  FP32 result") for line in printed)


def test_a_budget_that_is_broken_is_said() -> None:
    report = dataclasses.replace(full(), budget=Budget(max_drop=1.0, max_latency_ms=0.3))
    printed = lines(terminal.render, report)
    assert "  over the budget of 1 point, the default" in printed
    assert "  over the budget of 0.300 ms, as stated" in printed


def test_a_failed_proof_and_a_skipped_one() -> None:
    failed = PassRecord("normalise", "normalise", True, False, 0.1, 5, 5, proof=Proof(math.inf, 1e-4, 2, "no such op"))
    skipped = PassRecord("fold-batch-norm", "fold", True, True, 0.1, 5, 4, 1, proof=Proof(None, 1e-4, 0, "over 1 GB"))
    idle = PassRecord("raise-opset", "normalise", True, False, 0.1, 5, 5)
    printed = "\n".join(lines(terminal.render, dataclasses.replace(minimal(), passes=(failed, skipped, idle))))
    assert re.search("normalise .* failed$", printed, re.M)
    assert re.search("fold-batch-norm .* not proven$", printed, re.M)
    assert re.search("raise-opset .* unchanged$", printed, re.M)
    assert "fold-batch-norm: no proof, over 1 GB" in printed


def test_why_names_every_node() -> None:
    printed = "\n".join(lines(terminal.render_why, full()))
    assert all(f"/layer{i}/0/Add" in printed for i in (1, 2, 3)) and "more" not in printed


def test_layers() -> None:
    printed = lines(terminal.render_layers, full())
    assert printed[0] == "Layers: 19 of 20 on integers, over 99.9 % of the multiply-accumulates"
    assert printed[3] == "  /conv1/Conv           Conv  uint8 x int8   0 .. 1.9  0.00745     39.8   442 k"
    assert printed[-1] == "  /linear/Gemm: its own SQNR would be 9.4 dB, below 12"


def explained() -> Report:
    """The full report, each layer explained, with a join and the input, steps and forecasts."""
    found = [
        dataclasses.replace(
            x, clipped_percent=0.004 * i, sqnr_in_db=40.0 - i, sqnr_out_db=39.0 - i, share_percent=float(i),
            weights_percent=i / 2, cause="clipping in its output: 0.1 % of the elements", remedy=f"remedy {i}",
        )
        for i, x in enumerate(layers()[:-1])
    ]  # fmt: skip
    image = Layer("image", "input", "uint8", Range(-2.1, 2.6), 0.0187, macs=0, share_percent=20.0, weights_percent=0.0,
                  cause="plain rounding of its input")  # fmt: skip
    join = Layer(
        "/layer1/0/Add", "Add", "uint8", Range(0, 5.4), 0.0212, 39.9, macs=0, sqnr_in_db=35.0, sqnr_out_db=35.0
    )
    steps = (
        StepRecord("equalize", True, 28.4, 29.0, 2.69, "400 channel variables, strength 0.75"),
        StepRecord("rounding", False, 29.0, 28.7, 71.0, "20 layers"),
        StepRecord("mixed-precision", True, None, None, 17.7, "4 assignments"),
    )
    attempts = (
        full().attempts[0],
        dataclasses.replace(full().attempts[1], predicted_ms=0.35, predicted_db=27.0, calibration_db=26.2),
        *full().attempts[2:],
    )
    return dataclasses.replace(
        full(), layers=(image, *found[:3], join, *found[3:], layers()[-1]), steps=steps, attempts=attempts
    )


def test_layers_that_were_explained_fit_100_columns() -> None:
    printed = lines(terminal.render_layers, explained(), width=100)
    golden = """\
Layers: 19 of 20 on integers, over 99.9 % of the multiply-accumulates
                                                     clipped   SQNR    SQNR      own  share of
  node                   op     precision      scale       %  in dB  out dB  SQNR dB   error %    MACs
  image                  input  uint8         0.0187       -      -       -        -      20.0       -
  /conv1/Conv            Conv   uint8 x int8 0.00745   0.000   40.0    39.0     39.8       0.0   442 k
"""
    assert max(map(len, printed)) <= 100
    assert printed[0] == golden.splitlines()[0]
    heads = (" ".join(printed[1].split()), " ".join(printed[2].split()))
    assert heads == ("clipped SQNR SQNR own share of", "node op precision scale % in dB out dB SQNR dB error % MACs")
    assert printed[3].split() == ["image", "input", "uint8", "0.0187", "-", "-", "-", "-", "20.0", "-"]
    assert printed[4].split()[-7:] == ["0.000", "40.0", "39.0", "39.8", "0.0", "442", "k"]
    assert any(line.startswith("  own SQNR: only that layer") for line in printed)


def test_where_the_error_comes_from() -> None:
    printed = lines(terminal.render, explained(), width=100)
    start = printed.index("Where the error comes from")
    assert [line.split()[0] for line in printed[start + 3 : start + 13] if line[2] != " "][:5] == [
        "image", "/layer3/2/conv2/Conv", "/layer3/2/conv1/Conv", "/layer3/1/conv2/Conv", "/layer3/1/conv1/Conv",
    ]  # fmt: skip
    said = " ".join(printed[start : start + 25])
    assert "these 5 make 86 % of it" in said and "plain rounding: no outlier" in said and "remedy 18" in said
    assert not any("Where the error" in line for line in lines(terminal.render, full()))


def test_advice_that_holds_for_all_is_said_once() -> None:
    same = tuple(dataclasses.replace(x, remedy="more bits" if x.share_percent else None) for x in explained().layers)
    printed = lines(terminal.render, dataclasses.replace(explained(), layers=same), width=100)
    assert sum("more bits" in line for line in printed) == 1
    assert not any("done, or to do" in line for line in printed)


def test_a_result_in_float_says_where_the_error_would_have_come_from() -> None:
    floats = tuple(dataclasses.replace(x, precision="float32") for x in explained().layers)
    printed = lines(terminal.render, dataclasses.replace(explained(), layers=floats), width=100)
    assert "Where the error of what was tried would come from" in printed


def test_steps_say_what_they_gained_and_what_was_taken_back() -> None:
    printed = lines(terminal.render, explained(), width=100)
    start = printed.index("Steps to few bits")
    said = {line.split()[0]: line.split() for line in printed[start + 2 : start + 7]}
    assert said["equalize"][-6:] == ["28.4", "29.0", "+0.6", "2.69", "s", "kept"]
    assert said["rounding"][-6:] == ["28.7", "-0.3", "71.0", "s", "taken", "back"]
    assert said["mixed-precision"][-6:] == ["-", "-", "-", "17.7", "s", "kept"]
    assert through_json(explained()) == explained()


def test_predicted_and_measured_never_share_a_column() -> None:
    printed = lines(terminal.render, explained(), width=100)
    start = printed.index("Predicted and measured")
    assert printed[start + 2].split() == ["int8", "0.350", "0.329", "+6", "27.0", "26.2", "+0.8"]
    assert not any("Predicted" in line for line in lines(terminal.render, full()))


@pytest.mark.parametrize(
    ("precision", "title"),
    [
        ("float8e4m3fn x float8e4m3fn", "Layers: 19 of 20 in 8-bit floats"),
        ("weights int4", "Layers: 19 of 20 with weights of few bits"),
        ("uint8 x int4", "Layers: 19 of 20 on integers"),
        ("float16", "Layers: 0 of 20 on integers"),
    ],
)
def test_each_format_is_called_what_it_is(precision: str, title: str) -> None:
    found = tuple(dataclasses.replace(x, precision=precision) for x in layers()[:-1])
    report = dataclasses.replace(full(), layers=(*found, layers()[-1]))
    printed = lines(terminal.render_layers, report)
    assert printed[0].startswith(title)
    assert serial.summary(report)["integer_layers"] == (0 if precision == "float16" else 19)
    assert text.headline(dataclasses.replace(full(), precision="w4a8")).startswith("W4A8 for this CPU")


def test_bench_compares_with_the_last() -> None:
    found = [measured("a.onnx", 0.2), dataclasses.replace(measured("b.onnx", 0.4), threads=2)]
    printed = lines(terminal.render_measurements, found)
    assert re.match(r"  a.onnx +0.200 .* 2.00x +1$", printed[2])
    assert printed[-1] == "  speed-up is against b.onnx"
    alone = lines(terminal.render_measurements, [measured("a.onnx", 0.2)])
    assert not any("speed-up" in line for line in alone)


def test_the_other_views() -> None:
    jetson = DeviceProfile(
        name="a-board", title="A Board", vendor="nvidia", kind="soc", arch="aarch64", backends=("tensorrt", "ort"),
        memory_gib=Fact(8, "data sheet"), peak_gflops={"int8": Fact(20480.0, None, unverified=True)},
    )  # fmt: skip
    assert any("8 GiB  tensorrt" in line for line in lines(terminal.render_devices, [jetson]))
    shown = "\n".join(lines(terminal.render_device, jetson))
    assert re.search(r"memory +8 +GiB +data sheet", shown)
    assert re.search(r"peak int8 +20,480 +GFLOP/s +unverified", shown)
    findings = [Finding("tvm", "missing", "not installed", "pip install it"), Finding("python", "ok", "3.11")]
    assert "fix: pip install it" in "\n".join(lines(terminal.render_findings, findings))
    operators = lines(terminal.render_operators, [OperatorTime("QLinearConv", 19, 0.251, 0.81)])
    assert any(re.match(r"  QLinearConv +19 +0.251 +81.0", line) for line in operators)
    assert any(line.startswith("  top-1 agreement") for line in lines(terminal.render_fidelity, full().fidelity))


def test_inspection_and_comparison() -> None:
    inputs = (InputSpec("x", "float32", (None, 3)),)
    found = Inspection("m.onnx", 1_234_567, 8, 17, inputs, ("y",), {"Conv": 2}, 270_000, None, layers())
    printed = lines(terminal.render_inspection, found)
    assert "inputs         x float32 [?, 3]" in printed
    both = lines(terminal.render_comparison, [serial.summary(full()), serial.summary(found)])
    assert any(re.match(r"  file size +311 kB +1235 kB", line) for line in both)
    assert any(re.match(r"  median latency +0.341 ms +-", line) for line in both)


# ------------------------------------------------------------------------------------------ HTML


@pytest.mark.parametrize("make", [full, minimal, hostile])
def test_the_page_is_well_formed_and_stands_alone(make: Any) -> None:
    page = html.render(make())
    root = ET.fromstring(page)  # XML, so every tag is closed and every & is escaped
    for svg in root.iter("svg"):
        assert svg.get("aria-hidden") == "true" or (svg.get("role") == "img" and svg[0].tag == "title" and svg[0].text)
    assert not {e.tag for e in root.iter()} & {"script", "link", "img", "iframe", "object"}
    assert not any(name in {"src", "href", "onload"} for e in root.iter() for name in e.attrib)
    assert "http:" not in page and "https:" not in page and "@import" not in page
    assert set(re.findall(r"url\((.*?)\)", page)) <= {"#hatch"}
    assert "nan%" not in page and "inf%" not in page


def test_the_page_escapes_names() -> None:
    page = html.render(hostile())
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "\x1b" not in page and "\u202e" not in page


def words(page: str) -> str:
    """The text of the page, every run of blanks a single one."""
    return " ".join(" ".join(ET.fromstring(page).find("body").itertext()).split())  # type: ignore[union-attr]


def test_the_page_says_what_the_terminal_says() -> None:
    said = words(html.render(full()))
    for wanted in (
        "1.85\u00d7 faster than FP32",
        "95 % interval 1.80\u20131.90",
        "1074 kB \u2192 311 kB",
    ):
        assert wanted in said
    for wanted in ("/layer3/0/Add", "its own SQNR would be 9.4 dB, below 12", "broken.jpg", "onnxruntime 1.31.1"):
        assert wanted in said
    assert "not measured" in words(html.render(minimal()))
    assert "this machine is not a Raspberry Pi 5" in words(html.render(minimal()))


@pytest.mark.parametrize(
    ("headline", "claim", "rest"),
    [
        ("INT8 for Thor (T5000): 2x faster (a, b (c), d), top-1 98 %", "INT8 for Thor (T5000): 2x faster",
         "a, b (c), d; top-1 98 %"),
        ("FP32 for this CPU: 1 ms a call, file 2 kB", "FP32 for this CPU: 1 ms a call", "file 2 kB"),
        ("Done", "Done", ""),
        ("a: b (c", "a: b", "c"),
    ],
)  # fmt: skip
def test_the_headline_is_parted_after_its_claim(headline: str, claim: str, rest: str) -> None:
    assert html._split(headline) == (claim, rest)


def test_the_page_says_the_reason_of_one_missing_measurement() -> None:
    said = words(html.render(with_result(full(), Measurement("int8", "local", None, reason="it crashed"))))
    assert "INT8 result: not measured, it crashed" in said


def test_charts_show_what_there_is() -> None:
    root = ET.fromstring(html.render(full()))
    kinds = [e.get("class") for e in root.iter("rect")]
    assert kinds.count("hollow") == 1  # the Gemm in float
    assert kinds.count("bar") + kinds.count("bar strong") == 19 + 3 + 2  # layers, latencies, sizes
    assert [e.get("class") for e in root.iter("circle")] == ["dot", "dot", "dot strong", "dot"]
    assert sum(e.get("class") == "whisker" for e in root.iter("line")) == 3 * 3
    alone = dataclasses.replace(full(), attempts=full().attempts[:1])
    assert "<circle" not in html.render(alone)


def test_the_frontier_joins_what_no_other_beats() -> None:
    points = [charts.Point("a", "", 1.0, 3.0), charts.Point("b", "", 2.0, 1.0), charts.Point("c", "", 3.0, 1.5)]
    assert [p.label for p in charts.best([*points, charts.Point("d", "", 4.0, 0.0)])] == ["a", "b", "d"]
    drawn = charts.scatter("t", points, right=None, limit=None)
    assert drawn.count('class="frontier"') == 1
    assert "frontier" not in charts.scatter("t", points[:2], right=None, limit=None)


def test_the_page_explains_too() -> None:
    page = html.render(explained())
    said = words(page)
    for wanted in ("Steps to few bits", "Where the error comes from", "Predicted and measured", "taken back", "86 %"):
        assert wanted in said
    ET.fromstring(page)
    assert "Where the error" not in words(html.render(full()))


def test_points_that_share_a_place_share_a_label() -> None:
    points = [charts.Point(str(i), "", 1.0 + 0.001 * i, 1.0) for i in range(3)] + [charts.Point("far", "", 2.0, 0.0)]
    drawn = ET.fromstring(f"<x>{charts.scatter('t', points, right=None, limit=None)}</x>")
    labels = [e.text for e in drawn.iter("text") if e.get("class") == "label"]
    assert labels == ["0, 1, 2", "far"]


@pytest.mark.parametrize("low_high", [(0.0, 0.0), (0.3, 0.3), (0.31, 0.34), (0.0, 41.0), (-3.0, 0.1), (5e-4, 2e3)])
def test_ticks_are_round_and_enclose(low_high: tuple[float, float]) -> None:
    ticks = axes.ticks(*low_high)
    assert ticks[0] <= low_high[0] + 1e-9 and ticks[-1] >= low_high[1] - 1e-9 and 2 <= len(ticks) <= 7
    assert np.ptp(np.diff(ticks)) <= 1e-9 * abs(ticks[-1] - ticks[0])


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_has_contrast_in_both_palettes() -> None:
    palettes = [dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in CSS.split("@media screen")[:2]]
    pairs = [("ink", "paper"), ("muted", "paper"), ("accent", "paper"), ("ink", "warn-tint"), ("warn", "warn-tint"),
             ("ink", "accent-tint"), ("accent", "accent-tint")]  # fmt: skip
    for palette in palettes:
        for ink, paper in pairs:
            light, dark = sorted((luminance(palette[ink]), luminance(palette[paper])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, paper)  # WCAG 2.1, level AA for body text


def test_the_page_needs_neither_rich_nor_onnx() -> None:
    code = "import sys, edgec.compiler.report.html, edgec.compiler.report.serial\n"
    code += "sys.exit(bool({'rich', 'onnx', 'onnx_ir', 'onnxruntime', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
