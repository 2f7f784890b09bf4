"""The three views of a report. `full` is a ResNet-20 on a CPU with VNNI, `minimal` one without images or target."""

from __future__ import annotations

import dataclasses
from typing import Any

from edgec.compiler.types import (
    Attempt,
    Budget,
    CalibrationSummary,
    DeviceProfile,
    Fidelity,
    Layer,
    Measurement,
    OutputFidelity,
    PassRecord,
    Preprocess,
    Proof,
    Range,
    Refusal,
    Report,
)

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
        Refusal(f"/layer{i}/0/Add", "no-integer-input", "none of its inputs is an integer tensor, so rounding it would only cost")
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
            Attempt("int8, 2 in float", "int8", measured("int8, 2 in float", 0.372, 1.69), judged(98.6, 0.4, 2.6, 29.3), 348_900,
                    False, "inside the budget, but slower than the chosen one"),
        ),
        layers=layers(),
        refusals=(kept, *idle),
        calibration=CalibrationSummary(
            "images", 400, 100, "mse", (Refusal("broken.jpg", "unreadable", "truncated after 312 bytes"),), 812.4
        ),
        preprocess=Preprocess(
            (32, 32), "stretch", "rgb", 1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "NCHW", ("resize", "color")
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


def lines(render: Any, *args: Any, width: int = 80) -> list[str]:
    """What a view prints into a file: plain text, trailing blanks dropped."""
    import io

    from rich.console import Console

    out = io.StringIO()
    render(*args, Console(file=out, width=width))
    return [line.rstrip() for line in out.getvalue().splitlines()]
