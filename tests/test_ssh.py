"""A device over SSH: a real sshd on loopback, and everything that can go wrong between here and there."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import sshd
from conftest import classifier
from edgec.backends import base, targets
from edgec.backends.targets import device as devices_session
from edgec.backends.targets import link as links
from edgec.backends.targets import on_device, ssh
from edgec.compiler import devices
from edgec.compiler.errors import UnavailableError, UserError

needs_sshd = pytest.mark.skipif(sshd.MISSING is not None, reason=str(sshd.MISSING))


@pytest.fixture
def server(tmp_path, monkeypatch):
    """An sshd, and the client told to use its configuration; nothing may be left on it at the end."""
    with _served(tmp_path, monkeypatch) as one:
        yield one
        assert one.gone(), one.left()


def _served(tmp_path, monkeypatch, **how):
    folder = tmp_path / "device"
    folder.mkdir()
    running = sshd.running(folder, **how)
    monkeypatch.setenv("EDGEC_SSH", f"ssh -F {folder / 'ssh_config'}")
    # a shared connection would outlive the server by a minute, and hide that the next one cannot be made
    monkeypatch.setattr(ssh, "_socket_folder", lambda: None)
    return running


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A classifier as ONNX Runtime's artifact, and an input of it."""
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    large = classifier()
    for dim, size in zip(large.graph.input[0].type.tensor_type.shape.dim[2:], (160, 160), strict=True):
        dim.dim_value = size  # a call of some milliseconds: a measurement lasts as long as it is told to
    onnx.save(large, path)
    backend = base.load("ort")
    artifact = backend.lower(path, devices.find("local"), "fp32")
    here = backend.open(artifact, 1)
    shape = [d or 1 for d in here.inputs[0].shape]
    feed = {here.inputs[0].name: np.random.default_rng(0).normal(size=shape).astype(np.float32)}
    return SimpleNamespace(backend=backend, artifact=artifact, feed=feed, expected=here.run(feed), path=path)


def _target(said=None):
    def told(stage, done, total):
        if said is not None:
            said.append((stage, done, total))

    return targets.of("ssh://device", told)


def _measure(target, model, seconds=0.5):
    runner = target.open(model.backend, model.artifact, 1)
    return target.measure({"a": runner, "b": runner}, model.feed, baseline="a", threads=1, seconds=seconds)


# ------------------------------------------------------------------------------------------- URLs


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("ssh://jetson", ("jetson", None, None)),
        ("ssh://me@192.168.1.20:2222", ("192.168.1.20", "me", 2222)),
        ("ssh://me@[fe80::1]:22/", ("fe80::1", "me", 22)),
        ("ssh://My-Jetson", ("My-Jetson", None, None)),
        ("ssh://domain\\me@host", ("host", "domain\\me", None)),
    ],
)
def test_a_url_is_host_user_and_port(url, expected):
    assert ssh.parsed(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        "ssh://",
        "ssh://-oProxyCommand=touch%20x",
        "ssh://-oProxyCommand@host",
        "ssh://host;reboot",
        "ssh://$(reboot)@host",
        "ssh://me:secret@host",
        "ssh://host/folder",
        "ssh://host:port",
        "ssh:host",
    ],
)
def test_a_url_that_is_more_than_that_is_refused(url):
    with pytest.raises(UserError) as error:
        targets.of(url)
    assert error.value.exit_code == 2 and error.value.fix


def test_what_the_shell_there_sees_is_constant_and_needs_no_quoting():
    line = ssh.command("host", "me", 22)
    assert line[-1] == f"exec python3 -c '{links.FIRST}'" and line[-3:-1] == ["--", "host"]
    assert not set(links.FIRST) & set("'\"$!`\\\n")


# ------------------------------------------------------------------------------------------- it works


@needs_sshd
def test_a_model_runs_and_is_measured_there(server, model):
    target = _target()
    runner = target.open(model.backend, model.artifact, 1)
    found = runner.run(model.feed)
    assert all(np.array_equal(found[name], value) for name, value in model.expected.items())
    measured = _measure(target, model)
    assert measured["a"].median_ms > 0 and measured["a"].target == "ssh://device"
    assert 0.7 < measured["b"].speedup < 1.4 and measured["b"].provider == "CPUExecutionProvider"
    assert server.left()
    target.close()
    assert not server.left()


