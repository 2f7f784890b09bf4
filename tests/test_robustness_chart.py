"""The chart of several models under several conditions: whole, to scale, readable as XML."""

import re
import xml.etree.ElementTree as ET

import pytest
from edgec.compiler.report.robustness_chart import Series, differences, dots, figures
from edgec.compiler.types import Difference, Fidelity, Robustness, UnderCondition


def marks(text):
    """Return (title, x in percent, y) of each mark."""
    return [
        (m.find("title").text, float(m.get("x").rstrip("%")), float(m.get("y")))
        for m in ET.fromstring(text).iter("svg")
        if m.get("x")
    ]


def test_marks_lie_where_their_values_are():
    found = marks(dots("t", ["clean", "noise"], [Series("FP32", [0.0, 50.0]), Series("INT8", [None, 100.0])], "%"))
    assert [x for _, x, _ in found] == [0.0, 50.0, 100.0]
    assert found[2][0] == "INT8, noise: 100.00 %"
    fp32, int8 = (y for name, _, y in found if "noise" in name)
    assert 0 < int8 - fp32 < 20  # lanes of one row


def test_whiskers_reach_from_end_to_end_and_zero_is_marked():
    text = dots("t", ["clean"], [Series("INT8", [0.0], [-1.0], [1.0])], "points")
    whisker = next(
        line for line in ET.fromstring(text).iter("line") if line.get("class") == "whisker" and line.get("x2") != "0"
    )
    assert (whisker.get("x1"), whisker.get("x2")) == ("0.00%", "100.00%")
    assert 'class="limit"' in text
    assert "(-1.00 to 1.00)" in text


def test_all_alike_or_nothing_at_all_is_still_a_chart():
    assert len(marks(dots("t", ["a", "b"], [Series("x", [0.0, 0.0])], "%"))) == 2
    assert marks(dots("t", ["a"], [Series("x", [None])], "%")) == []


def test_a_model_keeps_its_mark_where_the_reference_is_left_out():
    models = [Series("clean", [1.0]), Series("mixed", [1.0]), Series("minimax", [1.0])]

    def shapes(text):
        return {m.find("title").text: m[1].tag for m in ET.fromstring(text).iter("svg") if m.get("x")}

    alone = shapes(dots("t", ["c"], models, "%"))
    beside = shapes(dots("t", ["c"], [Series("FP32", [2.0], reference=True), *models], "%"))
    assert beside == {"FP32, c: 2.00 %": "line", **alone}
    assert list(alone.values()) == ["circle", "rect", "circle"]


def test_names_are_text():
    text = dots("<t>", ["a&b"], [Series("<i>", [1.0])], "%")
    assert "<i>" not in text
    ET.fromstring(text)


def robust(values):
    conditions = {}
    for i, value in enumerate(values):
        fidelity = Fidelity("top1", 10, 80.0, value, 80.0 - value, 0.0, 1.0)
        original = Fidelity("top1", 10, 90.0, 80.0, 10.0, 9.0, 11.0)
        d = Difference(80.0 - value, 79 - value, 81 - value, "points", 0.5, 10, 6, "worse")
        conditions[f"c{i}"] = UnderCondition(fidelity, original, d)
    return Robustness("top1", 10, 0, conditions)


@pytest.mark.parametrize(("draw", "count"), [(figures, 6), (differences, 4)])
def test_of_what_eval_found(draw, count):
    found = marks(draw({"clean": robust([70.0, 60.0]), "minimax": robust([71.0, 65.0])}))
    assert len(found) == count
    assert any(re.match(r"minimax, c1: (65|15)\.00", title) for title, _, _ in found)
