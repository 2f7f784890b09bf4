"""A vision transformer, as both of torch's exporters write it, from the exact passes to eight bits.

The real ones (trained, and ViT-Tiny) are made and measured by benchmarks/models; these are as small as can be.
"""

import numpy as np
import onnx_ir as ir
import pytest
import zoo
from edgec.backends import ort as backend
from edgec.compiler import model as model_io
from edgec.compiler import pipeline
from edgec.compiler.proof import Prover
from edgec.compiler.types import QuantScheme, Range
from edgec.passes.placement import observed_tensors
from edgec.passes.quantize import Quantize
from edgec.passes.smooth import Smooth, smoothed_tensors
from equivalence import session

DIM, HEADS, TOKENS, SIDE, PATCH, BLOCKS = 32, 2, 17, 16, 4, 2
OUTLIERS = (5, 20)
EXPORTERS = ("dynamo", "legacy")


def attention(i, exporter):
    """From the output of the product for q, k and v to the tokens mixed by attention."""
    d = DIM // HEADS
    split = {
        "dynamo": f"""
    qkv4{i} = Reshape <allowzero = 1> (qkv{i}, split_shape)
    qkv5{i} = Transpose <perm = [2, 0, 3, 1, 4]> (qkv4{i})
    q5{i} = Slice (qkv5{i}, at0, at1, at0, at1)
    k5{i} = Slice (qkv5{i}, at1, at2, at0, at1)
    v5{i} = Slice (qkv5{i}, at2, at3, at0, at1)
    q4{i} = Squeeze (q5{i}, at0)
    k4{i} = Squeeze (k5{i}, at0)
    v4{i} = Squeeze (v5{i}, at0)
    k3{i} = Reshape (k4{i}, flat_shape)
    kt3{i} = Transpose <perm = [0, 2, 1]> (k3{i})
    kt{i} = Reshape (kt3{i}, heads_shape)""",
        "legacy": f"""
    qkv4{i} = Reshape (qkv{i}, split_shape)
    qkv5{i} = Transpose <perm = [2, 0, 3, 1, 4]> (qkv4{i})
    q5{i}, k5{i}, v5{i} = Split <axis = 0> (qkv5{i}, ones)
    q4{i} = Squeeze (q5{i}, at0)
    k4{i} = Squeeze (k5{i}, at0)
    v4{i} = Squeeze (v5{i}, at0)
    kt{i} = Transpose <perm = [0, 1, 3, 2]> (k4{i})""",
    }[exporter]
    return f"""{split}
    root{i} = Constant <value = float {{{d**-0.25}}}> ()
    qs{i} = Mul (q4{i}, root{i})
    ks{i} = Mul (kt{i}, root{i})
    [scores{i}] l{i} = MatMul (qs{i}, ks{i})
    p{i} = Softmax <axis = -1> (l{i})
    [mix{i}] o4{i} = MatMul (p{i}, v4{i})
    o3{i} = Transpose <perm = [0, 2, 1, 3]> (o4{i})
    o{i} = Reshape (o3{i}, tokens_shape)"""


def gelu(i, exporter):
    """GELU as an operator, or written out with Erf."""
    if exporter == "dynamo":
        return f"h{i} = Gelu (f{i})"
    return f"""
    e1{i} = Div (f{i}, root_of_2)
    e2{i} = Erf (e1{i})
    e3{i} = Add (e2{i}, one)
    e4{i} = Mul (f{i}, e3{i})
    h{i} = Mul (e4{i}, half)"""


def block(i, exporter):
    """One pre-norm block: x{i} to x{i+1}."""
    return f"""
    n{i} = LayerNormalization <axis = -1, epsilon = 0.000001> (x{i}, g1{i}, b1{i})
    [qkv{i}] m1{i} = MatMul (n{i}, w1{i})
    qkv{i} = Add (m1{i}, c1{i})
    {attention(i, exporter)}
    [proj{i}] m2{i} = MatMul (o{i}, w2{i})
    a2{i} = Add (c2{i}, m2{i})
    r{i} = Add (x{i}, a2{i})
    nn{i} = LayerNormalization <axis = -1, epsilon = 0.000001> (r{i}, g2{i}, b2{i})
    [fc1{i}] m3{i} = MatMul (nn{i}, w3{i})
    f{i} = Add (m3{i}, c3{i})
    {gelu(i, exporter)}
    [fc2{i}] m4{i} = MatMul (h{i}, w4{i})
    a4{i} = Add (m4{i}, c4{i})
    x{i + 1} = Add (r{i}, a4{i})"""