@needs_sshd
def test_weights_outside_the_onnx_file_come_along(server, model, tmp_path):
    (tmp_path / "parts").mkdir()
    path = tmp_path / "outside.onnx"
    onnx.save(
        onnx.load(model.path), path, save_as_external_data=True, location="parts/weights.bin", size_threshold=64
    )
    assert (tmp_path / "parts" / "weights.bin").stat().st_size > 1000
    target = _target()
    found = target.open(model.backend, model.backend.lower(path, devices.find("local"), "fp32"), 1).run(model.feed)
    assert all(np.array_equal(found[name], value) for name, value in model.expected.items())
    target.close()


@needs_sshd
def test_what_is_there_is_not_sent_again(server, model):
    said = []
    target = _target(said)
    _measure(target, model)
    _measure(target, model)
    target.close()
    sent = [stage for stage, done, total in said if stage == f"sending {model.path.name} (kB)" and done == total]
    assert len(sent) == 1


@needs_sshd
@pytest.mark.parametrize("noise", ["echo hello; echo '{not: json'", "printf 'no end of line'", "echo oops >&2"])
def test_what_a_shell_prints_at_its_start_is_skipped(tmp_path, monkeypatch, model, noise):
    with _served(tmp_path, monkeypatch, before=noise):
        target = _target()
        assert _measure(target, model)["a"].median_ms > 0
        target.close()


@needs_sshd
def test_a_slow_link_takes_longer_and_no_more(server, model):
    server.line.bytes_per_second = 60_000
    target = _target()
    assert _measure(target, model)["a"].median_ms > 0
    target.close()


# ------------------------------------------------------------------------------------------- no way in


def _refused():
    with pytest.raises(UnavailableError) as error:
        _target().check()
    assert error.value.exit_code == 4 and error.value.fix
    return str(error.value)


@needs_sshd
def test_a_wrong_name(server, monkeypatch):
    with pytest.raises(UnavailableError, match="host name is not known"):
        targets.of("ssh://no-such-host.invalid").check()


@needs_sshd
def test_nothing_listens(server):
    server.client.write_text(server.client.read_text().replace(str(server.line.port), str(sshd._free_port())))
    assert "nothing listens" in _refused()


@needs_sshd
def test_a_refused_key(server):
    (server.folder / "authorized").write_text("")
    said = _refused()
    assert "refuses the login" in said and "ssh-copy-id device" in said


@needs_sshd
def test_an_unknown_host_key(server):
    server.known.write_text("")
    assert "not known here yet" in _refused()


@needs_sshd
def test_a_changed_host_key(server):
    other = (server.folder / "user.pub").read_text().split()
    server.known.write_text(f"device {other[0]} {other[1]}\n")
    assert "another machine, or somebody in between" in _refused()


@needs_sshd
def test_no_python(tmp_path, monkeypatch):
    with _served(tmp_path, monkeypatch, python=""):
        assert "no python3 on the device" in _refused()


@needs_sshd
def test_an_old_python(tmp_path, monkeypatch):
    with _patched(tmp_path, monkeypatch, "import sys; sys.version_info = (3, 5, 2); sys.version = '3.5.2 (old)'"):
        assert "python3 is 3.5.2, and 3.6 or later is needed" in _refused()


def test_no_ssh_here(monkeypatch):
    monkeypatch.setenv("EDGEC_SSH", "/nowhere/ssh")
    monkeypatch.setattr(ssh, "_socket_folder", lambda: None)
    assert "there is no ssh here" in _refused()


