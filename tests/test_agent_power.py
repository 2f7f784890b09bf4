"""Clocks, throttling and watts from folders that stand for boards; energy against what it must be."""

import ctypes
import math
import time

import board_trees
import pytest
from edgec.backends.agent import clocks, nvml, reading
from edgec.backends.agent.power import Meter, Sensors, compare, energy, total


@pytest.fixture(autouse=True)
def programs(tmp_path, monkeypatch):
    """A PATH with nothing on it but a shell."""
    folder = tmp_path / "bin"
    board_trees.only_programs(monkeypatch, folder)
    return folder


def sensors(tmp_path, files):
    return Sensors(board_trees.plant(tmp_path / "root", files))


# ------------------------------------------------------------------------------------------------ clocks


@pytest.mark.parametrize(
    ("files", "expected", "locked"),
    [
        (
            board_trees.NANO,
            {
                "gpu": {"current": 921.6, "min": 76.8, "max": 921.6, "locked": False},
                "cpu": {"current": 1479, "min": 102, "max": 1479, "locked": False},
            },
            False,
        ),
        (
            board_trees.ORIN_NANO,
            {
                "gpu": {"current": 1020, "min": 1020, "max": 1020, "locked": True},
                "cpu": {"current": 1728, "min": 1728, "max": 1728, "locked": True},
            },
            True,
        ),
        (
            board_trees.THOR,
            {
                "gpu": {"current": 1575, "min": 315, "max": 1575, "locked": False},
                "memory": {"current": 4266, "min": 665.6, "max": 4266, "locked": False},
            },
            False,
        ),
        (
            board_trees.PI_4,
            {"cpu": {"current": 600, "min": 600, "max": 1800, "locked": False}},
            False,
        ),
        (
            board_trees.DESKTOP,
            {
                "cpu 0-1": {"current": 4900, "min": 800, "max": 4900, "locked": False},
                "cpu 2": {"current": 3000, "min": 800, "max": 3600, "locked": False},
            },
            False,
        ),
        ({}, {}, None),
    ],
)
def test_clocks_of_boards(tmp_path, files, expected, locked):
    state = sensors(tmp_path, files).state()
    assert state["clocks"] == expected
    assert state["clocks_locked"] is locked


@pytest.mark.parametrize(
    ("device", "inside", "is_gpu"),
    [
        ("57000000.gpu", None, True),
        ("17000000.gp10b", None, True),
        ("17000000.gv11b", None, True),
        ("17000000.ga10b", None, True),
        ("17000000.gpu", None, True),
        ("gpu-gpc-0", None, True),
        ("gpu-nvd-0", None, False),
        ("bwmgr", None, False),
        ("15340000.vic", None, False),
        ("15340000.vic", "vic", False),
        ("renamed", "ga10b", True),
    ],
)
def test_which_devfreq_device_is_the_gpu(tmp_path, device, inside, is_gpu):
    files = {f"/sys/class/devfreq/{device}/cur_freq": 1000000}
    if inside:
        files[f"/sys/class/devfreq/{device}/device/of_node/name"] = inside + "\0"
    root = board_trees.plant(tmp_path / "root", files)
    assert clocks.gpu_devices(root) == ([f"/sys/class/devfreq/{device}"] if is_gpu else [])


def test_the_memory_clock_is_read_by_root_only(tmp_path):
    one = sensors(tmp_path, board_trees.XAVIER_NX)
    assert "memory" not in one.state()["clocks"]
    assert "only root" in one.unknown["memory clock"]
    debug = "/sys/kernel/debug/bpmp/debug/clk/emc"
    files = {f"{debug}/rate": 1600000000, f"{debug}/min_rate": 204000000, f"{debug}/max_rate": 1866000000}
    one = sensors(tmp_path, files)
    assert one.state()["clocks"]["memory"] == {"current": 1600, "min": 204, "max": 1866, "locked": False}
    files[f"{debug}/rate"] = 1866000000
    assert sensors(tmp_path, files).state()["clocks"]["memory"]["locked"] is True


def test_cores_that_are_offline_have_no_clock(tmp_path):
    files = {**board_trees.NANO, "/sys/devices/system/cpu/cpu4/online": 0}
    assert set(sensors(tmp_path, files).state()["clocks"]) == {"gpu", "cpu"}


# ------------------------------------------------------------------------------------------------ temperatures


def test_temperatures_leave_out_what_is_none(tmp_path):
    assert sensors(tmp_path, board_trees.NANO).state()["temperatures"] == {"CPU": 41.5, "GPU": 40.0}
    off = {**board_trees.ORIN_NANO, "/sys/class/thermal/thermal_zone2/temp": -256000}
    state = Sensors(board_trees.plant(tmp_path / "orin", off)).state()
    assert state["temperatures"] == {"cpu": 48.5, "gpu": 49.0, "tj": 49.0}
    assert state["limits"] == {"cpu": 99.0}


