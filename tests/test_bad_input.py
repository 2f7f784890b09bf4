"""Wrong input: exit code 2, one clear message on stderr, no traceback, nothing half-written."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time

import onnx
import pytest


@pytest.fixture
def refuse(edgec, tmp_path):
    """Run a command that must be refused; return its message."""

    def run(*args, words=(), out=None, **kwargs):
        done = edgec(*args, **kwargs)
        assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        assert done.stderr.strip()
        assert not done.stdout.strip()
        for word in words:
            assert word in done.stderr
        if out is not None:
            assert not out.exists()
            assert not [p for p in out.parent.iterdir() if out.name in p.name]
        return done.stderr

    return run


def make(kind, path, good):
    data = good.read_bytes()
    content = {"cut": data[:3000], "text": b"hello\n", "empty": b"", "zip": b"PK\x03\x04rest"}
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(content[kind])
    return path


@pytest.mark.parametrize("kind", ["cut", "text", "empty", "zip", "missing", "folder"])
def test_what_is_no_model(kind, tiny, tmp_path, refuse):
    path = make(kind, tmp_path / "bad.onnx", tiny / "model.onnx")
    refuse("compile", path, "-o", tmp_path / "out", words=("bad.onnx", "fix:"), out=tmp_path / "out")


def test_an_unknown_operator(tiny, tmp_path, refuse):
    model = onnx.load(tiny / "model.onnx")
    model.graph.node[2].op_type = "Reluu"
    onnx.save(model, tmp_path / "m.onnx")
    refuse("compile", tmp_path / "m.onnx", "-o", tmp_path / "out", words=("Reluu",), out=tmp_path / "out")


def test_an_opset_of_the_future(tiny, tmp_path, refuse):
    model = onnx.load(tiny / "model.onnx")
    model.opset_import[0].version = 99
    onnx.save(model, tmp_path / "m.onnx")
    refuse("compile", tmp_path / "m.onnx", "-o", tmp_path / "out", words=("99",), out=tmp_path / "out")


def test_external_data_that_is_missing(tiny, tmp_path, refuse):
    model = onnx.load(tiny / "model.onnx")
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    (tmp_path / "w.bin").unlink()
    refuse("compile", tmp_path / "m.onnx", "-o", tmp_path / "out", words=("w.bin",), out=tmp_path / "out")


@pytest.mark.parametrize("kind", ["nowhere", "none", "junk"])
def test_folders_without_an_image(kind, tiny, tmp_path, refuse):
    folder = tmp_path / kind
    if kind != "nowhere":
        folder.mkdir()
    if kind == "junk":
        (folder / "a.jpg").write_text("x")
    args = ("compile", tiny / "model.onnx", "-o", tmp_path / "out", "--calib", folder)
    refuse(*args, words=(kind,), out=tmp_path / "out")


def test_one_unreadable_image_is_skipped_counted_and_named(tiny, tmp_path, edgec):
    import shutil

    shutil.copytree(tiny / "images", tmp_path / "images")
    (tmp_path / "images" / "class0" / "broken.png").write_bytes(b"\x89PNG not really")
    done = edgec("compile", tiny / "model.onnx", "-o", tmp_path / "out", "--calib", tmp_path / "images")
    assert done.returncode == 0, done.stderr
    assert "broken.png" in done.stdout
    assert "1 unreadable" in done.stdout


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (("--device", "jetson-orin-nanoo"), "jetson-orin-nano-8gb"),
        (("--precision", "int7"), "int7"),
        (("--precision", "int8"), "--calib"),
        (("--max-drop", "banana"), "banana"),
        (("--max-size", "big"), "4MB"),
        (("--backend", "warp"), "warp"),
        (("--threads", "-1"), "threads"),
        (("--no-such-option",), "no-such-option"),
        (("--ranges", "nowhere.json", "--precision", "int8"), "nowhere.json"),
        (("--metric", "nonsense", "--calib", "images"), "MODULE:FUNCTION"),
    ],
)
def test_wrong_options(args, word, tiny, tmp_path, refuse):
    refuse("compile", "model.onnx", "-o", tmp_path / "out", *args, words=(word,), out=tmp_path / "out", cwd=tiny)


def test_a_preprocess_file_with_an_unknown_key(tiny, tmp_path, refuse):
    (tmp_path / "p.yaml").write_text("size: [16, 16]\nmaen: [1]\n")
    args = ("--calib", tiny / "images", "--preprocess", tmp_path / "p.yaml")
    message = refuse(
        "compile", tiny / "model.onnx", "-o", tmp_path / "out", *args, words=("maen", "mean"), out=tmp_path / "out"
    )
    assert "2" in message  # the line


def test_images_whose_channels_do_not_fit(tiny, tmp_path, refuse):
    (tmp_path / "p.yaml").write_text("color: gray\n")
    args = ("--calib", tiny / "images", "--preprocess", tmp_path / "p.yaml")
    refuse("compile", tiny / "model.onnx", "-o", tmp_path / "out", *args, out=tmp_path / "out")


def test_an_existing_output_is_never_overwritten(tiny, tmp_path, refuse, edgec):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    refuse("compile", tiny / "model.onnx", "-o", out, words=("--force",))
    refuse("compile", tiny / "model.onnx", "-o", out, "--force")  # no bundle: not even with --force
    assert (out / "precious.txt").read_text() == "mine"


def test_force_replaces_a_bundle(tiny, tmp_path, edgec):
    for _ in range(2):
        assert edgec("compile", tiny / "model.onnx", "-o", tmp_path / "out", "--force").returncode == 0


def test_a_target_that_is_not_there_is_4(tiny, tmp_path, edgec):
    done = edgec("compile", tiny / "model.onnx", "-o", tmp_path / "out", "--target", "ssh://nowhere")
    assert done.returncode == 4
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_inspect_and_eval_refuse_what_is_no_bundle(tmp_path, tiny, refuse):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.json").write_text("{}")
    refuse("inspect", tmp_path / "empty", words=("manifest",))
    refuse("inspect", tmp_path / "x.json")
    refuse("eval", tmp_path / "empty", tiny / "images")
    refuse("bench", tmp_path / "nothing.onnx")


def test_a_changed_bundle_is_not_opened(bundle, tmp_path, refuse):
    import shutil

    shutil.copytree(bundle, tmp_path / "b")
    with (tmp_path / "b" / "model.onnx").open("ab") as file:
        file.write(b"\0")
    refuse("bench", tmp_path / "b", words=("changed",))


def test_disk_full(tiny, tmp_path):
    """A file-size limit makes every write beyond it fail, as a full disk does."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    command = [sys.executable, "-m", "edgec", "compile", tiny / "model.onnx", "-o", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
    assert os.strerror(errno.ENOSPC)  # the message is the library's own; that there is one is enough
    assert done.stderr.strip()


