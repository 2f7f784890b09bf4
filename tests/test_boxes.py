import numpy as np
from edgec.compiler.boxes import iou, match, suppress


def box(x1, y1, x2, y2, score=0.9, label=0):
    return [x1, y1, x2, y2, score, label]


def test_iou_by_hand():
    a, b = np.array([box(0, 0, 2, 2)]), np.array([box(1, 1, 3, 3), box(5, 5, 6, 6), box(0, 0, 2, 2)])
    np.testing.assert_allclose(iou(a, b), [[1 / 7, 0.0, 1.0]], rtol=1e-12)


def test_empty_boxes_have_no_area():
    a = np.array([box(1, 1, 1, 1)])
    assert iou(a, a).item() == 0.0


def test_each_box_is_matched_once():
    theirs = np.array([box(0, 0, 1, 1)])
    ours = np.array([box(0, 0, 1, 1, 0.9), box(0, 0, 1, 1, 0.8)])
    assert match(ours, theirs) == 1


def test_another_class_is_no_match():
    assert match(np.array([box(0, 0, 1, 1, label=1)]), np.array([box(0, 0, 1, 1, label=2)])) == 0


def test_nothing_matches_nothing():
    none = np.zeros((0, 6))
    assert match(none, np.array([box(0, 0, 1, 1)])) == 0
    assert match(none, none) == 0


def test_the_higher_score_chooses_first():
    theirs = np.array([box(0, 0, 10, 10), box(0, 0, 10, 6)])
    ours = np.array([box(0, 0, 10, 9, 0.5), box(0, 0, 10, 10, 0.9)])
    assert match(ours, theirs) == 2


def test_suppression_keeps_the_best_of_a_class_and_other_classes():
    boxes = np.array([box(0, 0, 1, 1, 0.5), box(0, 0, 1, 1, 0.9), box(0, 0, 1, 1, 0.4, 1)])
    assert suppress(boxes)[:, 4].tolist() == [0.9, 0.4]
