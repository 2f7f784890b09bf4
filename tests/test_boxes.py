import numpy as np
import pytest
from edgec.compiler.boxes import IOUS, average_precision, iou, joined, match, suppress


def box(x1, y1, x2, y2, score=0.9, label=0):
    return [x1, y1, x2, y2, score, label]


def truth(*boxes, counts=1):
    return np.array([[*b[:4], counts, b[5]] for b in boxes])


def hits(ours, theirs):
    return int(match(ours, theirs).f1[0] / 2)


def test_iou_by_hand():
    a, b = np.array([box(0, 0, 2, 2)]), np.array([box(1, 1, 3, 3), box(5, 5, 6, 6), box(0, 0, 2, 2)])
    np.testing.assert_allclose(iou(a, b), [[1 / 7, 0.0, 1.0]], rtol=1e-12)


def test_empty_boxes_have_no_area():
    a = np.array([box(1, 1, 1, 1)])
    assert iou(a, a).item() == 0.0


def test_each_box_is_matched_once():
    theirs = np.array([box(0, 0, 1, 1)])
    ours = np.array([box(0, 0, 1, 1, 0.9), box(0, 0, 1, 1, 0.8)])
    assert match(ours, theirs).f1 == (2.0, 3.0)


def test_another_class_is_no_match():
    assert hits(np.array([box(0, 0, 1, 1, label=1)]), np.array([box(0, 0, 1, 1, label=2)])) == 0


def test_nothing_matches_nothing():
    none = np.zeros((0, 6))
    assert match(none, np.array([box(0, 0, 1, 1)])).f1 == (0.0, 1.0)
    assert match(none, none).f1 == (0.0, 0.0)


def test_the_higher_score_chooses_first():
    theirs = np.array([box(0, 0, 10, 10), box(0, 0, 10, 6)])
    ours = np.array([box(0, 0, 10, 9, 0.5), box(0, 0, 10, 10, 0.9)])
    assert hits(ours, theirs) == 2


def test_suppression_keeps_the_best_of_a_class_and_other_classes():
    boxes = np.array([box(0, 0, 1, 1, 0.5), box(0, 0, 1, 1, 0.9), box(0, 0, 1, 1, 0.4, 1)])
    assert suppress(boxes)[:, 4].tolist() == [0.9, 0.4]


# --------------------------------------------------------------------------------------------- average precision


def overlap(a, b):
    """IoU of two boxes, and the share of `a` that lies in `b`, the slow way."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(w, 0) * max(h, 0)
    one, other = ((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b))
    return both / (one + other - both), both / one


def brute_match(ours, theirs, threshold):
    """Return (score, class, 1 hit / 0 none / -1 not counted) of an image's boxes, box after box."""
    taken, found = set(), []
    for mine in sorted(ours.tolist(), key=lambda b: -b[4]):
        best, at = threshold, None
        for k, other in enumerate(theirs.tolist()):
            if other[4] and other[5] == mine[5] and k not in taken and overlap(mine, other)[0] >= best:
                best, at = overlap(mine, other)[0], k
        crowds = [t for t in theirs.tolist() if not t[4] and t[5] == mine[5]]
        crowd = at is None and any(overlap(mine, other)[1] >= threshold for other in crowds)
        taken |= {at} - {None}
        found.append((mine[4], mine[5], 1 if at is not None else -1 if crowd else 0))
    return found


def brute_precision(images, threshold):
    """Return AP at an IoU by its definition: for each recall the best precision of all cuts that reach it."""
    found = [row for ours, theirs in images for row in brute_match(ours, theirs, threshold)]
    every = []
    for label in sorted({t[5] for _, theirs in images for t in theirs if t[4]}):
        wanted = sum(t[5] == label and t[4] > 0 for _, theirs in images for t in theirs)
        rows = [hit for _, c, hit in sorted(found, key=lambda r: -r[0]) if c == label and hit >= 0]
        cuts = [(sum(rows[:k]) / k, sum(rows[:k]) / wanted) for k in range(1, len(rows) + 1)]
        at = [max((p for p, r in cuts if r >= recall), default=0.0) for recall in np.linspace(0, 1, 101)]
        every.append(np.mean(at))
    return np.mean(every)


