"""What is tried when a measurement shows that a budget is missed, on prices and drops that are known beforehand."""

import math
from dataclasses import replace

import lab
import numpy as np
import pytest
from edgec.backends import ort
from edgec.compiler import closing, trials
from edgec.compiler.candidates import Candidate, Lossy, points, save
from edgec.compiler.closing import State, close, first
from edgec.compiler.mixed_precision import costs
from edgec.compiler.mixed_precision.mixing import Mix
from edgec.compiler.mixed_precision.tradeoff import Point
from edgec.compiler.mixed_precision.weighing import mixtures, weigh
from edgec.compiler.quantization.quantizer import Quantizer
from edgec.compiler.types import Budget, Fidelity, Measurement, silent
from test_mixed_precision import NET, Priced
from test_quantize import VNNI, build, ranges_of

#: Seven units: 1 ms on integers, 2 ms in float, as predicted.
UNITS, SLOW = 7, 2.0


def ladder(*db):
    return [Point({}, None, value, 1.0) for value in db]


@pytest.mark.parametrize("holds", range(9))
def test_bisection_finds_the_first_that_holds_in_few_steps(holds):
    asked = []

    def judge(point):
        asked.append(point.db)
        return point.db >= holds

    found = first(ladder(*range(8)), judge, lambda: False)
    assert (found is None) == (holds == 8) and (found is None or found.db == holds)
    assert len(asked) == len(set(asked)) <= 4


def test_bisection_ends_when_it_is_told_to():
    asked = []
    assert first(ladder(1, 2, 3), lambda p: asked.append(p) or True, lambda: len(asked) == 1).db == 2
    assert first(ladder(1, 2, 3), lambda p: False, lambda: True) is None


class Bench:
    """One network with all its candidates' latencies and drops made up."""

    def __init__(self, tmp_path, monkeypatch, *, drop, slow, **options):
        rng = np.random.default_rng(0)

        def draw(*shape):
            return (rng.normal(size=shape) / math.sqrt(math.prod(shape[1:]) / 2)).astype(np.float32)

        model = build(
            NET, w1=draw(8, 8, 1, 1), b1=draw(8), w2=draw(8, 8, 3, 3), b2=draw(8), w3=draw(8, 8, 2, 2),
            w4=draw(16, 8, 1, 1), w5=draw(5, 16), b5=draw(5),
        )  # fmt: skip
        samples = rng.normal(size=(8, 8, 6, 6)).astype(np.float32)
        self.this = lab.job(tmp_path, model, samples, **options)
        self.this = replace(self.this, judged=self.this.images, target="made up")
        quantizer = Quantizer(model, ort.SUPPORTS, VNNI, ranges_of(model, ort.SUPPORTS, {"x": samples}))
        monkeypatch.setattr(costs, "measure", Priced(SLOW))
        tradeoff = weigh(quantizer, self.this.images, {"x": samples[:1]}, threads=1, progress=silent)
        self.mix = Mix(tradeoff, quantizer)
        self.drop, self.slow, self.judgements = drop, slow, []
        monkeypatch.setattr(trials, "measure", self.measure)
        monkeypatch.setattr(trials, "judge", self.judge)
        self.work, self.quantizer = tmp_path, quantizer

    def measure(self, this, candidates, *, seconds=4.0):
        found = {}
        for c in candidates:
            floats = UNITS if c.keep_float is None else len(c.keep_float)
            ms = UNITS - floats + self.slow * floats
            found[c.name] = Measurement(c.name, "local", ms, speedup=UNITS * self.slow / ms, speedup_low=1.1)
        return found

    def judge(self, this, candidates):
        self.judgements += [c.name for c in candidates]
        drops = {c.name: 0.0 if c.keep_float is None else self.drop(len(c.keep_float)) for c in candidates}
        return {name: Fidelity("top1", 100, 90.0, 90 - d, d, d, d) for name, d in drops.items()}

    def close(self, limits=None):
        """Start from the plain candidate and the frontier, as driver.py does, and return what closing adds."""
        baseline = save(Candidate("fp32", "fp32", self.work / "fp32.onnx", self.quantizer.model))
        some = mixtures(self.mix.tradeoff, self.mix.tradeoff.frontier(limits))
        mix = replace(self.mix, limits=limits or {}, points=some)
        plain = points(self.this, mix, [mix.uniform("int8")], self.work, [])
        begun = (baseline, *plain, *points(self.this, mix, some, self.work, ["int8"]))
        state = State(begun, self.measure(self.this, begun), self.judge(self.this, begun))
        self.judgements.clear()
        found = close(self.this, Lossy(quantizer=self.quantizer, candidates=begun[1:], mix=mix), state, self.work)
        assert found.candidates[: len(begun)] == begun
        return state, found, found.candidates[len(begun) :]


def test_nothing_is_tried_where_all_budgets_hold(tmp_path, monkeypatch):
    bench = Bench(tmp_path, monkeypatch, drop=lambda floats: 0.1, slow=SLOW)
    state, found, more = bench.close()
    assert found is state and not more


