import pytest
from edgec.compiler.errors import UserError
from edgec.compiler.options import parse_bytes, parse_milliseconds, parse_points, parse_seconds, parse_steps


@pytest.mark.parametrize(("text", "points"), [("1%", 1.0), ("0.5", 0.5), (" 2 % ", 2.0), (".25%", 0.25)])
def test_points(text, points):
    assert parse_points(text) == points


@pytest.mark.parametrize(("text", "ms"), [("5ms", 5.0), ("800us", 0.8), ("0.1s", 100.0)])
def test_milliseconds(text, ms):
    assert parse_milliseconds(text) == pytest.approx(ms)


@pytest.mark.parametrize(("text", "size"), [("4MB", 4_000_000), ("2MiB", 2 * 2**20), ("300kb", 300_000), ("7B", 7)])
def test_bytes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(("text", "seconds"), [("60", 60.0), ("60s", 60.0), ("2min", 120.0), ("1.5 h", 5400.0)])
def test_seconds(text, seconds):
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("", ()),
        ("equalize", ("equalize",)),
        ("rounding, equalize,rounding", ("rounding", "equalize")),
    ],
)
def test_steps(text, steps):
    assert parse_steps(text) == steps


def test_a_step_that_is_none_is_answered_with_those_that_are():
    with pytest.raises(UserError, match="no step of quantization is called 'equalise'") as caught:
        parse_steps("rounding,equalise")
    assert "equalize, " in caught.value.fix and caught.value.where == "--without"


@pytest.mark.parametrize("parse", [parse_points, parse_milliseconds, parse_bytes, parse_seconds])
@pytest.mark.parametrize("text", ["banana", "", "-1%", "1 furlong", "nan", "1e3e3"])
def test_nonsense_says_how_to_write_it(parse, text):
    with pytest.raises(UserError, match="write it like"):
        parse(text)
