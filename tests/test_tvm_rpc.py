"""Boards behind a TVM tracker: URLs and the protocol without TVM; with it, compiles on a farm of one machine."""

import functools
import json
import os
import shutil
import signal
import socket
import threading
import time
from pathlib import Path
from unittest.mock import patch

import boards
import numpy as np
import onnxruntime as ort
import pytest
from conftest import classifier
from edgec.backends import targets
from edgec.backends.base import load
from edgec.backends.targets import rpc, timing, tracker
from edgec.backends.targets.local import LocalTarget
from edgec.backends.tvm.remote import Remote
from edgec.compiler import api, doctor
from edgec.compiler.errors import UnavailableError, UserError

missing = load("tvm").unavailable()
installed = pytest.mark.skipif(missing is not None, reason='needs pip install "edgec[tvm]"')


# ------------------------------------------------------------------------------------------- URLs


@pytest.mark.parametrize(
    ("url", "address", "key"),
    [
        ("rpc://127.0.0.1:9190/pi", "127.0.0.1:9190", "pi"),
        ("rpc://farm.local:9190/raspberry-pi-5/", "farm.local:9190", "raspberry-pi-5"),
        ("rpc://[::1]:9190/pi", "[::1]:9190", "pi"),
        ("rpc://farm:1", "farm:1", None),
    ],
)
def test_a_url_is_a_tracker_and_a_key(url, address, key):
    found, named = rpc.parsed(url)
    assert (str(found), named) == (address, key)
    if key is not None:
        assert targets.of(url).url == url.rstrip("/")


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("rpc://farm/pi", "host or port is missing"),
        ("rpc://:9190/pi", "host or port is missing"),
        ("rpc:/farm:9190/pi", "not an rpc:// URL"),
        ("rpc://farm:port/pi", "not understood"),
        ("rpc://farm:99999/pi", "not understood"),
        ("rpc://[::1:9190/pi", "not understood"),
        ("rpc://farm:9190/a/b", "'a/b' is no key"),
        ("rpc://farm:9190/a:b", "'a:b' is no key"),
        ("rpc://me@farm:9190/pi", "more in it"),
        ("rpc://farm:9190/pi?x=1", "more in it"),
        ("rpc://farm:9190", "key of the boards is missing"),
    ],
)
def test_a_url_that_is_none_is_explained(url, why):
    with pytest.raises(UserError, match=why.replace("'", ".")) as caught:
        targets.of(url)
    assert caught.value.exit_code == 2 and url in caught.value.where and "rpc://192" in caught.value.fix


def test_other_targets():
    assert isinstance(targets.of("local"), LocalTarget)
    with pytest.raises(UserError, match="no such kind of target"):
        targets.of("telnet://pi@board")


# ------------------------------------------------------------------------------------------- trackers


def test_a_tracker_that_is_not_there():
    port = boards.free_port()
    with pytest.raises(UnavailableError, match="no RPC tracker answers") as caught:
        tracker.Tracker("127.0.0.1", port).boards()
    assert caught.value.where == f"rpc://127.0.0.1:{port}" and "rpc_tracker" in caught.value.fix
    (found,) = doctor.examine(f"rpc://127.0.0.1:{port}")
    assert found.status == "missing" and "no RPC tracker answers" in found.detail


def test_what_is_no_tracker():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=lambda: listener.accept()[0].close(), daemon=True).start()
        with pytest.raises(UnavailableError, match="no RPC tracker") as caught:
            tracker.Tracker("127.0.0.1", listener.getsockname()[1]).boards()
    assert "not a server's" in caught.value.fix


def test_doctor_lists_the_boards():
    with boards.pretended({"pi": [9090, 9091], "rock": [9092]}) as port:
        head, pi, rock = doctor.examine(f"rpc://127.0.0.1:{port}")
        _, only = doctor.examine(f"rpc://127.0.0.1:{port}/rock")
        _, absent = doctor.examine(f"rpc://127.0.0.1:{port}/jetson")
    assert head.status == "ok" and "pi, rock" in head.detail
    assert pi.detail.startswith("2 connected, 1 free, 1 busy, 2 waiting for one (10.0.0.1:9090, 10.0.0.1:9091)")
    assert rock.name == only.name == "rock"
    assert absent.status == "missing" and "there are: pi, rock" in absent.detail


