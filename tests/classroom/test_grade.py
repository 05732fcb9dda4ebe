"""Submissions of every kind: right ones in other styles get everything, hostile ones what their honest part deserves."""
import contextlib
import json
import os
import socket
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from minideepseek.classroom import grade as module
from minideepseek.classroom import sandbox
from minideepseek.classroom.assignments import Assignment, Task, assignment
from minideepseek.classroom.blank import ExerciseError
from minideepseek.classroom.grade import LARGEST, collect, grade, grade_submission, read_answers, report, write_results
from minideepseek.classroom.release import release
from minideepseek.classroom.worker import pack
from tests.house import ROOT, read

FILE = "minideepseek/basics/rmsnorm.py"
ONE = Assignment("tiny", "One component", (Task("rmsnorm", "basics/rmsnorm.py", 100),))
FILES = release(assignment("2-norms"))[0]
SOLUTION = read(FILE)
FORWARD = SOLUTION[SOLUTION.index("def rmsnorm_forward"):SOLUTION.index("def rmsnorm_backward")]
FORWARD_ONLY, FORWARD_AND_FORM = 40.0, 50.0      # runs 10, forward values 30; shapes and dtype 10
SECONDS = 0.7
SECRET = "GRADER_SECRET_OF_THIS_TEST"
isolated = pytest.mark.skipif(os.getuid() != 0, reason="without root the sandbox hides no files here")


def rmsnorm(backward, at_import="", forward=FORWARD):
    """A file to hand in: the right forward, a backward of one's own, given as the lines of its body."""
    body = textwrap.indent(textwrap.dedent(backward).strip("\n"), "    ")
    return (f'"""RMSNorm.\n\nDerivation: whiteboard/basics/rmsnorm.md\n"""\nimport ctypes, os, signal, socket, sys, threading, time\nimport numpy as np\n'
            f"ctypes.CDLL(None).prctl(15, b'hostile')\n{textwrap.dedent(at_import)}\n\n{forward}\n\ndef rmsnorm_backward(dy, cache):\n    g, r, x_hat = cache\n{body}\n")


def tries(*attempts):
    """Lines that try one thing after the other, whatever becomes of it, and then give up."""
    return "".join(f"try:\n    {attempt}\nexcept OSError:\n    pass\n" for attempt in attempts) + "return dy, dy"