def test_interrupted_leaves_nothing(tiny, tmp_path):
    """Ctrl-C in the middle of a long compile (1,000 images, cold cache)."""
    command = [
        sys.executable,
        "-m",
        "edgec",
        "compile",
        tiny / "model.onnx",
        "-o",
        tmp_path / "out",
        "--calib",
        tiny / "images",
    ]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "c")},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    while not list(tmp_path.glob("*out*")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "interrupted" in message
    assert "Traceback" not in message
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (("--max-drop", "1%"), "--calib"),
        (("--metric", "mine:judge"), "--calib"),
        (("--device", "jetson-orin-nano-8gb", "--target", "local"), "Jetson"),
    ],
)
def test_what_cannot_be_checked_is_refused(args, word, tiny, tmp_path, refuse):
    refuse("compile", tiny / "model.onnx", "-o", tmp_path / "out", *args, words=(word,), out=tmp_path / "out")


def test_models_that_do_not_belong_together(tiny, tmp_path, refuse):
    other = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 13]> g (float[1, 4] a) => (float[1, 4] b) { b = Relu (a) }'
    )
    onnx.save(other, tmp_path / "other.onnx")
    refuse("eval", tiny / "model.onnx", tiny / "images", "--against", tmp_path / "other.onnx")
    refuse("bench", tiny / "model.onnx", "--against", tmp_path / "other.onnx", "--seconds", 0.1)


def test_a_metric_that_fails_is_the_users_fault(tiny, tmp_path, refuse):
    (tmp_path / "bad.py").write_text(
        "def boom(got, want):\n    return got['nothing']\ndef big(got, want):\n    return 7\n"
    )
    for name in ("boom", "big"):
        refuse("eval", tiny / "model.onnx", tiny / "images", "--against", tiny / "model.onnx",
               "--metric", f"{tmp_path / 'bad.py'}:{name}", words=("--metric",))  # fmt: skip


def test_more_class_folders_than_classes(tiny, tmp_path, refuse):
    import shutil

    shutil.copytree(tiny / "images", tmp_path / "images")
    shutil.copytree(tmp_path / "images" / "class0", tmp_path / "images" / "class9")
    refuse("eval", tiny / "model.onnx", tmp_path / "images", words=("class",))


def test_a_manifest_of_nothing(tmp_path, refuse):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "manifest.json").write_text('{"format": 1}')
    refuse("bench", tmp_path / "b")


def test_a_reader_that_has_seen_enough(tmp_path):
    done = subprocess.run(f"{sys.executable} -m edgec devices | head -1", shell=True, capture_output=True, text=True)
    assert done.stderr == ""
