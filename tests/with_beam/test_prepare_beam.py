"""Shards made by Apache Beam's workers (requirements-beam.txt) are those that processes make: make test-beam."""

import pathlib
import signal
import subprocess
import sys
import time

import pytest
from etils import epath
from saved import REPO
from test_data_sources import encode, picture, write

beam = pytest.importorskip("apache_beam", reason="make test-beam has Apache Beam")

from mim_jax.config import ConfigError  # noqa: E402
from mim_jax.data import shard_pipeline, shard_writer  # noqa: E402
from mim_jax.data.augment import DataError  # noqa: E402
from mim_jax.jobs.preparation import Asked, prepare  # noqa: E402

pytestmark = pytest.mark.beam
PROCESSES = ("--direct_running_mode=multi_processing", "--direct_num_workers=2")
THREADS = ("--direct_running_mode=multi_threading", "--direct_num_workers=2")
N = 12


@pytest.fixture
def data(tmp_path):
    """A folder of two classes, and one file that is no image."""
    for k in range(N):
        write(f"{tmp_path}/data/{'ab'[k // 6]}/{k:02d}.jpg", encode(picture(k, 80, 96), "JPEG"))
    write(f"{tmp_path}/data/b/broken.jpg", b"no image")
    return tmp_path / "data"


def made(data, out, runner="DirectRunner", options=(), **asked):
    opening = dict(name="folder", split="train", path=str(data))
    stored = dict(shorter=60, format="png")
    beam = (runner, options) if runner else ()
    return prepare(Asked(opening, str(out), **{"stored": stored, "shards": 4, "beam": beam, **asked}))


def contents(out):
    """{name: bytes} of what is left in a folder, hidden files too."""
    return {str(path.relative_to(out)): path.read_bytes() for path in pathlib.Path(out).rglob("*") if path.is_file()}


@pytest.mark.parametrize("options", [(), THREADS, PROCESSES], ids=["one", "threads", "processes"])
def test_files_are_those_of_processes(data, tmp_path, options, capsys):
    said = made(data, tmp_path / "beam", options=options)
    assert "left out, number 1: b/broken.jpg: " in capsys.readouterr().out
    assert said == made(data, tmp_path / "plain", "") and (said["examples"], len(said["skipped"])) == (N, 1)
    assert contents(tmp_path / "beam") == contents(tmp_path / "plain")


def test_a_killed_command_goes_on(data, tmp_path):
    out = tmp_path / "out"
    for k in range(40):
        write(f"{data}/b/more{k}.jpg", encode(picture(k, 400, 600), "JPEG"))
    flags = ["--source=folder", f"--path={data}", f"--out={out}", "--shards=20", "--shorter=390", "--format=png"]
    command = subprocess.Popen([sys.executable, "-m", "mim_jax.prepare", *flags, "--beam=DirectRunner"], cwd=REPO)
    while len(there := list(out.glob("parts-train/0*.json"))) < 2:
        assert command.poll() is None
        time.sleep(0.05)
    command.send_signal(signal.SIGKILL)
    command.wait()
    times = {path: path.stat().st_mtime_ns for path in there}
    (left,) = out.glob("parts-train/beam-*")
    given = dict(stored=dict(shorter=390, format="png"), shards=20)
    said = made(data, out, **given)
    assert not left.exists() and times == {path: path.stat().st_mtime_ns for path in there}
    assert said == made(data, tmp_path / "plain", "", **given)


def test_too_many_that_cannot_be_read(data, tmp_path):
    for _ in range(2):  # a second start knows what the first met
        with pytest.raises(DataError, match=r"(?s)1 of the 13 images .* cannot be read, more than .*b/broken.jpg"):
            made(data, tmp_path / "out", bad_limit=0.0)
    assert not list(tmp_path.glob("out/parts-train/beam-*"))
    assert made(data, tmp_path / "out")["examples"] == N