def test_a_board_is_waited_for_as_long_as_somebody_serves_its_key(monkeypatch):
    told = []
    lends = []
    with boards.pretended({"pi": [9090]}, lends) as port:
        threading.Timer(1.3, lambda: lends.append(["10.0.0.1", 9090, "pi:0.5"])).start()
        found = tracker.Tracker("127.0.0.1", port).borrow("pi", lambda *said: told.append(said))
    assert found == tracker.Lent("10.0.0.1", 9090, "pi:0.5")
    assert told and all(said == ("waiting for a board", 1, None) for said in told[:1])
    monkeypatch.setattr(tracker, "_GONE", 0.5)
    with boards.pretended({"pi": [9090]}) as port, pytest.raises(UnavailableError, match="there are: pi"):
        tracker.Tracker("127.0.0.1", port).borrow("rock")


def test_a_key_that_nobody_serves_is_refused_before_any_work(tmp_path, tiny):
    with boards.pretended({"rock": [9090]}) as port, pytest.raises(UnavailableError) as caught:
        api.compile(tiny / "model.onnx", tmp_path / "out", target=f"rpc://127.0.0.1:{port}/pi")
    assert caught.value is missing or missing is not None or "there are: rock" in caught.value.what
    assert caught.value.exit_code == 4 and not (tmp_path / "out").exists()


def test_what_does_not_run_on_boards(tmp_path, tiny):
    url = "rpc://127.0.0.1:9190/pi"
    with pytest.raises(UserError, match="no ONNX Runtime"):
        api.compile(tiny / "model.onnx", tmp_path / "out", target=url, backend="ort")
    with boards.pretended({"pi": [9090]}) as port, pytest.raises(UserError, match="cannot run there as it is"):
        api.bench(tiny / "model.onnx", target=f"rpc://127.0.0.1:{port}/pi")
    with boards.pretended({"pi": [9090]}) as port, pytest.raises(UnavailableError, match="there are: pi"):
        api.bench(tiny / "model.onnx", target=f"rpc://127.0.0.1:{port}/rock")


def test_a_board_that_the_tracker_knows_but_nobody_reaches():
    closed = ["127.0.0.1", boards.free_port(), "pi:0.5"]
    with boards.pretended({"pi": [9090]}, [closed]) as port, pytest.raises(UnavailableError) as caught:
        targets.of(f"rpc://127.0.0.1:{port}/pi").board.borrowed(60)
    assert "out of reach, 4 times" in caught.value.what and "--custom-addr" in caught.value.what


def test_the_command_line_ends_with_words(edgec, tmp_path, tiny):
    url = f"rpc://127.0.0.1:{boards.free_port()}/pi"
    done = edgec("compile", tiny / "model.onnx", "-o", tmp_path / "out", "--target", url)
    assert done.returncode == 4 and "Traceback" not in done.stderr and "fix:" in done.stderr
    done = edgec("doctor", "--target", url)
    assert done.returncode == 0 and "no RPC tracker answers" in done.stdout.replace("\n", " ")


# ------------------------------------------------------------------------------------------- with TVM


@pytest.fixture(scope="module")
def farm():
    """A tracker, and one board with the key `pi`."""
    with boards.Farm() as found:
        found.serve("pi")
        yield found