def weights(outlier):
    """Return the blocks' constants: LayerNorm gains with a few outliers, and weights that make up for them."""
    rng, found = np.random.default_rng(3), {}
    for i in range(BLOCKS):
        for norm, reader, outputs in (("1", "w1", 3 * DIM), ("2", "w3", 4 * DIM)):
            g, b = rng.uniform(0.5, 1.5, DIM), rng.normal(0, 0.2, DIM)
            w = rng.normal(0, DIM**-0.5, (DIM, outputs))
            for j in OUTLIERS:
                g[j], b[j], w[j] = g[j] * outlier, b[j] * outlier, w[j] / outlier
            found |= {f"g{norm}{i}": g, f"b{norm}{i}": b, f"{reader}{i}": w}
        found[f"w2{i}"] = rng.normal(0, DIM**-0.5, (DIM, DIM))
        found[f"w4{i}"] = rng.normal(0, (4 * DIM) ** -0.5, (4 * DIM, DIM))
    return found


def vit(exporter="dynamo", outlier=1.0):
    """Return a transformer of two blocks on 16x16 images, 17 tokens of 32 channels, 10 classes."""
    d, shapes = DIM // HEADS, []
    for i in range(BLOCKS):
        for letter in "gb":
            shapes += [f"float[{DIM}] {letter}{k}{i}" for k in "12"]
        for k, (rows, columns) in enumerate(((DIM, 3 * DIM), (DIM, DIM), (DIM, 4 * DIM), (4 * DIM, DIM)), start=1):
            shapes += [f"float[{rows},{columns}] w{k}{i}", f"float[{columns}] c{k}{i}"]
    text = f"""
    g (float[N,3,{SIDE},{SIDE}] image) => (float[N,10] logits)
    <float[{DIM},3,{PATCH},{PATCH}] wp, float[{DIM}] bp, float[1,1,{DIM}] token, float[1,{TOKENS},{DIM}] positions,
     float[{DIM}] g, float[{DIM}] b, float[10,{DIM}] wh, float[10] bh, {", ".join(shapes)}> {{
    at0 = Constant <value_ints = [0]> ()
    at1 = Constant <value_ints = [1]> ()
    at2 = Constant <value_ints = [2]> ()
    at3 = Constant <value_ints = [3]> ()
    ones = Constant <value_ints = [1, 1, 1]> ()
    one = Constant <value = float {{1.0}}> ()
    half = Constant <value = float {{0.5}}> ()
    root_of_2 = Constant <value = float {{{2**0.5}}}> ()
    split_shape = Constant <value_ints = [-1, {TOKENS}, 3, {HEADS}, {d}]> ()
    flat_shape = Constant <value_ints = [-1, {TOKENS}, {d}]> ()
    heads_shape = Constant <value_ints = [-1, {HEADS}, {d}, {TOKENS}]> ()
    tokens_shape = Constant <value_ints = [-1, {TOKENS}, {DIM}]> ()
    patch_shape = Constant <value_ints = [-1, {DIM}, {TOKENS - 1}]> ()
    batch = Shape <start = 0, end = 1> (image)
    token_shape = Concat <axis = 0> (batch, at1, at1)
    [patches] patched = Conv <strides = [{PATCH}, {PATCH}]> (image, wp, bp)
    rows = Reshape (patched, patch_shape)
    columns = Transpose <perm = [0, 2, 1]> (rows)
    tokens = Expand (token, token_shape)
    all = Concat <axis = 1> (tokens, columns)
    x0 = Add (all, positions)
    {"".join(block(i, exporter) for i in range(BLOCKS))}
    n = LayerNormalization <axis = -1> (x{BLOCKS}, g, b)
    zero = Constant <value_int = 0> ()
    first = Gather <axis = 1> (n, zero)
    [head] logits = Gemm <transB = 1> (first, wh, bh)
    }}"""
    return zoo.model(text, weights(outlier), opset=20 if exporter == "dynamo" else 17)


def images(count, seed=0):
    rng = np.random.default_rng(seed)
    return {"image": rng.standard_normal((count, 3, SIDE, SIDE)).astype(np.float32)}


def run(model, feed, tensors=()):
    """Return the outputs, or the named tensors instead, ONNX Runtime's optimisations off."""
    twin = model_io.copy(model)
    if tensors:
        values = {v.name: v for v in twin.graph.inputs} | {v.name: v for n in twin.graph for v in n.outputs}
        twin.graph.outputs.clear()
        twin.graph.outputs.extend(values[name] for name in tensors if name in values and name not in feed)
    opened = session(twin)
    names = [value.name for value in opened.get_outputs()]
    return dict(zip(names, opened.run(None, feed), strict=True)) | {k: v for k, v in feed.items() if k in tensors}