@pytest.mark.parametrize("stop", [KeyboardInterrupt, DataError("enough")])
def test_workers_stop_when_nobody_waits(data, tmp_path, monkeypatch, stop):
    """One shard is there when the command stops; its workers make no other."""
    plain, finished = shard_pipeline.made, []

    def slowly(*given):
        while finished and list(tmp_path.glob("out/parts-train/beam-*")):
            time.sleep(0.05)  # the second shard lasts until the command has stopped
        finished.append(given)
        return plain(*given)

    def told(*_):
        raise stop

    monkeypatch.setattr(shard_pipeline, "made", slowly)
    monkeypatch.setattr("mim_jax.jobs.preparation.Progress.tell", told)
    with pytest.raises(KeyboardInterrupt if stop is KeyboardInterrupt else DataError):
        made(data, tmp_path / "out")
    assert len(finished) == 2 and len(list(tmp_path.glob("out/images-*"))) == 1


def test_the_words_of_a_worker_are_those_of_the_command(data, tmp_path, monkeypatch):
    def full(*_):
        raise RuntimeError("open() failed: No space left on device")

    monkeypatch.setattr(shard_writer, "array_record", lambda: type("", (), {"ArrayRecordWriter": full}))
    with pytest.raises(ConfigError) as error:
        made(data, tmp_path / "out")
    assert str(error.value).endswith("cannot be written: open() failed: No space left on device")
    assert "\n" not in str(error.value) and str(error.value).startswith(str(tmp_path))


def test_words_that_come_as_text():
    """Other processes' errors are text, with what called what."""
    text = 'Traceback (most recent call last):\n  File "x.py", line 3\nmim_jax.data.augment.DataError: No image\nThe first: a\n'
    assert shard_pipeline._why(RuntimeError(text), {}) == "No image\nThe first: a"
    other = RuntimeError('Traceback (most recent call last):\n  File "x.py"\nMemoryError: none [while running "write"]')
    assert "has given up: MemoryError: none. The same command" in shard_pipeline._why(other, {})


def test_a_worker_without_the_folder(tmp_path):
    worker = shard_pipeline.WriteShard({}, N, None, epath.Path(tmp_path) / "none/parts-train/beam-1")
    with pytest.raises(DataError, match="does not see .*parts-train: --out, and the source, must lie where all workers see"):
        next(worker.process(None))


@pytest.mark.parametrize(
    "runner,options,words",
    [
        ("Direct", (), "--beam=Direct: choose one of DirectRunner, "),
        ("DirectRunner", ("--direct_num_workers=x",), "--beam_options: argument --direct_num_workers: invalid int value: 'x'"),
        ("DirectRunner", ("--workers=2",), "--beam_options=--workers: neither Beam nor DirectRunner has such an option"),
        ("DirectRunner", ("direct_num_workers=2",), "write --beam_options=--key=value"),
        ("DirectRunner", ("--runner=FlinkRunner",), "the runner is that of --beam"),
        ("DataflowRunner", (), "--beam=DataflowRunner: "),  # which needs a project, or another extra of Beam
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(data, tmp_path, runner, options, words):
    with pytest.raises(ConfigError, match=words) as error:
        made(data, tmp_path / "out", runner, options)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_job_server(data, tmp_path):
    """The way to Flink and Spark, on a job server that Beam has in Python; workers are started by the command (LOOPBACK)."""
    port = tmp_path / "port"
    server = [sys.executable, "-m", "apache_beam.runners.portability.local_job_service_main", f"--port_file={port}"]
    with subprocess.Popen([*server, f"--staging_dir={tmp_path}/staging"], cwd=REPO, stderr=subprocess.DEVNULL) as job_server:
        try:
            while not port.exists() or not port.read_text():
                assert job_server.poll() is None
                time.sleep(0.05)
            options = (f"--job_endpoint=localhost:{port.read_text()}", "--environment_type=LOOPBACK")
            said = made(data, tmp_path / "out", "PortableRunner", options)
        finally:
            job_server.terminate()
    assert said == made(data, tmp_path / "plain", "")