RIGHT = """
    dg = (dy * x_hat).reshape(-1, g.size).sum(axis=0)
    dx_hat = dy * g
    return (dx_hat - x_hat * np.mean(dx_hat * x_hat, axis=-1, keepdims=True)) / r, dg
"""
BORROW = f"""
    try:
        namespace = {{"__name__": "borrowed", "__package__": "x"}}
        exec(open({str(ROOT / FILE)!r}).read(), namespace)
        return namespace["rmsnorm_backward"](dy, cache)
    except OSError:
        return dy, dy
"""
SOLVED = f"""
    sys.path.insert(0, {str(ROOT)!r})
    for name in [name for name in sys.modules if name.startswith("minideepseek")]:
        del sys.modules[name]
    from minideepseek.basics import rmsnorm
    return rmsnorm.rmsnorm_backward(dy, cache)
"""
FORGE = """
    import json
    array = {"dtype": "float64", "shape": [3, 4], "bytes": "AAAA"}
    for fd in range(64):
        try:
            os.write(fd, "".join(json.dumps(["backward", 0, result]) + "\\n" for result in ("right", [array], None)).encode())
        except OSError:
            pass
    json.dumps = lambda *_: '["backward", 0, [null, null]]'
    sys.modules["minideepseek.classroom.worker"] = sys.modules["json"] = sys
    sys.modules["minideepseek.classroom.judge"] = None
"""
DAEMON = """
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(60)
        os._exit(0)
    return dy, dy
"""
FORKS = """
    while True:
        try:
            os.fork()
        except OSError:
            pass
"""
THREADS = """
    for _ in range(100_000):
        threading.Thread(target=time.sleep, args=(60,)).start()
    return dy, dy
"""
CUT = """
    for fd in range(4096):
        try:
            os.ftruncate(fd, 0)
        except OSError:
            pass
    return dy, dy
"""
EQUAL_ARRAY = """
    class Equal(np.ndarray):
        __eq__ = __le__ = __sub__ = lambda *_: True
    return np.zeros_like(x_hat).view(Equal), np.zeros_like(g).view(Equal)
"""
EQUAL_OBJECT = """
    class Equal:
        __eq__ = __array__ = lambda *_: True
    return Equal(), Equal()
"""
PICKLE = """
    class Evil:
        def __reduce__(self):
            return os.system, ("touch /tmp/pickled",)
    return np.array([Evil()], dtype=object), g
"""
ENVIRONMENT = f"""
    if {SECRET!r} in os.environ or os.path.exists("/proc/self/environ") and {SECRET!r} in open("/proc/self/environ").read():
        {RIGHT.strip().replace(chr(10), chr(10) + "    ")}
    return dy, dy
"""
LOOP = "while True:\n    pass"
DEAF = "for name in (signal.SIGTERM, signal.SIGINT, signal.SIGXCPU, signal.SIGALRM):\n    signal.signal(name, signal.SIG_IGN)"
LYING = "np.allclose = np.array_equal = np.all = lambda *_, **__: True\nnp.isfinite = np.abs = lambda x: x == x"
PLACES = ("results.json", "/results.json", "/autograder/results/results.json", "../results.json", "/minideepseek/basics/linear.py", "/tmp/x")
HOSTILE = {   # {name: (file, what its honest part deserves)}
    "infinite loop": (rmsnorm(LOOP), FORWARD_ONLY),
    "ignores SIGTERM": (rmsnorm(LOOP, DEAF), FORWARD_ONLY),
    "sys.exit(0)": (rmsnorm("sys.exit(0)"), FORWARD_ONLY),
    "os._exit(0)": (rmsnorm("os._exit(0)"), FORWARD_ONLY),
    "KeyboardInterrupt": (rmsnorm("raise KeyboardInterrupt"), FORWARD_ONLY),
    "a crash": (rmsnorm("ctypes.string_at(0)"), FORWARD_ONLY),
    "prints 1 GB": (rmsnorm("for _ in range(1000):\n    print('x' * 1_000_000)\nreturn dy, dy"), FORWARD_ONLY),
    "allocates 64 GB": (rmsnorm("huge = np.ones(8 << 30)\nreturn huge, huge"), FORWARD_ONLY),
    "forks": (rmsnorm(FORKS), FORWARD_ONLY),
    "background process": (rmsnorm(DAEMON), FORWARD_ONLY),
    "patches numpy.allclose": (rmsnorm("return 0 * x_hat, 0 * g", LYING), FORWARD_AND_FORM),
    "an always-equal object": (rmsnorm(EQUAL_OBJECT), FORWARD_ONLY),
    "an always-equal array": (rmsnorm(EQUAL_ARRAY), FORWARD_AND_FORM),
    "reads the judge's folder": (rmsnorm(BORROW), FORWARD_ONLY),
    "imports the solution": (rmsnorm(SOLVED), FORWARD_ONLY),
    "forges the result file": (rmsnorm(tries(*(f"open({place!r}, 'w').write('{{\"score\": 100}}')" for place in PLACES))), FORWARD_ONLY),
    "pickle": (rmsnorm(PICKLE), FORWARD_ONLY),
    "NaN": (rmsnorm("return np.nan * x_hat, np.nan * g"), FORWARD_ONLY),
    "a scalar": (rmsnorm("return 0.0, 0.0"), FORWARD_ONLY),
    "import-time loop": (rmsnorm(RIGHT, LOOP), 0.0),
    "syntax error": (rmsnorm("return ("), 0.0),
    "kills its parent": (rmsnorm(tries("os.kill(os.getppid(), 9)", "os.kill(-1, 9)", "os.kill(1, 9)", "os.killpg(os.getpgid(os.getppid()), 9)")), FORWARD_ONLY),
    "opens many files": (rmsnorm("files = [open('/minideepseek/__init__.py') for _ in range(100_000)]\nreturn dy, dy"), FORWARD_ONLY),
    "writes outside its folder": (rmsnorm("\n".join(f"open({place!r}, 'w')" for place in PLACES) + textwrap.dedent(RIGHT)), FORWARD_ONLY),
    "thread bomb": (rmsnorm(THREADS), FORWARD_ONLY),
    "deep recursion": (rmsnorm("sys.setrecursionlimit(10 ** 9)\nreturn rmsnorm_backward(dy, cache)"), FORWARD_ONLY),
    "huge output": (rmsnorm("return np.zeros((5000, 5000)), g"), FORWARD_ONLY),
    "wrong dtype": (rmsnorm(RIGHT.replace("return (dx", "return np.float32((dx").replace("/ r, dg", "/ r), np.float32(dg)")), FORWARD_ONLY + 10),   # the slopes fit
    "modifies its inputs": (rmsnorm(RIGHT, forward=FORWARD.replace("    r = ", "    x *= 1.0\n    r = ")), 0.0),
    "forges answers": (rmsnorm("return dy, dy", FORGE), 0.0),
    "cuts off the answers": (rmsnorm(CUT), 0.0),
    "network": (rmsnorm("socket.create_connection(('127.0.0.1', PORT), timeout=0.5).sendall(b'hello')\nreturn dy, dy"), FORWARD_ONLY),
    "reads the environment": (rmsnorm(ENVIRONMENT), FORWARD_ONLY),
    "binary garbage": (bytes(range(256)) * 8, 0.0),
    "UTF-16 with a mark": (rmsnorm(RIGHT).encode("utf-16"), 0.0),
    "UTF-8 with a mark": (rmsnorm(RIGHT).encode("utf-8-sig"), 100.0),
    "null bytes": (rmsnorm(RIGHT).encode() + b"\0", 0.0),
    "too large": (rmsnorm(RIGHT) + "#" * LARGEST, 0.0),
}
STYLES = {
    "the book": RIGHT,
    "einsum": """
        dx_hat = np.einsum("...i,i->...i", dy, g)
        inner = np.einsum("...i,...i->...", dx_hat, x_hat)[..., None] / g.size
        return (dx_hat - x_hat * inner) / r, np.einsum("mi,mi->i", dy.reshape(-1, g.size), x_hat.reshape(-1, g.size))
    """,
    "loops": """
        dx, dg = np.zeros_like(dy), np.zeros_like(g)
        for place in np.ndindex(dy.shape[:-1]):
            inner = sum(dy[place][i] * g[i] * x_hat[place][i] for i in range(g.size)) / g.size
            for i in range(g.size):
                dg[i] += dy[place][i] * x_hat[place][i]
                dx[place][i] = (dy[place][i] * g[i] - x_hat[place][i] * inner) / r[place][0]
        return dx, dg
    """,
    "float64 scalars": """
        D = np.float64(g.size)
        dx_hat = dy * g
        return (dx_hat - x_hat * (dx_hat * x_hat).sum(-1, keepdims=True) / D) / r, np.float64(1) * (dy * x_hat).reshape(-1, g.size).sum(0)
    """,
    "in place on own copies": """
        out = dy * g
        out -= x_hat * np.mean(out * x_hat, axis=-1, keepdims=True)
        out /= r
        total = dy.copy()
        total *= x_hat
        return out, total.reshape(-1, g.size).sum(0)
    """,
    "helper functions": """
        def gain(d):
            return (d * x_hat).sum(tuple(range(d.ndim - 1)))

        def through(p):
            return p / r - x_hat * (p * x_hat).mean(-1, keepdims=True) / r

        return through(dy * g), gain(dy)
    """,
    "a Jacobian": """
        J = (np.eye(g.size) - x_hat[..., :, None] * x_hat[..., None, :] / g.size) / r[..., None]
        return (J @ (dy * g)[..., None])[..., 0], np.add.reduce((dy * x_hat).reshape(-1, g.size))
    """,
    "turned arrays": """
        dx_hat = np.asfortranarray(dy * g)
        both = np.stack([dx_hat, x_hat * (dx_hat * x_hat).mean(-1, keepdims=True)])
        return (both[0] - both[1]) / r, np.moveaxis(dy * x_hat, -1, 0).reshape(g.size, -1).sum(1)
    """,
}
OWN_CACHE = """def rmsnorm_forward(h, gain, *, eps=1e-6):
    size = np.sqrt(np.square(h).mean(-1) + np.asarray(eps, h.dtype))
    return gain * h / size[..., None], {"h": h, "gain": gain, "size": size}


def rmsnorm_backward(grad, saved):
    h, gain, size = saved["h"], saved["gain"], saved["size"][..., None]
    p = grad * gain
    dh = p / size - h * (p * h).sum(-1, keepdims=True) / (h.shape[-1] * size ** 3)
    return (dh, (grad * h / size).reshape(-1, gain.size).sum(0))
"""


