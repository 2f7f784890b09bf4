"""Which layers to leave in float for an engine to build: found by name, by bisection, or not at all."""

import pytest
from edgec.backends.targets.device import Refused
from edgec.compiler.buildable import MOST_BUILDS, search

NAMES = [f"conv{n}" for n in range(40)]


class Builder:
    """Builds unless one of the culprits is quantized; names them where it is told to, one at a time."""

    def __init__(self, culprits, *, names_them=False, hopeless=False):
        self.culprits, self.names_them, self.hopeless, self.builds = set(culprits), names_them, hopeless, 0

    def __call__(self, in_float):
        self.builds += 1
        left = sorted(self.culprits - set(in_float))
        if not left and not self.hopeless:
            return None
        return Refused({"what": "no implementation", "nodes": left[:1] if self.names_them else []})


def test_what_the_failure_names_is_tried_first_and_alone():
    builder = Builder({"conv3", "conv17"}, names_them=True)
    found = search(NAMES, builder, ["conv17"])
    assert set(found.culprits) == {"conv3", "conv17"} and found.builds == builder.builds == 2


@pytest.mark.parametrize("culprits", [{"conv0"}, {"conv39"}, {"conv12"}, {"conv5", "conv6"}, {"conv1", "conv20"}])
def test_culprits_that_nobody_names_are_found_by_bisection_and_no_others(culprits):
    builder = Builder(culprits)
    found = search(NAMES, builder, [])
    assert set(found.culprits) == culprits and found.builds == builder.builds <= MOST_BUILDS


def test_a_wrong_name_does_not_end_the_search():
    found = search(NAMES, Builder({"conv7"}), ["conv30"])
    assert "conv7" in found.culprits


def test_a_build_that_fails_without_any_integers_is_given_up_at_once():
    builder = Builder(set(), hopeless=True)
    assert search(NAMES, builder, []).culprits is None and builder.builds == 1


def test_more_culprits_than_builds_are_given_up():
    builder = Builder(set(NAMES))
    found = search(NAMES, builder, [])
    assert found.culprits is None and builder.builds <= MOST_BUILDS + 1