def _patched(tmp_path, monkeypatch, code):
    """Serve with a python3 that runs some code at its start."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(code)
    return _served(tmp_path, monkeypatch, before=f"PYTHONPATH={tmp_path / 'site'}; export PYTHONPATH")


# ------------------------------------------------------------------------------------------- it breaks


@needs_sshd
def test_a_connection_lost_in_the_middle_of_a_job_is_made_anew_and_nothing_is_lost(server, model):
    said = []
    target = _target(said)
    cut = threading.Thread(target=_once, args=(said, "measuring latency", server.line.cut))
    cut.start()
    measured = _measure(target, model, seconds=2.0)
    cut.join()
    assert measured["b"].runs >= 50 and "the connection broke; connecting anew" in [s for s, *_ in said]
    target.close()


@needs_sshd
def test_a_transfer_goes_on_where_it_was_cut(server, tmp_path):
    large = tmp_path / "large.bin"
    large.write_bytes(np.random.default_rng(0).bytes(6_000_000))
    server.line.bytes_per_second = 4_000_000
    session = devices_session.Device("ssh://device", _target().device.connect)
    session._connected(None)
    start = server.line.carried
    threading.Thread(target=_after, args=(lambda: server.line.carried - start > 3_000_000, server.line.cut)).start()
    (path,) = session.send({"large.bin": large}).values()
    resent = server.line.carried - start
    (folder,) = [p for p in server.tmp.iterdir() if p.name.startswith("edgec-")]
    assert (folder / path).read_bytes() == large.read_bytes()
    assert resent < 9_000_000, "most of what had arrived was sent again"
    assert not list(folder.rglob("*.part"))
    session.close()


@needs_sshd
def test_what_arrives_damaged_is_never_used(server, tmp_path, monkeypatch):
    (tmp_path / "file.bin").write_bytes(b"12345")
    monkeypatch.setattr(devices_session, "_digest", lambda path: "0" * 64)
    session = devices_session.Device("ssh://device", _target().device.connect)
    with pytest.raises(UnavailableError, match="damaged on the device, three times"):
        session.send({"file.bin": tmp_path / "file.bin"})
    (folder,) = [p for p in server.tmp.iterdir() if p.name.startswith("edgec-")]
    assert not [p for p in (folder / "files").rglob("*") if p.is_file()]
    session.close()


@needs_sshd
def test_a_connection_that_does_not_come_back_is_said_and_nothing_stays_there(server, model):
    said = []
    target = _target(said)
    target.device.patience, target.device.grace = 2.0, 1.0
    target.check()

    def cut():
        server.line.refused.set()
        server.line.cut()

    threading.Thread(target=_once, args=(said, "measuring latency", cut)).start()
    with pytest.raises(UnavailableError, match="did not come back in 2 s"):
        _measure(target, model, seconds=30.0)
    assert server.gone()
    server.line.refused.clear()
    with pytest.raises(UnavailableError, match="kept nothing"):
        target.device.run({"kind": "probe"})
    target.close()


@needs_sshd
def test_a_killed_edgec_leaves_nothing_there(server, model):
    target = _target()
    target.device.grace = 1.0
    target.check()
    assert server.left()
    target.device._link.process.kill()  # the client is gone without a good-bye
    assert server.gone()


@needs_sshd
def test_a_killed_session_on_the_device_is_swept_by_the_next(server, model):
    target = _target()
    target.check()
    for pid in _processes("serve", str(server.tmp)):
        os.kill(pid, signal.SIGKILL)
    target.device._link.kill()
    assert server.left()
    other = _target()
    other.check()
    other.close()


@needs_sshd
@pytest.mark.parametrize(
    ("code", "why"),
    [
        (
            "import shutil, collections; U = collections.namedtuple('U', 'total used free');"
            "shutil.disk_usage = lambda path: U(1 << 30, 1 << 30, 0)",
            "the device's disk is full: .* and 0 MB are needed",
        ),
        (
            "import builtins, errno; real = builtins.open\n"
            "def full(name, *more, **rest):\n"
            "    if str(name).endswith('.part'): raise OSError(errno.ENOSPC, 'No space left on device', name)\n"
            "    return real(name, *more, **rest)\n"
            "builtins.open = full",
            "the device's disk is full: .* took no more",
        ),
    ],
)
def test_a_full_disk_is_said(tmp_path, monkeypatch, model, code, why):
    with _patched(tmp_path, monkeypatch, code) as server:
        target = _target()
        with pytest.raises(UnavailableError, match=why):
            _measure(target, model)
        target.close()
        assert server.gone()


@needs_sshd
def test_a_full_disk_for_the_program_itself(tmp_path, monkeypatch):
    code = "import tempfile\ndef full(*a, **k): raise OSError(28, 'No space left on device')\ntempfile.mkdtemp = full"
    with _patched(tmp_path, monkeypatch, code):
        assert "disk is full" in _refused()


@needs_sshd
def test_a_job_that_crashes_is_a_sentence(server, model):
    said = []
    target = _target(said)

    def crash():
        for pid in _processes("work", str(server.tmp)):
            os.kill(pid, signal.SIGSEGV)

    threading.Thread(target=_once, args=(said, "measuring latency", crash)).start()
    with pytest.raises(UnavailableError, match=r"ended by signal 11 \(SIGSEGV\)"):
        _measure(target, model, seconds=20.0)
    assert _measure(target, model)["a"].median_ms > 0  # the session lives on
    target.close()


# ------------------------------------------------------------------------------------------- several, and Ctrl-C


@needs_sshd
def test_two_runs_at_once_take_turns_and_the_second_hears_of_the_first(server, model):
    first, second, said, done = _target(), _target(heard := []), [], []
    first.device.progress = lambda *now: said.append(now)

    def long():
        done.append(_measure(first, model, seconds=3.0))

    thread = threading.Thread(target=long)
    thread.start()
    _once(said, "measuring latency", lambda: None)
    done.append(_measure(second, model, seconds=0.2))
    thread.join()
    assert done[0]["a"].runs > done[1]["a"].runs, "the second did not wait"
    assert any(f"waiting for the run of {on_device.me()}" in stage for stage, *_ in heard)
    first.close(), second.close()


@needs_sshd
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_ends_what_runs_there(server, model):
    command = [sys.executable, "-m", "edgec", "bench", str(model.path), "--target", "ssh://device", "--seconds", "60"]
    environment = {**os.environ, "TMPDIR": str(server.folder)}  # where its shared connection's socket is
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, env=environment
    )
    _after(lambda: _measures(server), lambda: None)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to ssh, too
    out, err = process.communicate(timeout=20)
    assert process.returncode not in (0, 1) and b"Traceback" not in err, err.decode()
    assert server.gone(3) and not _processes("work", str(server.tmp))


def _measures(server):
    """Say whether a job on the device has come to its measurement."""
    events = server.tmp.glob("edgec-*/jobs/*/events.jsonl")
    return any("measuring latency" in path.read_text() for path in events)


def _once(said, stage, do):
    """Do it as soon as a stage was told."""
    _after(lambda: any(stage in one for one, *_ in said), do)


def _after(condition, do):
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    do()


def _processes(what, folder):
    """The device's processes: those of the program, with this command, in this temporary folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if what.encode() in words and any(word.startswith(folder.encode()) for word in words):
            found.append(int(path.parent.name))
    return found