@pytest.mark.parametrize(("needed", "precision"), [(3, "int8"), (5, "int8"), (4, "auto")])
def test_stepping_back_finds_the_fastest_that_holds_the_drop(tmp_path, monkeypatch, needed, precision):
    """Only `needed` units in float hold the budget; the frontier within reach has at most one."""
    budget = Budget(1.0, drop_stated=True)
    bench = Bench(
        tmp_path, monkeypatch, drop=lambda floats: 0.5 if floats >= needed else 5.0, slow=SLOW,
        budget=budget, precision=precision,
    )  # fmt: skip
    state, found, more = bench.close()
    assert all(found.judged[c.name].drop > 1 for c in state.candidates[1:])
    inside = [c for c in more if found.judged[c.name].drop <= 1]
    possible = mixtures(
        bench.mix.tradeoff, bench.mix.tradeoff.frontier(least_integer=0.0, reach=None, points=closing._POINTS)
    )
    counts = [len(p.keep_float) for p in possible if len(p.keep_float) >= needed]
    assert min(len(c.keep_float) for c in inside) == min(counts)
    assert bench.judgements == [c.name for c in more], "each is judged once, none of those before again"
    assert len(more) <= 5 < len(possible) + 2
    assert set(found.measured) == {c.name for c in (*state.candidates, *inside)}, "what loses too much is not timed"
    assert len({c.name for c in found.candidates}) == len(found.candidates)


def test_where_nothing_holds_the_best_attempt_is_timed(tmp_path, monkeypatch):
    bench = Bench(
        tmp_path, monkeypatch, drop=lambda floats: 9.0 - floats, slow=SLOW, budget=Budget(1.0, drop_stated=True),
        precision="int8",
    )  # fmt: skip
    state, found, more = bench.close()
    least = min(more, key=lambda c: found.judged[c.name].drop)
    assert found.judged[least.name].drop > 1
    assert set(found.measured) == {c.name for c in (*state.candidates, least)}


def test_a_named_precision_without_a_stated_drop_is_left_alone(tmp_path, monkeypatch):
    bench = Bench(tmp_path, monkeypatch, drop=lambda floats: 5.0, slow=SLOW, precision="int8")
    assert not bench.close()[2]


def test_without_a_target_the_work_stands_in_for_time(tmp_path, monkeypatch):
    budget = Budget(1.0, drop_stated=True)
    bench = Bench(
        tmp_path, monkeypatch, drop=lambda floats: 0.5 if floats >= 2 else 5.0, slow=SLOW,
        budget=budget, precision="int8",
    )  # fmt: skip
    bench.this = replace(bench.this, target=None)
    begun = (
        save(Candidate("fp32", "fp32", tmp_path / "fp32.onnx", bench.quantizer.model)),
        *points(bench.this, bench.mix, [bench.mix.uniform("int8")], tmp_path, []),
    )
    state = State(begun, bench.measure(bench.this, begun), bench.judge(bench.this, begun))
    found = close(bench.this, Lossy(quantizer=bench.quantizer, candidates=begun[1:]), state, tmp_path)
    more = found.candidates[2:]
    assert more and all(c.predicted.speedup is None for c in more)
    assert min(found.judged[c.name].drop for c in more) <= 1


def test_without_images_there_is_nothing_to_step_back_by(tmp_path, monkeypatch):
    bench = Bench(
        tmp_path, monkeypatch, drop=lambda floats: 5.0, slow=SLOW, budget=Budget(1.0, drop_stated=True),
        precision="int8",
    )  # fmt: skip
    bench.this = replace(bench.this, images=None)
    begun = (
        save(Candidate("fp32", "fp32", tmp_path / "fp32.onnx", bench.quantizer.model)),
        *points(bench.this, bench.mix, [bench.mix.uniform("int8")], tmp_path, []),
    )
    state = State(begun, bench.measure(bench.this, begun), bench.judge(bench.this, begun))
    assert close(bench.this, Lossy(quantizer=bench.quantizer), state, tmp_path) is state


def test_a_latency_that_measurement_shows_to_be_missed_is_closed_in_on(tmp_path, monkeypatch):
    """Floats take 2.4 ms, not the 2 ms predicted. 11 ms hold two in float (9.8), not three (11.2)."""
    bench = Bench(
        tmp_path, monkeypatch, drop=lambda floats: 0.1, slow=2.4, budget=Budget(max_latency_ms=11.0), precision="int8"
    )
    limits = {"ms": bench.mix.tradeoff.ms_for(11.0, UNITS * SLOW)}  # four in float are predicted to take 11 ms
    state, found, more = bench.close(limits)
    assert max(len(c.keep_float) for c in state.candidates[1:]) >= 3
    held = [c for c in more if found.measured[c.name].median_ms <= 11.0]
    assert held
    assert set(bench.judgements) == {c.name for c in more}
    assert max(len(c.keep_float) for c in held) == 2
    assert any(found.measured[c.name].median_ms > 11.0 for c in more), "and more than that was tried"