def test_only_passive_trip_points_are_where_throttling_begins(tmp_path):
    zone = "/sys/class/thermal/thermal_zone0"
    files = {f"{zone}/type": "cpu-thermal", f"{zone}/temp": 40000}
    for n, (kind, degrees) in enumerate((("active", 50000), ("critical", 95000))):
        files |= {f"{zone}/trip_point_{n}_type": kind, f"{zone}/trip_point_{n}_temp": degrees}
    assert sensors(tmp_path, files).state()["limits"] == {}
    files |= {f"{zone}/trip_point_2_type": "passive", f"{zone}/trip_point_2_temp": 97000}
    files |= {f"{zone}/trip_point_3_type": "passive", f"{zone}/trip_point_3_temp": 85000}
    assert sensors(tmp_path, files).state()["limits"] == {"cpu": 85.0}


def test_zones_of_one_name_are_told_apart(tmp_path):
    files = {}
    for n, value in enumerate((30000, 40000)):
        files |= {
            f"/sys/class/thermal/thermal_zone{n}/type": "acpitz",
            f"/sys/class/thermal/thermal_zone{n}/temp": value,
        }
    assert sensors(tmp_path, files).state()["temperatures"] == {"acpitz": 30.0, "acpitz 1": 40.0}


# ------------------------------------------------------------------------------------------------ throttling


def test_nothing_that_tells_is_not_the_same_as_no_throttling(tmp_path):
    one = sensors(tmp_path, {})
    state = one.state()
    assert state["throttled"] is None
    assert one.unknown["throttling"]
    assert sensors(tmp_path, board_trees.ORIN_NANO).state()["throttled"] is False


def test_a_fan_is_no_throttling_and_a_balanced_clock_is(tmp_path):
    assert sensors(tmp_path, board_trees.NANO).state()["throttled"] is False  # its fan is at step 3
    files = {"/sys/class/thermal/cooling_device1/cur_state": 4}
    state = sensors(tmp_path, files).state()
    assert state["throttled"] is True
    assert state["reasons"] == ["CPU-balanced at step 4"]


def test_over_current_events_are_counted_since_boot(tmp_path):
    counts = sensors(tmp_path, board_trees.ORIN_NANO).state()["counts"]
    assert counts == {"under-voltage": 0, "average over-current": 2, "instantaneous over-current": 5}
    files = {"/sys/class/hwmon/hwmon9/oc3_throt_en": 0}  # it is counted, and slows nothing
    assert set(sensors(tmp_path, files).state()["counts"]) == {"under-voltage", "average over-current"}


@pytest.mark.parametrize("field", ["clocks_event_reasons.active", "clocks_throttle_reasons.active"])
@pytest.mark.parametrize(
    ("bits", "throttled", "reasons"),
    [
        ("0x0000000000000000", False, []),
        ("0x0000000000000001", False, []),  # idle
        ("0x0000000000000002", False, []),  # clocks that were asked for
        ("0x0000000000000004", True, ["GPU: power limit"]),
        ("0x0000000000000048", True, ["GPU: hardware slowdown", "GPU: thermal slowdown by the hardware"]),
        ("0x00000000000000a0", True, ["GPU: thermal slowdown by the driver", "GPU: power brake"]),
        ("[N/A]", None, []),
    ],
)
def test_a_cards_reasons_by_the_bits_of_nvml(tmp_path, programs, field, bits, throttled, reasons):
    card = {name: value for name, value in board_trees.CARD.items() if name != "clocks_event_reasons.active"}
    board_trees.smi(programs, {**card, field: bits})
    state = sensors(tmp_path, {"/proc/driver/nvidia/version": "x"}).state()
    assert (state["throttled"], state["reasons"]) == (throttled, reasons)


@pytest.mark.parametrize(
    ("bits", "throttled", "reasons", "past"),
    [
        ("0x0", False, [], []),
        ("0x50000", False, [], ["under-voltage", "throttled"]),
        ("0x50005", True, ["under-voltage", "throttled"], ["under-voltage", "throttled"]),
        ("0x80008", True, ["temperature limit"], ["temperature limit"]),
        ("0x20002", True, ["CPU clock capped"], ["CPU clock capped"]),
    ],
)
def test_a_raspberry_pis_bits(tmp_path, programs, bits, throttled, reasons, past):
    script = f'#!/bin/sh\n[ "$1" = get_throttled ] && echo throttled={bits}\n'
    board_trees.program(programs, "vcgencmd", script)
    state = sensors(tmp_path, board_trees.PI_5).state()
    assert (state["throttled"], state["reasons"]) == (throttled, reasons)
    assert [name for name, count in state["counts"].items() if count] == [f"{name} since boot" for name in past]


