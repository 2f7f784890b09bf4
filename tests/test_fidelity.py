"""The judge against numbers computed by hand, on fake runners."""

from dataclasses import dataclass

import numpy as np
import pytest
from edgec.compiler.fidelity import Metric, compare


@dataclass
class Fake:
    outputs: dict

    def run(self, feed):
        i = int(feed["i"][0])
        return {name: y[i : i + 4] for name, y in self.outputs.items()}


@dataclass
class Batch:
    feed: dict
    labels: np.ndarray | None
    count: int
    rows: int = 4
    names: tuple = ()
    box_labels: object = None


def batches(n, labels=None, last=4):
    for i in range(0, n, 4):
        count = last if i + 4 >= n else 4
        yield Batch({"i": np.array([i])}, None if labels is None else labels[i : i + count], count)


def judge(reference, candidate, **kwargs):
    n = len(next(iter(reference.values())))
    labels, last = kwargs.pop("labels", None), kwargs.pop("last", 4)
    found = compare(
        Fake(reference),
        {"x": Fake(candidate)},
        batches(n, labels, last),
        images=n,
        labelled=labels is not None,
        **kwargs,
    )
    return found["x"]


RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(40, 5)).astype(np.float32)


def test_identical_models_lose_nothing():
    found = judge({"y": LOGITS}, {"y": LOGITS})
    assert (found.metric, found.drop, found.value) == ("agreement", 0.0, 100.0)
    assert found.outputs[0].cosine == pytest.approx(1.0, abs=1e-12)
    assert found.outputs[0].sqnr_db is None  # no error at all: no ratio to state


def test_sqnr_by_hand():
    found = judge({"y": LOGITS}, {"y": LOGITS * 1.1})
    assert found.outputs[0].sqnr_db == pytest.approx(20.0, abs=1e-3)  # error energy 1 %


def test_agreement_counts_changed_answers():
    other = LOGITS.copy()
    other[:4] = -other[:4]
    found = judge({"y": LOGITS}, {"y": other})
    assert found.drop == pytest.approx(10.0)
    assert found.drop_low < 10 < found.drop_high


def test_top1_is_paired_and_signed():
    labels = LOGITS.argmax(1)
    labels[:10] = (labels[:10] + 1) % 5  # the original is right on 30 of 40
    better = LOGITS.copy()
    better[np.arange(4), labels[:4]] = 100  # the candidate is right on 4 more
    found = judge({"y": LOGITS}, {"y": better}, labels=labels)
    assert (found.metric, found.reference, found.value) == ("top1", 75.0, 85.0)
    assert found.drop == pytest.approx(-10.0)
    assert found.drop_low <= found.drop <= found.drop_high


def test_rows_that_only_pad_a_batch_do_not_count():
    other = LOGITS.copy()
    other[38:] = -other[38:]
    assert judge({"y": LOGITS}, {"y": other}, last=2).drop == 0.0


def test_energy_for_what_is_no_classifier_takes_the_worst_output():
    maps = RNG.normal(size=(40, 3, 8, 8)).astype(np.float32)
    found = judge({"a": maps, "b": maps}, {"a": maps * 1.1, "b": maps * 1.01})
    assert found.metric == "energy"
    assert found.drop == pytest.approx(1.0, abs=1e-3)  # 1 % of the energy is one point


def test_boxes_by_a_decoder():
    grids = RNG.uniform(size=(40, 1, 2, 2)).astype(np.float32)

    def decode(outputs):
        return np.array([[0, 0, 1, 1, 0.9, round(float(outputs["y"].max() > 0))]])

    other = grids.copy()
    other[:10] = -other[:10]
    found = judge({"y": grids}, {"y": other}, metric=Metric(decode=decode))
    assert found.metric == "boxes"
    assert found.value == pytest.approx(75.0)


def test_a_users_score():
    found = judge({"y": LOGITS}, {"y": LOGITS}, metric=Metric(score=lambda got, want: 0.5))
    assert (found.metric, found.value) == ("metric", 50.0)


def test_integer_outputs_alone_are_not_judged():
    found = judge({"y": np.zeros((8, 3), np.int64)}, {"y": np.zeros((8, 3), np.int64)})
    assert found.drop is None
    assert "no float output" in found.reason


def test_the_seed_fixes_the_interval():
    other = LOGITS + RNG.normal(size=LOGITS.shape).astype(np.float32)
    assert judge({"y": LOGITS}, {"y": other}, seed=3) == judge({"y": LOGITS}, {"y": other}, seed=3)