def images(rng, count=12):
    """Return images of overlapping boxes with distinct scores, some of the true ones regions that do not count."""

    def boxes(n):
        corner = rng.random((n, 2))
        return np.column_stack(
            [corner, corner + rng.uniform(0.1, 0.5, (n, 2)), rng.random(n), rng.integers(0, 3, n)]
        ).astype(float)

    drawn = []
    for _ in range(count):
        theirs = boxes(rng.integers(0, 6))
        near = np.repeat(theirs, 2, axis=0)
        near[:, :4] += rng.normal(0, 0.03, (len(near), 4))
        near[:, 4] = rng.random(len(near))
        theirs[:, 4] = rng.random(len(theirs)) < 0.8
        drawn.append((np.vstack([near, boxes(rng.integers(0, 4))]), theirs))
    return drawn


@pytest.mark.parametrize("seed", range(6))
def test_average_precision_is_that_of_the_slow_way(seed):
    drawn = images(np.random.default_rng(seed))
    found = average_precision(joined(match(ours, theirs).best() for ours, theirs in drawn))
    # the same comparisons in both; the mean of 101 precisions in another order
    assert found == pytest.approx([brute_precision(drawn, t) for t in IOUS], abs=1e-12)
    assert 0.05 < found.mean() < 0.95


@pytest.mark.parametrize("seed", range(4))
def test_f1_is_that_of_the_slow_way(seed):
    for ours, theirs in images(np.random.default_rng(seed)):
        rows = [hit for *_, hit in brute_match(ours, theirs, 0.5)]
        wanted = np.count_nonzero(theirs[:, 4])
        assert match(ours, theirs).f1 == (2 * rows.count(1), rows.count(0) + rows.count(1) + wanted)


def test_average_precision_by_hand():
    # one class, two objects; found, missed, found: precision 1 up to recall 0.5, then 2/3
    theirs = truth(box(0, 0, 1, 1), box(2, 0, 3, 1))
    ours = np.array([box(0, 0, 1, 1, 0.9), box(5, 5, 6, 6, 0.8), box(2, 0, 3, 1, 0.7)])
    found = average_precision(match(ours, theirs))
    assert found == pytest.approx(np.full(10, (51 * 1 + 50 * 2 / 3) / 101), abs=1e-12)


def test_a_coarse_box_counts_up_to_its_iou():
    found = average_precision(match(np.array([box(0, 0, 1, 0.72)]), truth(box(0, 0, 1, 1))))  # IoU 0.72
    assert found.tolist() == [1.0] * 5 + [0.0] * 5


def test_a_class_without_objects_and_one_that_is_never_found():
    theirs = truth(box(0, 0, 1, 1, label=1), box(2, 2, 3, 3, label=2))
    ours = np.array([box(0, 0, 1, 1, label=1), box(0, 0, 1, 1, label=7)])
    assert average_precision(match(ours, theirs)) == pytest.approx(np.full(10, 0.5))  # the mean of 1 and 0
    assert average_precision(match(ours, np.zeros((0, 6)))) is None


def test_what_is_found_in_a_crowd_is_neither_right_nor_wrong():
    theirs = np.vstack([truth(box(0, 0, 1, 1)), truth(box(2, 0, 9, 9), counts=0)])
    ours = np.array([box(0, 0, 1, 1, 0.5), box(3, 3, 4, 4, 0.9), box(5, 5, 6, 6, 0.8), box(5, 5, 6, 6, 0.8, label=1)])
    found = match(ours, theirs)
    assert found.f1 == (2.0, 3.0)  # the object, its box, and the one of another class
    assert average_precision(found) == pytest.approx(np.ones(10))


def test_an_image_gives_its_hundred_best_boxes_of_a_class():
    junk = np.array([box(5, 5, 6, 6, 0.9)] * 100 + [box(0, 0, 1, 1, 0.1), box(0, 0, 1, 1, 0.1, label=1)])
    theirs = truth(box(0, 0, 1, 1), box(0, 0, 1, 1, label=1))
    found = match(junk, theirs)
    assert len(found.best().scores) == 101
    assert found.f1[0] == 4.0  # F1 counts all
    assert average_precision(found.best()) == pytest.approx(np.full(10, 0.5))