def test_a_pi_that_may_not_be_asked_still_has_its_alarm(tmp_path, programs):
    board_trees.program(programs, "vcgencmd", "#!/bin/sh\necho 'Can not open device file: /dev/vcio'\nexit 255\n")
    one = sensors(tmp_path, {**board_trees.PI_5, "/sys/class/hwmon/hwmon2/in0_lcrit_alarm": 1})
    state = one.state()
    assert (state["throttled"], state["reasons"]) == (True, ["under-voltage"])
    assert "/dev/vcio" in one.unknown["throttling"]


# ------------------------------------------------------------------------------------------------ watts


@pytest.mark.parametrize(
    ("files", "rails", "expected"),
    [
        (board_trees.NANO, {"POM_5V_IN": 5.1, "POM_5V_GPU": 1.2, "POM_5V_CPU": 0.9}, ("POM_5V_IN", 5.1)),
        (board_trees.XAVIER_NX, {"VDD_IN": 5.0, "VDD_CPU_GPU_CV": 1.5, "VDD_SOC": 1.0}, ("VDD_IN", 5.0)),
        (
            board_trees.AGX_ORIN,
            {"VDD_GPU_SOC": 4.0, "VDD_CPU_CV": 1.0, "VIN_SYS_5V0": 5.0, "VDDQ_VDD2_1V8AO": 0.5},
            ("sum of VDDQ_VDD2_1V8AO, VDD_CPU_CV, VDD_GPU_SOC, VIN_SYS_5V0", 10.5),
        ),
        (
            board_trees.THOR,
            {"VIN": 41.5, "VDD_GPU": 12.0, "VDD_CPU_SOC_MSS": 6.0, "VIN_SYS_5V0": 5.0},
            ("VIN", 41.5),
        ),
    ],
)
def test_watts_by_rail_and_which_is_the_total(tmp_path, files, rails, expected):
    watts = sensors(tmp_path, files).watts()
    assert watts == pytest.approx(rails)
    name, value = total(watts)
    assert (name, pytest.approx(value)) == expected


@pytest.mark.parametrize("files", [board_trees.PI_4, board_trees.PI_5, {}])
def test_a_device_without_a_sensor_says_so(tmp_path, files):
    one = sensors(tmp_path, files)
    assert one.watts() is None
    assert one.unknown["watts"]
    meter = Meter(one)
    meter.start()
    assert meter.stop() is None


def test_a_rail_that_fails_is_left_out(tmp_path):
    one = sensors(tmp_path, board_trees.XAVIER_NX)
    (tmp_path / "root/sys/class/hwmon/hwmon3/curr1_input").write_text("")
    assert set(one.watts()) == {"VDD_CPU_GPU_CV", "VDD_SOC"}


class Card:
    """NVML's library with so many cards; a call with other arguments than nvml.h has it raises."""

    def __init__(self, names=("NVIDIA GeForce RTX 4090",), milliwatts=(123456,), code=0):
        self.names, self.milliwatts, self.code = names, milliwatts, code
        self.ready = False

    def nvmlInit_v2(self):
        self.ready = True
        return self.code

    def nvmlDeviceGetCount_v2(self, count):
        assert self.ready
        count._obj.value = len(self.names)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, handle):
        assert isinstance(index, ctypes.c_uint)
        assert isinstance(handle._obj, ctypes.c_void_p)
        handle._obj.value = 1000 + index.value
        return 0

    def nvmlDeviceGetName(self, handle, buffer, length):
        assert length.value == len(buffer) >= 96
        buffer.value = self.names[handle.value - 1000].encode()
        return 0

    def nvmlDeviceGetPowerUsage(self, handle, milliwatts):
        assert isinstance(milliwatts._obj, ctypes.c_uint)
        value = self.milliwatts[handle.value - 1000]
        milliwatts._obj.value = value or 0
        return 0 if value is not None else 3  # NVML_ERROR_NOT_SUPPORTED


def test_a_card_tells_its_watts_by_nvml(tmp_path, monkeypatch):
    monkeypatch.setattr(nvml, "_library", Card)
    assert sensors(tmp_path, {}).watts() == {"NVIDIA GeForce RTX 4090": 123.456}
    # a board's own sensor holds more than its GPU
    assert set(Sensors(board_trees.plant(tmp_path / "thor", board_trees.THOR)).watts()) > {"VIN"}


