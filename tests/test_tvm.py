"""The TVM backend: what it refuses, and, where apache-tvm is installed, what it builds beside ONNX Runtime.

test_tvm_layers.py has the layers and operators one by one.
"""

import json
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import onnxruntime as ort
import pytest
import zoo
from edgec.backends import base
from edgec.backends.tvm import Tvm, support
from edgec.compiler import api, devices
from edgec.compiler import model as model_io
from edgec.compiler.errors import UnavailableError, UserError

installed = pytest.mark.skipif(Tvm().unavailable() is not None, reason='needs pip install "edgec[tvm]"')
LOCAL = devices.find("local")
NET = """g (float[N,3,8,8] x) => (float[N,5] y) <float[8,3,3,3] w, float[8] b, float[5,8] v> {
    c = Conv <pads = [1,1,1,1]> (x, w, b)
    r = Relu (c)
    p = GlobalAveragePool (r)
    f = Flatten (p)
    y = Gemm <transB = 1> (f, v)
}"""


def written(folder, text=NET, name="model.onnx"):
    folder.mkdir(exist_ok=True)
    model_io.save(zoo.model(text), folder / name)
    return folder / name


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# ------------------------------------------------------------------------------------------- without TVM


def test_what_the_importer_lacks_is_refused_by_name(tmp_path):
    model = zoo.model("g (float[2,4] x) => (float[2,4] y) { h = Relu (x)\n y = Bernoulli (h) }")
    found = tuple(support.refusals(model))
    assert [r.why for r in found] == ["TVM's importer has no Bernoulli"] and found[0].rule == "tvm"
    path = tmp_path / "model.onnx"
    model_io.save(model, path)
    with pytest.raises(UserError, match="not installed|no Bernoulli"):
        api.compile(path, tmp_path / "out", backend="tvm", precision="fp32")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("node", "why"),
    [
        ("y = LSTM <hidden_size = 4> (x, x, x)", "no LSTM"),
        ("y = Attention (x, x, x)", "com.microsoft's Attention alone"),
        ("y = Resize <antialias = 1, mode = \"linear\"> (x, , s)", "no Resize with antialias 1"),
        ("y = Resize <mode = \"linear\"> (x, , s)", "whole sizes alone"),
        ("y, i = MaxPool <kernel_shape = [2,2]> (x)\n z = Cast <to = 1> (i)", "first output alone"),
        ("y = IsInf <detect_negative = 0> (x)", "no IsInf with detect_negative 0"),
        ("y = Mod (x, x)", "Mod of floats is fmod"),
        ("q = Cast <to = 22> (x)\n y = Cast <to = 1> (q)", "no arithmetic for int4"),
    ],
)  # fmt: skip
def test_what_the_importer_gets_wrong_is_refused_with_its_reason(node, why):
    text = f"g (float[1,4,5,5] x) => (float[a,b,c,d] y) <float[4] s = {{1.0, 1.0, 1.5, 1.5}}> {{ {node} }}"
    model = zoo.model(text, opset=23)
    for found in model.graph:
        if found.op_type == "Cast" and found.outputs[0].name == "q":
            found.outputs[0].dtype = model_io.ir.DataType.INT4
    assert any(why in refusal.why for refusal in support.refusals(model))


def test_what_is_rewritten_is_not_refused():
    model = zoo.model("g (float[1,2,4,4] x) => (float[1,2,4,4] y) { y = Max (x, x) }")
    assert not list(support.refusals(model))
    assert not support.ADDED & support.OPERATORS


def test_integers_are_had_on_cpus_and_nothing_narrower():
    schemes = base.load("tvm").schemes(devices.find("raspberry-pi-5"))
    assert set(schemes) == set(base.SCHEMED) and schemes["int8"].activation == "uint8"
    assert "not fp8" in schemes["fp8"] and "CUDA" in base.load("tvm").schemes(devices.find("rtx-4090"))["int8"]


@pytest.mark.skipif(find_spec("tvm") is not None, reason="TVM is installed here")
def test_without_tvm_it_says_how_to_get_it(tmp_path):
    with pytest.raises(UnavailableError, match="TVM is not installed") as caught:
        api.compile(written(tmp_path), tmp_path / "out", backend="tvm")
    assert "edgec[tvm]" in caught.value.fix


