"""What the walls are made of. Each test runs its own little worker inside."""
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from minideepseek.classroom import sandbox
from minideepseek.classroom.sandbox import LIBRARIES, libraries, run
from tests.house import ROOT

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root: without it fewer walls stand")
WALLS = pytest.mark.parametrize("namespaces", (True, False))


@pytest.fixture(autouse=True)
def nothing_to_import(request, monkeypatch):
    """Saves a third of a second for each process, but where the libraries are what is tested."""
    if "libraries" not in request.node.name:
        monkeypatch.setattr(sandbox, "libraries", lambda: ["resource", "socket", "encodings.idna"])


def inside(tmp_path, body, jobs=("",), seconds=5.0, namespaces=True):
    """Run `body` in the sandbox, where `say` writes a line to the judge; return the lines of each job."""
    folder = tmp_path / "minideepseek/classroom"
    folder.mkdir(parents=True, exist_ok=True)
    for path in (tmp_path / "minideepseek/__init__.py", folder / "__init__.py"):
        path.touch()
    shutil.copy(ROOT / "minideepseek/classroom/sandbox.py", folder)
    indented = "\n".join(f"    {line}" for line in body.splitlines())
    (folder / "worker.py").write_text("import ctypes, os, resource, signal, sys, time\n\ndef main(ask, reply):\n    text = os.read(ask, 999).decode()\n"
                                      "    def say(*what):\n        os.write(reply, (' '.join(map(str, what)) + '\\n').encode())\n" + indented + "\n")
    return [written.decode().splitlines() for _, written in run(tmp_path, jobs, seconds, namespaces)]


@WALLS
def test_no_rights_no_environment_no_files(tmp_path, namespaces, monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    ((lines,)) = inside(tmp_path, """say(os.getuid() >= 1 << 30, os.geteuid() == os.getgid() == os.getuid(), os.getgroups())
say(dict(os.environ), sys.argv, os.getcwd(), os.listdir("/"))
status = ctypes.create_string_buffer(24)
ctypes.CDLL(None).capget((ctypes.c_uint32 * 2)(0x20080522, 0), status)
say(any(status.raw), ctypes.CDLL(None).prctl(39, 0, 0, 0, 0))
for attempt in (lambda: os.chroot("/"), lambda: os.setuid(0), lambda: open("/new", "w"), lambda: open("/minideepseek/__init__.py", "a"), lambda: os.nice(-5)):
    try:
        attempt()
        say("did it")
    except OSError as error:
        say(type(error).__name__)""", namespaces=namespaces)
    assert lines == ["True True []", "{} [''] / ['minideepseek']", "False 1", *["PermissionError"] * 5]


def test_only_the_two_descriptors_and_no_terminal(tmp_path):
    (lines,) = inside(tmp_path, """for fd in range(1000):
    try:
        os.fstat(fd)
        say(fd)
    except OSError:
        pass
say(os.isatty(0), os.getsid(0) == os.getpid())""")
    assert lines[:3] == ["0", "1", "2"] and len(lines) == 6 and lines[-1] == "False True"


def test_limits(tmp_path):
    (lines,) = inside(tmp_path, "for name in ('AS', 'FSIZE', 'NOFILE', 'NPROC', 'CORE', 'CPU'):\n    say(name, *resource.getrlimit(getattr(resource, 'RLIMIT_' + name)))\n"
                                "try:\n    bytearray(2 << 30)\nexcept MemoryError:\n    say('no memory')\n"
                                "try:\n    os.write(reply, b'x' * (9 << 20))\n    os.write(reply, b'x')\nexcept OSError:\n    pass", seconds=3.5)
    assert lines[:7] == ["AS 1073741824 1073741824", "FSIZE 8388608 8388608", "NOFILE 64 64", "NPROC 8 8", "CORE 0 0", "CPU 4 4", "no memory"]
    assert len(lines[7]) < 8 << 20


@WALLS
def test_each_job_is_a_process_of_its_own_with_time_of_its_own(tmp_path, namespaces):
    began = time.monotonic()
    first, second, third = inside(tmp_path, "say(text, hasattr(sys, 'left'))\nsys.left = 1\nif text == 'two':\n    time.sleep(30)\nsay('end')", ["one", "two", "three"], 0.7, namespaces)
    assert (first, second, third) == (["one False", "end"], ["two False"], ["three False", "end"])
    assert time.monotonic() - began < 0.7 + 4


def test_the_network_ends_at_the_namespace(tmp_path):
    (lines,) = inside(tmp_path, "import socket\ntry:\n    socket.socket().connect(('127.0.0.1', 9))\nexcept OSError as error:\n    say(error.strerror)\nsay(os.getpid())")
    assert lines == ["Network is unreachable", "1"]


@WALLS
def test_a_fork_bomb_is_gone_when_run_returns(tmp_path, namespaces):
    """Its processes rename themselves, so that they can be counted from outside; at least one was seen alive."""
    seen, over = [], threading.Event()

    def alive():
        return [path for path in Path("/proc").glob("[0-9]*/comm") if path.exists() and path.read_bytes() == b"forkbomb\n"]

    def watch():
        while not over.wait(0.02):
            try:
                seen.extend(alive())
            except OSError:
                pass

    watcher = threading.Thread(target=watch)
    watcher.start()
    inside(tmp_path, "ctypes.CDLL(None).prctl(15, b'forkbomb')\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
                     "while True:\n    try:\n        os.fork()\n        os.setsid()\n    except OSError:\n        pass", seconds=0.4, namespaces=namespaces)
    left = alive()
    over.set()
    watcher.join()
    assert len(set(seen)) > 1 and left == []


def test_what_is_left_in_place_of_the_question_comes_back(tmp_path):
    inside(tmp_path, "")
    (tmp_path / "minideepseek/classroom/worker.py").write_text("import os\ndef main(ask, reply):\n    os.ftruncate(ask, 0)\n    os.pwrite(ask, b'mine', 0)\n    os.write(reply, b'yours')\n")
    assert run(tmp_path, ["question"], 5) == [[b"mine", b"yours"]]


def test_a_worker_that_cannot_start_leaves_its_question(tmp_path):
    inside(tmp_path, "")
    (tmp_path / "minideepseek/classroom/worker.py").write_text("syntax error")
    assert run(tmp_path, ["question"], 5) == [[b"question", b""]]


def test_the_judge_does_not_wait_for_a_server_that_hangs(tmp_path, monkeypatch):
    inside(tmp_path, "")
    (tmp_path / "minideepseek/classroom/sandbox.py").write_text("import time\ndef serve(*_): time.sleep(60)")
    monkeypatch.setattr(sandbox, "STARTUP", 0.3)
    with pytest.raises(Exception, match="timed out"):
        run(tmp_path, [], 1.0)


def test_the_promised_libraries_and_those_of_the_package_can_be_imported_inside(tmp_path):
    assert {"numpy", "scipy.sparse", "ml_dtypes", "types", "json", "inspect"} <= set(libraries()) >= set(LIBRARIES)
    assert not any(name.startswith(("minideepseek", "matplotlib", "mpi4py", "tokenizers")) for name in libraries())
    (lines,) = inside(tmp_path, f"import importlib\nfor name in {libraries()}:\n    importlib.import_module(name)\nimport numpy as np\n"
                                "say(np.einsum('ij,jk->ik', np.eye(2), np.ones((2, 2))).sum(), np.linalg.norm([3.0, 4.0]), np.random.default_rng(0).random() < 1)")
    assert lines == ["4.0 5.0 True"]