@pytest.mark.parametrize(
    ("card", "words"),
    [
        (Card(code=9), "does not start"),
        (Card(names=()), "no card"),
        (Card(milliwatts=(None,)), "RTX 4090 tells no watts"),
        (Card(("A", "B"), (1000, 2000)), "CUDA_DEVICE_ORDER"),
    ],
)
def test_why_a_card_tells_no_watts(tmp_path, monkeypatch, card, words):
    monkeypatch.setattr(nvml, "_library", lambda: card)
    one = sensors(tmp_path, {})
    assert one.watts() is None
    assert words in one.unknown["watts"]


@pytest.mark.parametrize(
    ("names", "environment", "index"),
    [
        (["A"], {}, 0),
        (["A", "A"], {}, 0),
        (["A", "A"], {"CUDA_VISIBLE_DEVICES": "1"}, 1),
        (["A", "B"], {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "1,0"}, 1),
        (["A", "B"], {"CUDA_VISIBLE_DEVICES": "1"}, None),
        (["A", "A"], {"CUDA_VISIBLE_DEVICES": "GPU-8f1e"}, None),
        (["A", "A"], {"CUDA_VISIBLE_DEVICES": "2"}, None),
    ],
)
def test_which_card_cuda_uses(monkeypatch, names, environment, index):
    for name in ("CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if index is not None:
        assert nvml.first(names) == index
        return
    with pytest.raises(reading.Unread, match="CUDA_"):
        nvml.first(names)


# ------------------------------------------------------------------------------------------------ energy


def samples(function, seconds, count):
    times = [seconds * n / (count - 1) for n in range(count)]
    return [(at, {"VDD_IN": function(at)}) for at in times]


def test_energy_of_a_constant_and_of_a_ramp_is_exact():
    constant = energy(samples(lambda at: 7.5, 2.0, 41))
    assert (constant.joules, constant.mean_watts) == (pytest.approx(15.0, rel=1e-12), pytest.approx(7.5, rel=1e-12))
    ramp = energy(samples(lambda at: 5 + 3 * at, 2.0, 7))
    assert ramp.joules == pytest.approx(16.0, rel=1e-12)
    assert (ramp.seconds, ramp.samples, ramp.rail) == (2.0, 7, "VDD_IN")


def test_energy_converges_with_the_square_of_the_period():
    """A trapezoid's error falls to a quarter when the period halves; of a rectangle's it is a half."""
    exact = 10 - (math.cos(6.0) - 1) * 4 / 3

    def wave(at):
        return 5 + 4 * math.sin(3 * at)

    errors = [abs(energy(samples(wave, 2.0, n)).joules - exact) for n in (21, 41, 81)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.05)


def test_uneven_periods_are_weighted():
    found = energy([(0.0, {"x": 10.0}), (1.0, {"x": 10.0}), (1.1, {"x": 30.0}), (1.2, {"x": 10.0})])
    assert found.joules == pytest.approx(10 + 2 + 2)
    assert found.mean_watts == pytest.approx(14 / 1.2)


@pytest.mark.parametrize("some", [[], [(0.0, {"x": 1.0})], [(1.0, {"x": 1.0}), (1.0, {"x": 2.0})]])
def test_too_few_samples_are_no_energy(some):
    assert energy(some) is None


def test_samples_without_one_of_the_rails_do_not_lower_the_sum():
    whole = [(at, {"A": 4.0, "B": 6.0}) for at in (0.0, 1.0, 2.0)]
    holed = [*whole[:1], (0.5, {"A": 4.0}), *whole[1:]]
    assert energy(holed).joules == energy(whole).joules == pytest.approx(20.0)
    assert energy(holed).samples == 3


def test_the_meter_samples_while_something_runs():
    class Stepping(Sensors):
        """10 W for the first half, 30 W after it."""

        def __init__(self):
            super().__init__("/nonexistent")
            self.start = time.perf_counter()

        def watts(self):
            return {"VDD_IN": 10.0 if time.perf_counter() - self.start < 0.3 else 30.0}

    one = Stepping()
    meter = Meter(one, period=0.01)
    meter.start()
    time.sleep(0.6)
    found = meter.stop()
    assert found.samples > 10
    assert found.seconds == pytest.approx(0.6, abs=0.1)
    expected = 10.0 * 0.3 + 30.0 * (found.seconds - 0.3)
    assert found.joules == pytest.approx(expected, rel=0.2)
    assert meter.stop() is None
    meter.start()  # again, from nothing
    assert meter.stop().seconds < 0.2


def test_the_meter_measures_a_board(tmp_path):
    meter = Meter(sensors(tmp_path, board_trees.ORIN_NANO))
    meter.start()
    time.sleep(0.2)
    found = meter.stop()
    assert found.mean_watts == pytest.approx(6.0)
    assert found.joules == pytest.approx(6.0 * found.seconds)
    assert found.rail == "VDD_IN"


# ------------------------------------------------------------------------------------------------ before and after


def state(**changes):
    clock = {"current": 1000.0, "min": 1000.0, "max": 1000.0, "locked": True}
    base = {
        "clocks": {"gpu": clock}, "temperatures": {"gpu": 50.0}, "limits": {"gpu": 90.0},
        "throttled": False, "reasons": [], "counts": {"under-voltage": 1}, "power_mode": "15W",
    }  # fmt: skip
    return {**base, **changes}


def test_two_equal_states_have_nothing_to_say():
    assert compare(state(), state()) == []
    assert compare({}, {}) == []
    assert compare({}, state()) == []


@pytest.mark.parametrize(("now", "said"), [(1000, False), (970, False), (969, True), (500, True), (1100, False)])
def test_a_clock_that_falls_by_more_than_three_percent_is_said(now, said):
    after = state(clocks={"gpu": {"current": float(now), "min": 1000.0, "max": 1000.0, "locked": True}})
    expected = [f"the gpu clock fell from 1000 to {now} MHz during the run"] if said else []
    assert compare(state(), after) == expected


def test_a_clock_that_is_not_locked_may_fall_by_itself():
    loose = {"current": 1000.0, "min": 300.0, "max": 1000.0, "locked": False}
    (said,) = compare(state(clocks={"gpu": loose}), state(clocks={"gpu": {**loose, "current": 300.0}}))
    assert said.endswith("; it is not locked, so latencies vary with it")


def test_a_limit_that_falls_is_said_instead_of_the_clock():
    after = {"current": 600.0, "min": 600.0, "max": 600.0, "locked": True}
    assert compare(state(), state(clocks={"gpu": after})) == [
        "the limit of the gpu clock fell from 1000 to 600 MHz during the run"
    ]


@pytest.mark.parametrize(
    ("before", "now", "limits", "said"),
    [
        (50.0, 89.9, {"gpu": 90.0}, []),
        (50.0, 90.0, {"gpu": 90.0}, ["gpu rose from 50 to 90 degrees Celsius, past 90, where throttling begins"]),
        (91.0, 95.0, {"gpu": 90.0}, []),  # it was there before
        (50.0, 81.0, {}, ["gpu rose from 50 to 81 degrees Celsius, past 80, which is hot"]),
        (None, 81.0, {}, ["gpu rose to 81 degrees Celsius, past 80, which is hot"]),
    ],
)
def test_a_temperature_that_passes_its_limit_is_said(before, now, limits, said):
    first = {} if before is None else {"gpu": before}
    assert compare(state(temperatures=first, limits=limits), state(temperatures={"gpu": now}, limits=limits)) == said


def test_throttling_during_the_run_is_said():
    assert compare(state(), state(counts={"under-voltage": 3})) == ["throttled during the run: under-voltage, 2 events"]
    assert compare(state(), state(counts={"under-voltage": 2})) == ["throttled during the run: under-voltage, 1 event"]
    assert compare(state(), state(counts={"under-voltage": 0})) == []  # restarted, or another counter
    assert compare(state(), state(throttled=True, reasons=["GPU: power limit"])) == [
        "throttled after the run: GPU: power limit"
    ]


def test_another_power_mode_is_said():
    assert compare(state(), state(power_mode="7W")) == ["the power mode changed from 15W to 7W during the run"]
    assert compare(state(), state(power_mode=None)) == []


def test_boards_before_and_after(tmp_path):
    """As a job does it: the counters of a real tree move, its clock is cut."""
    one = sensors(tmp_path, board_trees.ORIN_NANO)
    before = one.state()
    changed = {
        "/sys/class/hwmon/hwmon9/oc3_event_cnt": 9,
        "/sys/class/devfreq/17000000.gpu/cur_freq": 510000000,
        "/sys/class/thermal/thermal_zone0/temp": 99500,
        "/sys/class/thermal/cooling_device0/cur_state": 1,
    }
    board_trees.plant(tmp_path / "root", changed)
    assert compare(before, one.state()) == [
        "the gpu clock fell from 1020 to 510 MHz during the run",
        "cpu rose from 48.5 to 99.5 degrees Celsius, past 99, where throttling begins",
        "throttled during the run: instantaneous over-current, 4 events",
        "throttled after the run: cpu-throttle-alert at step 1",
    ]