# ------------------------------------------------------------------------------------------- what the device refuses


@needs_sshd
@pytest.mark.parametrize(
    "message",
    [
        {"do": "have", "key": "..", "name": "x", "bytes": 1},
        {"do": "have", "key": "k", "name": "../../x", "bytes": 1},
        {"do": "have", "key": "k", "name": "/etc/passwd", "bytes": 1},
        {"do": "stat", "job": "j", "name": "../../token"},
    ],
)
def test_no_file_outside_the_session_is_touched(server, message):
    session = _target().device
    with pytest.raises(devices_session.Refused, match="no name that files may have"):
        devices_session._ask(session._connected(None), message)
    session.close()


def test_the_program_is_one_file_that_says_nothing_of_this_machine(tmp_path):
    from edgec.backends.targets import packing

    path = tmp_path / packing.NAME
    path.write_bytes(packing.packed())
    assert packing.packed() == path.read_bytes() and len(path.read_bytes()) < 200_000
    assert str(Path(links.__file__).parents[2]).encode() not in path.read_bytes()
    job = tmp_path / "job"
    job.mkdir()
    (job / "job.json").write_text(json.dumps({"kind": "probe"}))
    done = subprocess.run([sys.executable, "-I", path, "work", job], cwd=tmp_path, check=True)
    last = json.loads((job / "events.jsonl").read_text().splitlines()[-1])
    assert done.returncode == 0 and last["event"] == "done"