def exact(model, prover=None):
    return pipeline.run(model_io.copy(model), pipeline.exact_passes(13), prover)


def smoothed(model, alpha=None):
    found = run(model, images(32), smoothed_tensors(model))
    maxima = {name: np.abs(y).reshape(-1, y.shape[-1]).max(axis=0) for name, y in found.items()}
    copy = model_io.copy(model)
    return copy, Smooth(maxima, alpha)(copy)


def quantized(model, supports=backend.SUPPORTS):
    """Quantize a copy with the extremes over 32 images as ranges."""
    found = run(model, images(32), observed_tensors(model, supports))
    ranges = {name: Range(float(y.min()), float(y.max())) for name, y in found.items()}
    copy = model_io.copy(model)
    return copy, Quantize(ranges, supports, QuantScheme("uint8-int8", "uint8", symmetric=False))(copy)


def sqnr_db(reference, model):
    want, got = (run(m, images(64, seed=1))["logits"].astype(np.float64) for m in (reference, model))
    return 10 * np.log10((want**2).sum() / ((want - got) ** 2).sum())


@pytest.fixture(params=EXPORTERS)
def exporter(request):
    return request.param


def test_exact_passes_take_both_forms(exporter):
    model = vit(exporter)
    after, records = exact(model, Prover(model))
    proofs = [record.proof for record in records if record.proof]
    assert proofs and all(proof.error is not None and proof.error <= proof.tolerance for proof in proofs)
    ops = [node.op_type for node in after.graph]
    assert "Constant" not in ops and ops.count("LayerNormalization") == 2 * BLOCKS + 1


def test_layers_run_on_integers_and_everything_inside_attention_stays_float(exporter):
    model, _ = exact(vit(exporter))
    after, _ = quantized(model)
    layers = {f"{name}{i}" for name in ("qkv", "proj", "fc1", "fc2") for i in range(BLOCKS)} | {"head", "patches"}
    assert layers <= {node.name for node in after.graph}
    for node in after.graph:
        producers = [value.producer() for value in node.inputs if value is not None]
        reads_integers = any(p is not None and p.op_type == "DequantizeLinear" for p in producers)
        if node.name in layers:
            assert reads_integers, node.name
        elif node.op_type in ("LayerNormalization", "Softmax", "Gelu", "Erf") or node.name[:3] in ("sco", "mix"):
            assert not reads_integers, node.name


def test_smoothing_keeps_the_numbers_and_refuses_what_reads_gelu(exporter):
    model, _ = exact(vit(exporter, outlier=20.0))
    after, result = smoothed(model)
    assert result.modified and result.rewrites <= 2 * BLOCKS + 1
    want, got = (run(m, images(4))["logits"] for m in (model, after))
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()  # gains and weights are rounded once more each
    if exporter == "dynamo":
        assert {r.node for r in result.refusals if "Gelu" in r.why} == {f"fc2{i}" for i in range(BLOCKS)}


def test_outlier_channels_cost_many_decibels_and_smoothing_gets_them_back(exporter):
    plain, _ = exact(vit(exporter, outlier=1.0))
    model, _ = exact(vit(exporter, outlier=20.0))
    good, bad = sqnr_db(plain, quantized(plain)[0]), sqnr_db(model, quantized(model)[0])
    after = sqnr_db(model, quantized(smoothed(model)[0])[0])
    assert good > 25  # eight bits without outliers
    assert after > bad + 10 and after > good - 1, (good, bad, after)


def test_smoothing_costs_nothing_where_there_are_no_outliers():
    model, _ = exact(vit(outlier=1.0))
    # another rounding of the same size: up to 1 dB either way by chance on 64 images of 10 numbers
    assert sqnr_db(model, quantized(smoothed(model)[0])[0]) > sqnr_db(model, quantized(model)[0]) - 1


def test_eight_bits_change_no_answer_that_is_not_close():
    model, _ = exact(vit(outlier=20.0))
    after, _ = quantized(smoothed(model)[0])
    want, got = (run(m, images(64, seed=1))["logits"] for m in (model, after))
    changed = want.argmax(1) != got.argmax(1)
    top = np.sort(want, axis=1)
    assert (top[changed, -1] - top[changed, -2] < 0.1 * np.ptp(want, axis=1)[changed]).all()


def test_weights_are_a_quarter_of_the_size():
    model, _ = exact(vit())
    after, _ = quantized(model)
    floats = [v for v in after.graph.initializers.values() if v.dtype == ir.DataType.FLOAT and len(v.shape) == 2]
    assert all(value.const_value.nbytes < 4096 for value in floats)