@pytest.fixture(scope="module")
def compiled(farm, tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("compiled") / "out"
    return out, compile_there(tiny, out, farm.url("pi"), tune=2)


def compile_there(tiny, out, url, **options):
    with patch.object(timing, "in_turn", functools.partial(timing.in_turn, max_rounds=60)):
        return api.compile(tiny / "model.onnx", out, precision="fp32", target=url, threads=1, **options)


@installed
def test_a_compile_is_tuned_measured_and_proven_on_a_board(farm, tiny, compiled):
    out, report = compiled
    url = farm.url("pi")
    assert report.backend == "tvm" and report.target == url
    result = report.result
    assert result.target == url and result.median_ms > 0 and result.runs >= 50 and result.provider == "TVM, llvm"
    assert report.original.median_ms is None and "ONNX Runtime" in report.original.reason
    assert json.loads((out / "model.so.json").read_text())["schedules tried"] > 0
    page = (out / "report.html").read_text()
    assert url in page
    x = np.random.default_rng(0).normal(size=(3, 3, 16, 16)).astype(np.float32)
    expected = ort.InferenceSession(tiny / "model.onnx").run(None, {"image": x})[0]
    here = api.open_bundle(out).run({"image": x})["logits"]
    there = targets.of(url).open(load("tvm"), load_artifact(out), 1).run({"image": x})["logits"]
    for found in (here, there):
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def load_artifact(out):
    from edgec.compiler import bundle

    return bundle.artifact_of(out, bundle.read_manifest(out))


@installed
def test_a_bundle_is_measured_on_a_board(farm, compiled, tmp_path):
    out, _ = compiled
    other = shutil.copytree(out, tmp_path / "other")
    found, baseline = api.bench(out, against=other, target=farm.url("pi"), seconds=0.1)
    assert found.target == baseline.target == farm.url("pi") and found.runs == baseline.runs >= 50
    assert found.speedup_low is not None and baseline.speedup is None and found.threads >= 1


@installed
def test_objects_are_linked_on_the_board(farm, tiny, tmp_path, monkeypatch):
    """As for a processor whose linker is not here."""
    from edgec.backends.tvm import exporting

    monkeypatch.setattr(exporting.devices, "machine_arch", lambda: "another")
    compile_there(tiny, tmp_path / "out", farm.url("pi"), tune=0)
    assert (tmp_path / "out" / "model.tar").is_file()
    (found,) = api.bench(tmp_path / "out", target=farm.url("pi"), seconds=0.1)
    assert found.median_ms > 0


@installed
def test_two_compiles_share_one_board(farm, tiny, tmp_path, edgec):
    """One here and one as a process: TVM compiles once at a time in a process."""
    others = []
    asked = (tiny / "model.onnx", "-o", tmp_path / "other", "--target", farm.url("pi"), "--tune", 1, "--threads", 1)
    thread = threading.Thread(target=lambda: others.append(edgec("compile", *asked, "--json")))
    thread.start()
    mine = [compile_there(tiny, tmp_path / f"mine{i}", farm.url("pi"), tune=1) for i in range(2)]
    thread.join()
    assert all(report.result.median_ms > 0 for report in mine)
    assert others[0].returncode == 0, others[0].stderr
    assert json.loads(others[0].stdout)["result"]["target"] == farm.url("pi")
    assert tracker.Tracker("127.0.0.1", farm.port).boards()["pi"].waiting == 0


@installed
def test_a_busy_board_is_waited_for(farm, compiled):
    out, _ = compiled
    told = []
    with boards.held(farm.url("pi")) as held:
        threading.Timer(1.5, held.close).start()
        (found,) = api.bench(out, target=farm.url("pi"), seconds=0.1, progress=lambda *said: told.append(said))
    assert ("waiting for a board", 1, None) in told and found.median_ms > 0


@installed
def test_the_board_is_given_back(farm, compiled):
    there = tracker.Tracker("127.0.0.1", farm.port)
    end = time.monotonic() + 5
    while there.boards()["pi"].free != 1 and time.monotonic() < end:
        time.sleep(0.05)
    assert there.boards()["pi"].free == 1


@installed
def test_another_board_goes_on_where_one_dies(farm, tiny, tmp_path):
    """A server that loses its session's process ends: the other one has to do."""
    first, second = farm.serve("pair"), farm.serve("pair")
    done = threading.Event()

    def kill():
        while not done.is_set():
            session = next((s for one in (first, second) for s in children(one.pid)), None)
            if session is not None:
                time.sleep(0.1)
                os.kill(session, 9)
                return
            time.sleep(0.01)

    thread = threading.Thread(target=kill)
    thread.start()
    report = compile_there(tiny, tmp_path / "out", farm.url("pair"), tune=1)
    done.set()
    thread.join()
    assert report.result.median_ms is not None
    assert sum(one.poll() is not None for one in (first, second)) == 1


def children(pid):
    """Return the processes that a process has started."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(one) for one in task.read_text().split()]
        except OSError:
            continue
    return found


# ---------------------------------------------------------------------------------- schedules that do harm


def faulty(kind):
    """Return a function that reads where there is no memory, or takes hours."""
    from tvm import te

    x = te.placeholder((4,), "float32", name="x")
    if kind == "crashes":
        y = te.compute((4,), lambda i: x[i + 2**44], name="y")
    else:
        k = te.reduce_axis((0, 2**60), name="k")
        y = te.compute((4,), lambda i: te.sum(te.sin(x[i] + k.astype("float32")), axis=k), name="y")
    return te.create_prim_func([x, y])


def sane():
    from tvm import te

    x = te.placeholder((4,), "float32", name="x")
    return te.create_prim_func([x, te.compute((4,), lambda i: x[i] + 1, name="y")])


def watch(url):
    from edgec.backends.tvm import clock
    from edgec.backends.tvm import targets as tvm_targets
    from edgec.compiler import devices

    target = tvm_targets.target_of(devices.find("local"), 1)
    return clock.There(target, 1, targets.of(url).board)


@installed
def test_a_schedule_that_kills_its_server_is_fatal_and_the_next_goes_on(farm, monkeypatch):
    from edgec.backends.tvm import clock

    monkeypatch.setattr(tracker, "_GONE", 1.0)
    farm.serve("weak"), farm.serve("weak")
    with watch(farm.url("weak")) as there:
        assert there.seconds(sane()) < 1
        with pytest.raises(clock.Fatal, match="hung up"):
            there.seconds(faulty("crashes"))
        assert there.seconds(sane()) < 1
        with pytest.raises(clock.Fatal, match="hung up"):
            there.seconds(faulty("crashes"))
        with pytest.raises(UnavailableError, match="no board is connected with the key 'weak'"):
            there.seconds(sane())


@installed
def test_a_schedule_that_never_ends_is_ended_with_its_session(farm, monkeypatch):
    from edgec.backends.tvm import clock

    monkeypatch.setattr(clock, "_SESSION", 1)
    with watch(farm.url("pi")) as there:
        with pytest.raises(clock.Fatal):
            there.seconds(faulty("hangs"))
        assert there.seconds(sane()) < 1


@installed
def test_a_board_that_does_not_answer_is_given_up(farm, compiled, monkeypatch):
    """A process that is stopped neither answers nor hangs up, as a board whose cable was pulled."""
    from edgec.backends.tvm.board import Lost, Session

    out, _ = compiled
    server = farm.serve("frozen")
    board = targets.of(farm.url("frozen")).board
    session = board.borrowed(60)
    (process,) = children(server.pid)
    module = Remote(out / "model.so", board, 1).on(session)
    x = np.zeros((1, 3, 16, 16), np.float32)
    assert module.run([x])
    os.kill(process, signal.SIGSTOP)
    monkeypatch.setattr(Session.call, "__defaults__", (0.3,))
    start = time.monotonic()
    with pytest.raises(Lost, match="does not answer"):
        module.run([x])
    session.close()
    del module  # freed on the board, were it there
    assert time.monotonic() - start < 5


@installed
def test_a_board_that_is_lost_too_often_ends_the_compile(farm, monkeypatch):
    from edgec.backends.tvm.board import Lost

    board = targets.of(farm.url("pi")).board
    tried = []

    def work(session):
        tried.append(session)
        raise Lost("its server hung up")

    with pytest.raises(UnavailableError, match="lost, or out of reach, 4 times; the last time: its server hung up"):
        board.use(10, work)
    assert len(tried) == 4


@installed
def test_what_took_a_board_down_is_not_tried_again(tmp_path):
    from edgec.backends.tvm import clock, network, records, tuning
    from edgec.backends.tvm import targets as tvm_targets
    from edgec.compiler import devices
    from edgec.compiler import model as model_io

    path = tmp_path / "model.onnx"
    path.write_bytes(classifier().SerializeToString())
    target = tvm_targets.target_of(devices.find("local"), 1)
    net = network.prepared(path, model_io.input_specs(model_io.load(path)), target)
    book = records.Records(target, tmp_path / "records.sqlite")
    asked = []

    class Grave:
        def seconds(self, body, repeats=5, *, safe=True):
            asked.append(body)
            raise clock.Fatal("its server hung up")

    first = tuning.tune(net, book, Grave(), 1.0)
    assert asked and first.failed >= len(asked) and first.trials == 0
    untried = [t.function.name for t in first.tasks if len(t.tried) < len(t.function.space.choices())]
    assert set(first.choices) >= set(untried)
    again = tuning.tune(net, book, None, 0.0)
    assert sum(len(t.tried) for t in again.tasks) == len(asked)
