"""Verdicts and paired intervals against brute force, on models whose answers are known."""

import math

import numpy as np
import pytest
from edgec.compiler import robustness
from edgec.compiler.fidelity import Metric, compare, compare_together
from edgec.compiler.per_image import PerImage, interval, ratio, resampled
from edgec.compiler.report import robustness_table, serial
from edgec.compiler.types import Difference
from test_fidelity import LOGITS, Batch, Fake

N = len(LOGITS)
LABELS = LOGITS.argmax(1)


class Conditioned:
    """A model with an answer for each condition and image."""

    def __init__(self, answers):
        self.answers = answers
        self.runs = 0

    def run(self, feed):
        self.runs += 1
        i, condition = int(feed["i"][0]), str(feed["condition"][0])
        return {"y": self.answers[condition][i : i + 4]}


def steps(conditions, labels=None, n=N):
    for i in range(0, n, 4):
        yield {
            c: Batch({"i": np.array([i]), "condition": np.array([c])}, None if labels is None else labels[i : i + 4], 4)
            for c in conditions
        }


def together(reference, candidates, labels=None, **kwargs):
    conditions = list(reference)
    return compare_together(
        Conditioned(reference),
        {name: Conditioned(answers) for name, answers in candidates.items()},
        steps(conditions, labels),
        images=N,
        labelled=labels is not None,
        **kwargs,
    )


def wrong(answers, images):
    """Return answers that are wrong on these images, whatever the label."""
    out = answers.copy()
    for i in images:
        out[i] = np.roll(out[i], 1)
    return out


def top1(lost):
    """Return a model that is right where the original is wrong (-1), wrong where it is right (1), or alike (0)."""
    lost = np.asarray(lost, dtype=np.float64)
    columns = np.stack([lost >= 0, np.ones(len(lost)), lost < 1, np.ones(len(lost))], axis=1)
    return PerImage("top1", right=np.where(lost[:, None] == 0, 1.0, columns))


def agreeing(alike):
    return PerImage("agreement", answers={"y": np.asarray(alike, dtype=bool)})


# --------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("low", "high", "differing", "expected"),
    [
        (0.1, 1.0, 6, "worse"),
        (0.1, 1.0, 5, "no difference shown"),
        (0.0, 1.0, 100, "no difference shown"),
        (-1.0, 0.0, 100, "no difference shown"),
        (-1.0, -0.1, 6, "better"),
        (0.0, 0.0, 0, "no difference shown"),
        (math.nan, math.nan, 100, "no difference shown"),
    ],
)
def test_a_verdict_at_its_edges(low, high, differing, expected):
    assert robustness.verdict(low, high, differing) == expected


def test_six_images_on_one_side_are_shown_and_five_are_not():
    assert robustness.paired(top1([1] * 6 + [0] * 994)).verdict == "worse"
    five = robustness.paired(top1([1] * 5 + [0] * 995))
    assert five.low > 0  # which the bootstrap alone would call a difference
    assert (five.differing, five.verdict) == (5, "no difference shown")


def test_both_signs_and_alike():
    assert robustness.paired(top1([-1] * 20 + [0] * 80)).verdict == "better"
    assert robustness.paired(top1([-1] * 20 + [1] * 20 + [0] * 60)).verdict == "no difference shown"
    assert robustness.paired(top1([0] * 100)) == Difference(0.0, 0.0, 0.0, "points", 0.0, 100, 0, "no difference shown")


# --------------------------------------------------------------------------------------------- intervals


def brute_force(figure, n, seed):
    """Return the 95 % interval of `figure(indices)` the slow way, and the draws."""
    rng = np.random.default_rng(seed)
    draws = [figure(rng.integers(0, n, n)) for _ in range(1000)]
    return (*np.percentile(draws, [2.5, 97.5]), np.std(draws, ddof=1))


def test_the_interval_of_two_models_is_the_paired_bootstrap():
    rng = np.random.default_rng(5)
    a, b = (agreeing(rng.random(300) < p) for p in (0.85, 0.95))
    found = robustness.paired(a, b, seed=9)
    x, y = a.answers["y"], b.answers["y"]
    low, high, error = brute_force(lambda i: 100 * (np.mean(~x[i]) - np.mean(~y[i])), 300, 9)
    assert found.value == pytest.approx(100 * (y.mean() - x.mean()), abs=1e-9)
    assert (found.low, found.high, found.error) == pytest.approx((low, high, error), abs=1e-9)
    assert (found.differing, found.images, found.verdict) == (int((x != y).sum()), 300, "worse")


def test_pairing_is_narrower_than_comparing_apart():
    rng = np.random.default_rng(6)
    a = rng.random(500) < 0.7
    b = a.copy()
    b[:10] = False
    paired = robustness.paired(agreeing(b), agreeing(a))
    apart = brute_force(lambda i: 100 * np.mean(a[i]), 500, 1)[2] * math.sqrt(2)
    assert paired.error < apart / 3