def test_nothing_of_tvm_is_imported_before_it_is_asked_for():
    code = (
        "import sys; from edgec.backends import base; base.load('tvm').unavailable(); assert 'tvm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------------------- with TVM


@installed
def test_the_table_is_that_of_the_installed_version():
    from tvm.relax.frontend.onnx import onnx_frontend

    assert set(onnx_frontend._get_convert_map()) == support.OPERATORS


@installed
def test_a_bundle_gives_what_onnx_runtime_gives_and_takes_any_batch(tmp_path):
    path = written(tmp_path)
    report = api.compile(path, tmp_path / "out", backend="tvm", precision="fp32", tune=2, threads=1)
    assert report.backend == "tvm" and report.result.provider == "TVM, llvm" and report.original.provider != "TVM, llvm"
    assert (tmp_path / "out" / "model.so").is_file() and not list(tmp_path.glob("*.so"))
    x = np.random.default_rng(0).normal(size=(3, 3, 8, 8)).astype(np.float32)
    (found,) = api.open_bundle(tmp_path / "out").run({"x": x}).values()
    expected = ort.InferenceSession(path).run(None, {"x": x})[0]
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@installed
def test_the_bundle_says_what_the_module_is_made_of(tmp_path):
    path = written(tmp_path)
    api.compile(path, tmp_path / "out", backend="tvm", precision="fp32", tune=2, threads=1)
    facts = json.loads((tmp_path / "out" / "model.so.json").read_text())
    assert facts["schedules tried"] > 0 and "llvm" in facts["target"]
    tuned = [f for f in facts["functions"].values() if f["space"] == "contraction"]
    assert tuned and all(f["us"] > 0 and f["schedule"]["wide"] > 0 for f in tuned)
    assert {node for _, node in facts["calls"] if node} == {n.name or n.outputs[0].name for n in model_io.load(
        tmp_path / "out" / "model.onnx").graph if n.op_type in ("Conv", "Gemm")}  # fmt: skip


@installed
def test_calls_are_timed_and_joined_to_onnx_nodes(tmp_path):
    api.compile(written(tmp_path), tmp_path / "out", backend="tvm", precision="fp32", tune=0, threads=1)
    runner = api.open_bundle(tmp_path / "out", threads=1).runner
    feed = model_io.sample_inputs(runner.inputs, 0)
    rows = runner.profile(feed, runs=5)
    assert [node for _, node, _ in rows if node] == ["node_Conv", "node_Gemm"] and all(ms > 0 for _, _, ms in rows)
    assert {name for name, _, _ in rows} <= {name for name, _ in runner.calls}
    assert runner.run(feed)  # it runs as before


def prepared(path, threads=1):
    from edgec.backends.tvm import network, targets

    return network.prepared(path, model_io.input_specs(model_io.load(path)), targets.target_of(LOCAL, threads))


class Stopwatch:
    """A clock that needs no machine: the seconds are those of a table by order of asking, or always the same."""

    def __init__(self, seconds=1e-3, broken=(), interrupt=None):
        self.asked, self.constant, self.broken, self.interrupt = 0, seconds, set(broken), interrupt

    def seconds(self, body, repeats=5, *, safe=True):
        self.asked += 1
        if self.asked == self.interrupt:
            raise KeyboardInterrupt
        return None if self.asked in self.broken else self.constant


@installed
def test_a_second_compile_has_the_records_of_the_first_and_tries_nothing(tmp_path):
    from edgec.backends.tvm import records, tuning

    net = prepared(written(tmp_path))
    first = tuning.tune(net, records.Records(net.target), Stopwatch(), 60.0)
    again = tuning.tune(net, records.Records(net.target), Stopwatch(), 60.0)
    assert first.trials > 0 and again.trials == 0 and again.choices == first.choices


@installed
def test_another_network_with_the_same_layers_has_their_records(tmp_path):
    """Weights are no part of the key."""
    from edgec.backends.tvm import records, tuning

    paths = [written(tmp_path / "one"), written(tmp_path / "two")]
    other = model_io.load(paths[1])
    weight = next(v for v in other.graph.initializers.values() if v.name == "w")
    weight.const_value = model_io.ir.tensor(weight.const_value.numpy() * 2, name="w")
    model_io.save(other, paths[1])
    one, two = prepared(paths[0]), prepared(paths[1])
    tuning.tune(one, records.Records(one.target), Stopwatch(), 60.0)
    assert tuning.tune(two, records.Records(two.target), Stopwatch(), 60.0).trials == 0


@installed
def test_a_similar_layer_begins_with_what_was_best(tmp_path):
    from edgec.backends.tvm import records, tuning

    one, two = (
        prepared(written(tmp_path)),
        prepared(written(tmp_path / "b", NET.replace("[8,3,3,3]", "[8,3,5,5]").replace("[1,1,1,1]", "[2,2,2,2]"))),
    )
    conv = next(f for f in one.functions if f.space.name == "contraction" and f.space.taps == 9)
    last = conv.space.choices()[-1]
    kept = records.Records(one.target)
    kept.put(conv, records.Record(last, 1e-6, 9))
    other = next(f for f in two.functions if f.space.name == "contraction" and f.space.taps == 25)
    assert next(iter(tuning._candidates(tuning.Task(other), kept))) == last


@installed
def test_ctrl_c_keeps_what_was_found(tmp_path):
    from edgec.backends.tvm import records, tuning

    net = prepared(written(tmp_path))
    found = tuning.tune(net, records.Records(net.target), Stopwatch(interrupt=9), 60.0)
    assert found.interrupted and found.trials == 8 and found.choices
    assert records.Records(net.target).get(next(f for f in net.functions if f.name in found.choices)) is not None


@installed
def test_after_ctrl_c_a_compile_tunes_no_more(tmp_path, monkeypatch):
    from edgec.backends.base import Lowering
    from edgec.backends.tvm import tuning

    asked, real = [], tuning.tune

    def interrupted(net, records, clock, seconds, **rest):
        asked.append(seconds)
        found = real(net, records, clock, 0.0, **rest)
        found.interrupted = True
        return found

    monkeypatch.setattr(tuning, "tune", interrupted)
    backend = Tvm().prepared(Lowering(tune=9.0, threads=1))
    for name in ("one", "two"):
        text = NET.replace("pads = [1,1,1,1]", "pads = [0,1,0,1]") if name == "two" else NET
        backend.lower(written(tmp_path / name, text), LOCAL, "fp32")
    assert asked == [9.0, 0.0]


@installed
def test_schedules_that_do_not_run_are_passed_over(tmp_path):
    from edgec.backends.tvm import records, tuning

    net = prepared(written(tmp_path))
    found = tuning.tune(net, records.Records(net.target), Stopwatch(broken=(1, 2)), 60.0)
    assert found.failed == 2 and set(found.choices) == {f.name for f in net.functions if f.space is not None}


@installed
@pytest.mark.parametrize(("option", "given"), [("prune", "latency:20%"), ("low_rank", "latency:20%")])
def test_layers_are_not_timed_here(tmp_path, option, given):
    with pytest.raises(UserError, match="ONNX Runtime's profiler only"):
        api.compile(written(tmp_path), tmp_path / "out", backend="tvm", calib=tmp_path, **{option: given})


@installed
def test_left_to_auto_both_backends_are_measured_and_the_report_says_so(tmp_path):
    report = api.compile(written(tmp_path), tmp_path / "out", precision="fp32", tune=0, threads=1)
    (row,) = [a for a in report.attempts if a.name == "fp32 on tvm"]
    assert row.measurement.median_ms > 0 and "on ort" in row.verdict
    assert row.chosen == (report.backend == "tvm") and sum(a.chosen for a in report.attempts) == 1
    assert (tmp_path / "out" / "model.so").is_file() == row.chosen


@installed
def test_a_module_with_other_numbers_is_not_handed_over(tmp_path, monkeypatch):
    from edgec.backends.tvm import building

    monkeypatch.setattr(building, "_IN_FLOATS", 0.0)
    with pytest.raises(UnavailableError, match="it gives other numbers"):
        api.compile(written(tmp_path), tmp_path / "out", backend="tvm", precision="fp32", tune=0)


@installed
def test_a_model_whose_images_see_each_other_is_not_run_one_by_one(tmp_path):
    """Every output is less the mean over the first axis, which only looks like a batch."""
    text = "g (float[N,4] x) => (float[N,4] y) { m = ReduceMean <axes = [0]> (x)\n y = Sub (x, m) }"
    with pytest.raises(UnavailableError, match="a batch is not its images one by one"):
        api.compile(written(tmp_path, text), tmp_path / "out", backend="tvm", precision="fp32", tune=0)


def test_inputs_of_any_size_are_refused_and_of_any_batch_not():
    model = zoo.model("g (float[N,3,H,8] x) => (float[N,3,H,8] y) { y = Relu (x) }")
    assert [r.node for r in support.refusals(model)] == ["x"]
    assert not list(support.refusals(zoo.model("g (float[N,3,8,8] x) => (float[N,3,8,8] y) { y = Relu (x) }")))


@installed
def test_an_operator_that_fails_late_is_said_in_a_line(tmp_path, monkeypatch):
    from edgec.backends.tvm import network

    def broken(*_):
        raise RuntimeError("Check failed\nat length")

    monkeypatch.setattr(network, "built", broken)
    with pytest.raises(UnavailableError, match="TVM cannot build it: Check failed"):
        api.compile(written(tmp_path), tmp_path / "out", backend="tvm", precision="fp32", tune=0)


@installed
@pytest.mark.parametrize(
    "device", ["raspberry-pi-4", "raspberry-pi-5", "arm64-neon", "jetson-orin-nano-8gb", "rtx-4090"]
)
def test_modules_are_built_for_other_devices_without_them(tmp_path, device):
    report = api.compile(written(tmp_path), tmp_path / "out", backend="tvm", precision="fp32", device=device, tune=0)
    assert report.result.median_ms is None and report.result.reason
    made = [p.name for p in (tmp_path / "out").iterdir() if p.suffix in (".so", ".tar")]
    assert len(made) == 1


@installed
def test_targets_are_tvms_own_where_it_has_them():
    import tvm
    from edgec.backends.tvm import targets

    known = set(tvm.target.tag.list_tags())
    for name, tag in targets.TAGS.items():
        profile = devices.find(name)
        target = targets.target_of(profile, 3)
        assert tag in known
        if profile.sm is None:
            assert target.attrs["mcpu"] == tvm.target.Target(tag).attrs["mcpu"]
            assert list(target.attrs["mattr"]) == list(tvm.target.Target(tag).attrs["mattr"])
        else:
            assert str(target.attrs["arch"]).startswith(f"sm_{round(10 * profile.sm)}")
            assert target.host.attrs["num-cores"] == 3
    for profile in devices.load_profiles().values():
        assert targets.target_of(profile, 1).kind.name == ("llvm" if profile.sm is None else "cuda")


@installed
def test_a_module_for_another_processor_does_not_open_with_a_trace(tmp_path):
    api.compile(written(tmp_path), tmp_path / "out", backend="tvm", precision="fp32", device="raspberry-pi-5", tune=0)
    with pytest.raises(UnavailableError, match="built for an aarch64 processor"):
        api.open_bundle(tmp_path / "out")


@installed
def test_functions_without_a_space_of_their_own_are_drawn_from_metaschedules(tmp_path):
    """The same schedule for the same number, which is all that is kept of it."""
    from edgec.backends.tvm import network

    net = prepared(written(tmp_path, "g (float[1,4,4] x) => (float[1,4,4] y) { y = MatMul (x, x) }"))
    (function,) = net.functions
    seeds = [c for c in function.space.choices() if "seed" in c]
    one, same, other = (network.scheduled(function, c).script() for c in (seeds[3], seeds[3], seeds[4]))
    assert one == same != other


@installed
def test_as_many_threads_run_as_are_asked_for(tmp_path):
    code = "from edgec.backends.tvm.threads import use; print(use(1), use(2), use(1))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    asked = [1, min(2, devices.usable_cores()), 1]
    assert [int(n) for n in done.stdout.split()] == asked


@installed
def test_what_may_crash_is_timed_in_a_worker(tmp_path):
    from edgec.backends.tvm import clock

    net = prepared(written(tmp_path, "g (float[1,4,4] x) => (float[1,4,4] y) { y = MatMul (x, x) }"))
    body = net.functions[0].body
    with clock.Here(net.target, 1) as watch:
        assert watch.seconds(body, safe=False) > 0
        first = watch._worker._process.pid
        assert watch.seconds(body, safe=False) > 0 and watch._worker._process.pid == first
        watch._worker._process.kill()
        with pytest.raises(clock.Fatal):
            watch.seconds(body, safe=False)
        assert watch.seconds(body, safe=False) > 0
        last = watch._worker._process
    assert last.poll() is not None


@installed
def test_a_schedule_that_takes_its_worker_down_is_not_tried_again(tmp_path):
    from edgec.backends.tvm import clock, records, tuning

    class Fragile(Stopwatch):
        def seconds(self, body, repeats=5, *, safe=True):
            if not safe:
                raise clock.Fatal("it took its process down")
            return super().seconds(body, repeats)

    net = prepared(written(tmp_path, "g (float[1,4,4] x) => (float[1,4,4] y) { y = MatMul (x, x) }"))
    kept = records.Records(net.target)
    found = tuning.tune(net, kept, Fragile(), 60.0)
    assert found.failed and "seed" not in found.choices[net.functions[0].name]
    assert all("seed" in choice for choice in kept.shunned(net.functions[0]))


@installed
def test_outputs_stay_what_they_were_when_it_is_run_again(tmp_path):
    text = """g (float[N,4] x) => (float[N,4] y, float[N,4] z) { y = Identity (x)\n z = Relu (x) }"""
    path = written(tmp_path, text)
    backend = Tvm().prepared(base.Lowering(tune=0, threads=1))
    runner = backend.open(backend.lower(path, LOCAL, "fp32"), 1)
    one, two = np.ones((1, 4), np.float32), np.full((1, 4), -2, np.float32)
    first = runner.run({"x": one})
    runner.run({"x": two})
    assert (first["y"] == 1).all() and (first["z"] == 1).all()
    both = runner.run({"x": np.concatenate([one, two])})
    assert (both["y"][0] == 1).all() and (both["y"][1] == -2).all()
    with pytest.raises(UserError, match=r"takes \[1, 4\]"):
        runner.run({"x": np.ones((1, 1), np.float32)})


@installed
def test_outputs_without_a_batch_are_refused_and_auto_goes_on_without(tmp_path):
    path = written(tmp_path, "g (float[N,4] x) => (float y) { y = ReduceSum <keepdims = 0> (x) }")
    with pytest.raises(UnavailableError, match="takes no batch|one by one"):
        api.compile(path, tmp_path / "one", backend="tvm", precision="fp32", tune=0, threads=1)
    report = api.compile(path, tmp_path / "two", precision="fp32", tune=0, threads=1)
    assert report.backend == "ort" and any("tvm was not tried" in w for w in report.warnings)


@installed
def test_a_module_that_is_wrong_here_is_not_built_for_elsewhere(tmp_path, monkeypatch):
    from edgec.backends.tvm import building

    monkeypatch.setattr(building, "_IN_FLOATS", 0.0)
    with pytest.raises(UnavailableError, match="it gives other numbers"):
        api.compile(
            written(tmp_path), tmp_path / "out", backend="tvm", precision="fp32", tune=0, device="raspberry-pi-5"
        )


def test_fixed_point_is_refused_where_it_would_do_nothing(tmp_path):
    with pytest.raises(UserError, match="in its own way"):
        api.compile(written(tmp_path), tmp_path / "out", backend="ort", fixed_point=True)


@installed
def test_bench_takes_the_threads_that_a_module_was_built_for(tmp_path):
    api.compile(written(tmp_path), tmp_path / "out", backend="tvm", precision="fp32", tune=0, threads=1)
    (found,) = api.bench(tmp_path / "out", seconds=0.2)
    assert found.threads == 1


@installed
def test_what_is_handed_over_is_judged_as_it_is_built(tmp_path, monkeypatch):
    """By the module, not by ONNX Runtime's integers: one that gives nothing loses everything."""
    from edgec.backends.tvm import building, runner

    rng = np.random.default_rng(0)
    images = tmp_path / "images"
    images.mkdir()
    for i in range(40):
        np.save(images / f"{i}.npy", rng.normal(size=(3, 8, 8)).astype(np.float32))
    honest = runner.Module.run
    monkeypatch.setattr(building, "_proven", lambda *_: None)
    monkeypatch.setattr(
        runner.Module, "run", lambda self, feed: {k: 0 * v + np.arange(5.0) for k, v in honest(self, feed).items()}
    )
    options = {"calib": images, "precision": "fp32", "tune": 0, "threads": 1}
    spoilt = api.compile(written(tmp_path), tmp_path / "one", backend="tvm", **options)
    assert spoilt.fidelity.drop > 10
    report = api.compile(written(tmp_path), tmp_path / "two", **options)
    (rival,) = [a for a in report.attempts if a.name == "fp32 on tvm"]
    assert report.backend == "ort" and not rival.chosen and rival.fidelity.drop > 10