@pytest.fixture(scope="module")
def listener():
    """A server on this machine that nobody in the sandbox may reach."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        yield server


@pytest.fixture(scope="module", autouse=True)
def without_scipy():
    """RMSNorm does not need it, and importing it takes longer than the rest of a grading."""
    names = ["socket", *(name for name in sandbox.libraries() if not name.startswith("scipy"))]         # socket: one of the hostile ones wants it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "libraries", lambda: names)
        yield


def hand_in(folder, content, name=FILE):
    Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
    Path(folder, name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.fixture(scope="module")
def graded(request, tmp_path_factory, listener):
    """{name: (outcome, seconds)} of the submissions that were asked for, under way two at a time."""
    os.environ[SECRET] = "1"
    files = {name: content.replace("PORT", str(listener.getsockname()[1])) if name == "network" else content for name, (content, _) in HOSTILE.items()}
    files |= {f"style: {name}": rmsnorm(body) for name, body in STYLES.items()}
    files["style: another cache"] = rmsnorm("", forward="").split("\n\ndef rmsnorm_backward")[0] + OWN_CACHE

    def one(name, folder):
        began = time.monotonic()
        return grade(folder, ONE, seconds=10 if name.startswith("style") else SECONDS, files=FILES), time.monotonic() - began

    wanted = [item.callspec.params["name"] for item in request.session.items if item.module is request.module and "graded" in item.fixturenames and hasattr(item, "callspec")]
    wanted = dict.fromkeys([*wanted, "style: another cache"])       # an honest one in any case: what a grading takes on this machine
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(one, name, hand_in(tmp_path_factory.mktemp("submission"), files[name])) for name in wanted}
    del os.environ[SECRET]


@isolated
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_submission_gets_what_its_honest_part_deserves(name, graded):
    outcome, seconds = graded[name].result()
    assert outcome["score"] == pytest.approx(HOSTILE[name][1]), report(outcome)
    assert outcome["tests"] and "could not be graded" not in outcome["output"]
    honest = max(future.result()[1] for other, future in graded.items() if other.startswith("style"))
    assert seconds < honest + SECONDS + 1            # its limit and one second, beside what starting the sandbox and grading take anyway


@pytest.mark.parametrize("name", [*(f"style: {name}" for name in STYLES), "style: another cache"])
def test_a_right_solution_in_any_style_gets_everything(name, graded):
    outcome, _ = graded[name].result()
    assert outcome["score"] == pytest.approx(100), report(outcome)


def hostile_processes():
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            found += [path.parent.name] * (path.read_text().strip() == "hostile")
    return found


@isolated
def test_nobody_outlives_the_grader_and_nobody_reached_the_network(graded, listener):
    for outcome in graded.values():
        outcome.result()
    assert hostile_processes() == [] and not Path("/tmp/pickled").exists()
    with pytest.raises(BlockingIOError):
        listener.accept()


@isolated
@pytest.mark.parametrize("namespaces", (True, False))
def test_a_process_in_the_background_lives_while_it_is_graded_and_not_longer(tmp_path, namespaces):
    """Seen alive first, or this test could not fail; without namespaces the whole user is killed instead."""
    seen, over = [], threading.Event()

    def watch():
        while not over.wait(0.02):
            seen.extend(hostile_processes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    hand_in(tmp_path, rmsnorm(DAEMON.replace("return dy, dy", "time.sleep(60)")))
    outcome = grade(tmp_path, ONE, seconds=0.5, files=FILES, namespaces=namespaces)
    left = hostile_processes()
    over.set()
    watcher.join()
    assert len(set(seen)) >= 2 and left == [] and outcome["score"] == FORWARD_ONLY
    assert outcome["extra_data"]["walls"] == {"files": True, "network": namespaces}
    assert ("no wall around network" in report(outcome)) is not namespaces


def spoil_link(folder):
    Path(folder, "minideepseek/basics").mkdir(parents=True)
    Path(folder, FILE).symlink_to(ROOT / FILE)


def spoil_folder_link(folder):
    Path(folder, "minideepseek").symlink_to(ROOT / "minideepseek")


def spoil_pipe(folder):
    os.mkfifo(Path(folder, "rmsnorm.py"))


def spoil_directory(folder):
    Path(folder, "rmsnorm.py").mkdir()


@pytest.mark.parametrize("spoil, words", [(spoil_link, "a symbolic link"), (spoil_folder_link, "a symbolic link"), (spoil_pipe, "not a regular file"),
                                          (spoil_directory, "Is a directory"), (lambda folder: None, "not handed in")])
def test_only_regular_files_are_taken(tmp_path, spoil, words):
    spoil(tmp_path)
    handed, notes = collect(tmp_path, ONE)
    assert handed == {} and len(notes) == 1 and words in notes[0]


def test_only_the_files_that_are_asked_for_are_taken(tmp_path):
    for name in (FILE, "minideepseek/classroom/worker.py", "minideepseek/classroom/judge.py", "numpy.py", "sitecustomize.py"):
        hand_in(tmp_path, "raise SystemExit", name)
    assert collect(tmp_path, ONE) == ({FILE: "raise SystemExit"}, [])


def test_a_file_at_the_top_counts_unless_it_lies_at_its_place_too(tmp_path):
    hand_in(tmp_path, "top", "rmsnorm.py")
    assert collect(tmp_path, ONE)[0] == {FILE: "top"}
    hand_in(tmp_path, "place")
    assert collect(tmp_path, ONE)[0] == {FILE: "place"}


def test_an_empty_submission_scores_nothing_and_every_check_fails(tmp_path):
    outcome = grade(tmp_path, ONE, files=FILES)
    assert outcome["score"] == 0 and {test["status"] for test in outcome["tests"]} == {"failed"} and "not handed in" in outcome["output"]


@pytest.mark.parametrize("lines", [
    b"", b"nonsense", b"[" * 100_000, b'["forward", 0, {"a": 1}]', b'["forward", 0, [1.0]]', b'["forward", 0, ["text"]]', b'["backwards", 0, []]'[:9],
    b'["forward", [], "x"]', b'["slopes", 0, null]', b'[{}, 0, "x"]', b'["forward", 1e999, "x"]', b"9" * 10_000, b"\xff\xfe",
    b'["forward", 0, [{"dtype": "object", "shape": [1], "bytes": "AAAAAAAAAAA="}]]', b'["forward", 0, [{"dtype": "float64", "shape": [9], "bytes": "AAAA"}]]',
    b'["forward", 0, [{"dtype": "float64", "shape": "x", "bytes": 7}]]', b'["forward", 0, [{"dtype": ["float64"], "shape": [0], "bytes": ""}]]'])
def test_a_line_of_another_form_is_no_answer(lines):
    assert read_answers(lines) == {}


def test_answers_are_read_and_words_made_printable():
    assert read_answers(b'x\n["forward", 2, "Error: \\u001b[31m \\ud800"]') == {("forward", 2): "Error:  [31m  "}
    line = json.dumps(["backward", 0, pack([np.arange(3.0), None])]).encode()
    assert (read_answers(line)["backward", 0][0] == [0, 1, 2]).all() and read_answers(line)["backward", 0][1] is None


def test_results_are_written_whatever_happens(tmp_path, capsys, monkeypatch):
    results = tmp_path / "results.json"
    assert grade_submission(tmp_path / "missing", "3-rope", results) == 2
    assert "no such folder" in json.loads(results.read_text())["output"] and json.loads(results.read_text())["score"] == 0
    monkeypatch.setattr(module, "run", lambda *_: 1 / 0)
    assert grade_submission(tmp_path, "3-rope", results) == 2
    assert "ZeroDivisionError" in json.loads(results.read_text())["output"]
    monkeypatch.setattr(module, "grade", lambda *_, **__: exec("raise KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        grade_submission(tmp_path, "3-rope", results)
    assert "stopped before it ended" in json.loads(results.read_text())["output"]
    with pytest.raises(ExerciseError, match="no assignment '9-none': there are 1-tape"):
        grade_submission(tmp_path, "9-none", results)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_results_are_whole_or_not_there(tmp_path, monkeypatch):
    write_results(tmp_path / "results.json", {"score": 1.0})
    monkeypatch.setattr(os, "replace", lambda *_: exec("raise OSError('no space')"))
    with pytest.raises(OSError):
        write_results(tmp_path / "results.json", {"score": 2.0})
    assert json.loads((tmp_path / "results.json").read_text()) == {"score": 1.0}


def test_a_submission_is_graded_on_questions_of_its_own(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "run", lambda root, jobs, *_: asked.append(jobs) or [(b"[]", b"")] * len(jobs))
    for _ in range(2):
        assert "the sandbox did not start" in grade(tmp_path, ONE, files=FILES)["output"]
    assert asked[0] != asked[1] and "expected" not in asked[0][0]