def test_a_ratio_of_sums_is_resampled_as_one():
    rng = np.random.default_rng(7)
    pairs = [np.stack([rng.integers(0, 9, 80), rng.integers(10, 20, 80)], axis=1).astype(float) for _ in range(2)]
    a, b = (PerImage("boxes", scores=p) for p in pairs)
    found = robustness.paired(a, b, seed=2)

    def lost(p, i):
        return 100 * (1 - p[i, 0].sum() / p[i, 1].sum())

    low, high, _ = brute_force(lambda i: lost(pairs[0], i) - lost(pairs[1], i), 80, 2)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)


def test_errors_are_compared_in_decibels_image_by_image():
    signal = np.linspace(1, 50, 40)
    sums = [np.stack([signal, e * signal, signal, signal], axis=1) for e in (1e-2, 1e-3)]
    a, b = (PerImage("energy", {"y": s}) for s in sums)
    found = robustness.paired(a, b)
    assert (found.value, found.unit, found.verdict) == (pytest.approx(10.0, abs=1e-9), "dB", "worse")
    assert found.low == pytest.approx(10.0, abs=1e-9)
    with pytest.raises(ValueError, match="another one"):
        robustness.paired(a)


def test_what_float32_rounds_away_is_no_error_and_what_is_no_number_is_all_error():
    sums = np.array([[1.0, 0.0, 1.0, 1.0], [1.0, 1e-13, 1.0, 1.0], [1.0, np.nan, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    assert PerImage("energy", {"y": sums}).error_db == pytest.approx([-100, -100, 100, -100], abs=1e-9)


def test_the_worst_output_of_each_image_counts():
    one = np.array([[1.0, 1e-2, 1, 1], [1.0, 1e-4, 1, 1]])
    other = np.array([[1.0, 1e-3, 1, 1], [1.0, 1e-1, 1, 1]])
    assert PerImage("energy", {"a": one, "b": other}).error_db == pytest.approx([-20, -10], abs=1e-9)


def test_what_was_not_seen_alike_is_not_compared():
    with pytest.raises(ValueError, match="metric"):
        robustness.paired(agreeing([True] * 10), top1([0] * 10))
    with pytest.raises(ValueError):
        robustness.paired(agreeing([True] * 10), agreeing([True] * 11))


def test_one_seed_draws_the_same_images_whatever_the_columns():
    a, b = np.random.default_rng(0).random((2, 30, 2))
    both = resampled(np.stack([a, b], axis=1), 4)
    assert both[:, 0] == pytest.approx(resampled(a, 4), abs=1e-12)
    assert interval(ratio(both)[:, 1]) == pytest.approx(interval(ratio(resampled(b, 4))), abs=1e-12)


def test_no_sum_at_all_is_nothing_lost():
    assert ratio(np.zeros((3, 2))).tolist() == [0.0, 0.0, 0.0]


# --------------------------------------------------------------------------------------------- taken together


def difference(z, verdict="worse"):
    return Difference(z, 0.1, 2 * z, "points", 1.0, 1000, 100, verdict)


def test_holm_steps_down_and_stops():
    # two-sided p: 0.0027, 0.0124, 0.0278, 0.0455; 0.05 / 4, / 3, / 2, / 1 = 0.0125, 0.0167, 0.025, 0.05
    found = {"d": difference(2.0), "a": difference(3.0), "c": difference(2.2), "b": difference(2.5)}
    assert robustness.hold_together(found) == ("a", "b")  # c fails at 0.025, and d after it
    assert robustness.hold_together({"a": difference(2.0)}) == ("a",)
    assert robustness.hold_together({"a": difference(9.0, robustness.NOT_SHOWN)}) == ()
    assert robustness.hold_together({}) == ()


# --------------------------------------------------------------------------------------------- known models


def test_compare_is_the_case_of_one_condition():
    other = wrong(LOGITS, range(0, 40, 3))
    seen = together({"clean": LOGITS}, {"x": {"clean": other}}, LABELS)
    plain = ({"i": np.array([i])} for i in range(0, N, 4))
    batches = (Batch(feed, LABELS[feed["i"][0] : feed["i"][0] + 4], 4) for feed in plain)
    found = compare(Fake({"y": LOGITS}), {"x": Fake({"y": other})}, batches, images=N, labelled=True, seed=5)
    assert seen.candidates["clean"]["x"].fidelity(5) == found["x"]


def test_with_labels_the_loss_under_each_condition_counts():
    noisy = wrong(LOGITS, range(10))  # the original itself loses 10 of 40
    seen = together(
        {"clean": LOGITS, "noise": noisy, "blur": LOGITS},
        {"x": {"clean": LOGITS, "noise": wrong(noisy, range(10, 20)), "blur": LOGITS}},
        LABELS,
    )
    found = robustness.judge(seen, "x", seed=1)
    verdicts = {name: c.difference.verdict for name, c in found.conditions.items()}
    assert verdicts == {"clean": "no difference shown", "noise": "worse", "blur": "no difference shown"}
    noise = found.conditions["noise"]
    assert (noise.original.reference, noise.original.value, noise.original.drop) == (100.0, 75.0, 25.0)
    assert (noise.fidelity.reference, noise.fidelity.value) == (75.0, 50.0)
    assert (noise.difference.value, noise.difference.differing) == (25.0, 10)
    assert (noise.difference.low, noise.difference.high) == (noise.fidelity.drop_low, noise.fidelity.drop_high)
    assert found.together == ("noise",)


def test_without_labels_what_is_lost_beyond_the_clean_loss_counts():
    bad = wrong(LOGITS, range(8))  # unlike the original on 8 images, also clean ones
    worse = wrong(LOGITS, range(20))
    seen = together(
        {"clean": LOGITS, "same": LOGITS, "noise": LOGITS}, {"x": {"clean": bad, "same": bad, "noise": worse}}
    )
    found = robustness.judge(seen, "x")
    assert found.conditions["clean"].difference is None
    assert found.conditions["same"].difference.verdict == "no difference shown"
    noise = found.conditions["noise"].difference
    assert (noise.value, noise.differing, noise.verdict) == (30.0, 12, "worse")


def test_better_than_the_original_is_said():
    labels = np.roll(LABELS, 1)  # the original is nearly always wrong
    right = np.eye(5, dtype=np.float32)[labels]
    found = robustness.judge(together({"clean": LOGITS}, {"x": {"clean": right}}, labels), "x")
    assert found.conditions["clean"].difference.verdict == "better"
    assert "better than the original under clean" in robustness_table.headline(found).lower()


@pytest.mark.parametrize("labels", [None, LABELS])
@pytest.mark.parametrize("metric", [None, Metric(decode=lambda o: np.array([[0, 0, 1, 1, 1, o["y"].argmax()]]))])
def test_a_model_that_is_its_original_differs_nowhere(labels, metric):
    answers = {"clean": LOGITS, "noise": wrong(LOGITS, range(20))}
    found = robustness.judge(together(answers, {"x": answers}, labels, metric=metric), "x")
    assert {c.difference.verdict for c in found.conditions.values() if c.difference} == {"no difference shown"}
    assert found.conditions["noise"].original.drop == 50.0
    assert found.together == ()


def test_maps_are_compared_by_their_error():
    maps = np.random.default_rng(0).normal(size=(N, 2, 3, 3)).astype(np.float32)
    noisy = maps + 1
    seen = together(
        {"clean": maps, "noise": noisy, "blur": maps}, {"x": {"clean": maps * 1.01, "noise": noisy * 1.1, "blur": maps}}
    )
    found = robustness.judge(seen, "x")
    assert found.metric == "energy"
    assert found.conditions["noise"].difference.value == pytest.approx(20.0, abs=0.01)
    assert found.conditions["noise"].difference.verdict == "worse"
    assert found.conditions["blur"].difference.verdict == "better"
    shown = robustness_table.robustness(found)
    assert shown.rows[1][2] == "20.0"  # the result's SQNR in dB


def test_boxes_are_decoded_once_for_each_model_and_image():
    calls = []

    def decode(outputs):
        calls.append(1)
        return np.array([[0, 0, 1, 1, 0.9, outputs["y"].argmax()]])

    answers = {"clean": LOGITS, "noise": LOGITS}
    seen = together(answers, {"x": answers, "z": answers}, metric=Metric(decode=decode))
    assert len(calls) == 3 * 2 * N
    assert seen.candidates["noise"]["z"].metric == "boxes"


def test_each_model_runs_once_for_each_condition_and_batch():
    reference, candidate = (Conditioned({"clean": LOGITS, "noise": LOGITS}) for _ in range(2))
    told = []
    compare_together(
        reference,
        {"x": candidate},
        steps(["clean", "noise"]),
        images=N,
        progress=lambda what, done, total: told.append((done, total)),
    )
    assert reference.runs == candidate.runs == 2 * N / 4
    assert told[-1] == (2 * N, 2 * N)


def test_an_original_alone_is_beside_itself_on_clean_images():
    found = robustness.judge(together({"clean": LOGITS, "noise": wrong(LOGITS, range(10))}, {}, LABELS))
    assert found.conditions["noise"].fidelity is None
    assert found.conditions["noise"].original.drop == 25.0
    assert found.notes == ()
    table = robustness_table.robustness(found)
    assert [row[1] for row in table.rows] == ["100.00", "75.00"]


def test_what_is_found_is_plain_data():
    found = robustness.judge(
        together({"clean": LOGITS, "noise": LOGITS}, {"x": {"clean": LOGITS, "noise": -LOGITS}}), "x"
    )
    data = serial.plain(found)
    assert list(data["conditions"]) == ["clean", "noise"]
    assert data["conditions"]["noise"]["difference"]["verdict"] == "worse"
