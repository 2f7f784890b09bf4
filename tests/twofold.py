"""A small network that half of its channels suffice for, with images, and its compile: for --prune and --low-rank.

The network has every channel twice, so that half of them can go: what is cut is made up for. Nothing is measured but
where a test is about that: the device is another one than this machine.
"""

import numpy as np
import zoo
from edgec.compiler import api
from edgec.compiler import model as model_io
from PIL import Image

ELSEWHERE = "raspberry-pi-5"


def twofold(seed=0):
    """Conv-BN-ReLU twice and a classifier on 3 x 12 x 12; of 16 channels 8 differ, each twice."""
    rng = np.random.default_rng(seed)

    def twice(array, axis=0):
        return np.concatenate([array, array], axis)

    values = {
        "w1": twice(rng.normal(size=(8, 3, 3, 3)) * 0.3),
        "w2": twice(rng.normal(size=(8, 16, 3, 3)) * 0.2),
        "w3": rng.normal(size=(5, 16)) * 2,
        "c3": rng.normal(size=5),
    }
    for i in "12":
        values |= {f"s{i}": twice(rng.uniform(0.5, 1.5, 8)), f"b{i}": twice(rng.normal(size=8) * 0.3)}
        values |= {f"m{i}": twice(rng.normal(size=8) * 0.1), f"var{i}": twice(rng.uniform(0.5, 1.5, 8))}
    declared = "".join(f", float[16] {kind}{i}" for i in "12" for kind in ("s", "b", "m", "var"))
    return zoo.model(
        f"""g (float[N,3,12,12] image) => (float[N,5] logits)
        <float[16,3,3,3] w1, float[16,16,3,3] w2, float[5,16] w3, float[5] c3{declared}> {{
            a = Conv <pads = [1,1,1,1]> (image, w1)
            n = BatchNormalization (a, s1, b1, m1, var1)
            r = Relu (n)
            c = Conv <pads = [1,1,1,1]> (r, w2)
            o = BatchNormalization (c, s2, b2, m2, var2)
            q = Relu (o)
            p = GlobalAveragePool (q)
            f = Flatten (p)
            logits = Gemm <transB = 1> (f, w3, c3)
        }}""",
        values,
        opset=13,
    )


def images(place, count=60, size=12):
    rng = np.random.default_rng(1)
    place.mkdir()
    for i in range(count):
        pixels = rng.integers(0, 256, size=(size // 3, size // 3, 3), dtype=np.uint8).repeat(3, 0).repeat(3, 1)
        Image.fromarray(pixels).save(place / f"{i:02}.png")


def furnished(folder):
    """A folder with model.onnx, its preprocessing, and images/."""
    model_io.save(twofold(), folder / "model.onnx")
    (folder / "model.preprocess.yaml").write_text("size: [12, 12]\nmean: [0.5, 0.5, 0.5]\nstd: [0.25, 0.25, 0.25]\n")
    images(folder / "images")
    return folder


def compiled(place, out, **options):
    given = {"device": ELSEWHERE, "precision": "fp32", "calib": place / "images", "threads": 1, **options}
    return api.compile(place / "model.onnx", out, **given)


def alone(folder, text_form, shape):
    """Write a model and samples for it; nothing of it is an image."""
    model_io.save(zoo.model(text_form), folder / "model.onnx")
    (folder / "samples").mkdir()
    np.save(folder / "samples" / "samples.npy", np.random.default_rng(0).normal(size=shape).astype(np.float32))
    return folder
