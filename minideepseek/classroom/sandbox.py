"""The sandbox: a process in which a stranger's code sees no file but its own, lives for some seconds, and leaves nobody behind.

Derivation: whiteboard/classroom/sandbox.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import contextlib
import ctypes
import importlib
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIBRARIES = ("numpy.linalg numpy.fft numpy.random numpy.polynomial scipy.sparse scipy.special ml_dtypes cmath collections copy dataclasses enum "
             "fractions functools heapq itertools math operator random statistics string struct typing warnings").split()
MOST_BYTES = 1 << 23         # in one file, and of one answer
STARTUP = 60                 # seconds for the imports, on a slow machine
NOBODY = 65534


def run(root, jobs, seconds, namespaces=True):
    """Hand each text of `jobs` to worker.main under `root`, in a process of its own; return (bytes left in its place, bytes written) of each.

    root: a folder that holds the package and nothing else   seconds: for each job; imports of LIBRARIES are not counted
    namespaces: False does without them, as systems do that have none
    What is left in place of the text is from worker.main itself, before it ran a line of a student; the rest may be anyone's.
    """
    os.chmod(root, 0o755)                                # another user is to read it
    files = [(tempfile.TemporaryFile(), tempfile.TemporaryFile()) for _ in jobs]
    for (question, _), text in zip(files, jobs):
        question.write(text.encode())
        question.seek(0)
    fds = [(question.fileno(), answer.fileno()) for question, answer in files]
    uid = (1 << 30) + secrets.randbelow(1 << 30)         # a user whom nobody else is
    start = (f"import sys; sys.path.insert(0, {str(root)!r}); from minideepseek.classroom.sandbox import serve; "
             f"serve({libraries()}, {str(root)!r}, {uid}, {fds}, {float(seconds)}, {namespaces})")
    server = subprocess.Popen([sys.executable, "-I", "-c", start], env={"OPENBLAS_NUM_THREADS": "1"}, start_new_session=True, pass_fds=sum(fds, ()),
                              stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        server.wait(len(jobs) * (seconds + 1) + STARTUP)
    finally:
        server.kill()
        server.wait()
        found = [[file.seek(0) or file.read(MOST_BYTES) for file in pair] for pair in files]
        for file in sum(files, ()):
            file.close()
    return found


def libraries():
    """What is imported before the walls close, since the files are out of reach inside: LIBRARIES, and what this package imports itself."""
    files = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.parent.glob("*/*.py")]
    ours = {name for text in files for name in re.findall(r"^(?:import|from) ([a-z][\w.]+)", text, re.M)}
    return sorted({*LIBRARIES, *(name for name in ours if not name.startswith("minideepseek"))})


def serve(names, root, uid, fds, seconds, namespaces):
    """In the server: one process after another. Neither it nor the keeper of a process imports a line of a student."""
    for name in names:
        importlib.import_module(name)
    for ask, reply in fds:
        keeper = os.fork()
        if not keeper:
            try:
                _keep(root, uid, ask, reply, seconds, namespaces)
            finally:
                os._exit(0)
        os.waitpid(keeper, 0)


def _keep(root, uid, ask, reply, seconds, namespaces):
    """Start the student's process, give it its seconds, kill it and every process that it left."""
    libc = ctypes.CDLL(None)
    alone = namespaces and _namespaces(libc)
    if sys.platform == "linux":
        libc.prctl(36, 1, 0, 0, 0)                       # PR_SET_CHILD_SUBREAPER: orphans become children of this process
    child = os.fork()
    if not child:
        try:
            _confine(libc, root, uid, ask, reply, seconds)
            importlib.import_module("minideepseek.classroom.worker").main(ask, reply)
        finally:
            os._exit(0)
    end = time.monotonic() + seconds
    while not os.waitpid(child, os.WNOHANG)[0]:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
        time.sleep(0.004)
    if not alone:                                        # else the first process of the namespace took all others with it
        with contextlib.suppress(OSError):
            os.killpg(child, signal.SIGKILL)
        _kill_all(uid)


def _namespaces(libc):
    """Processes, network and shared memory of its own for what is forked next; without root, in a new user namespace. Did it work?"""
    uid, gid = os.getuid(), os.getgid()
    if not hasattr(libc, "unshare") or libc.unshare(0x68000000 | (0x10000000 if uid else 0)):        # NEWPID, NEWNET, NEWIPC; NEWUSER
        return False
    for name, text in {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{gid} {gid} 1"}.items() if uid else ():
        Path("/proc/self", name).write_text(text)
    return True


def _confine(libc, root, uid, ask, reply, seconds):
    """Before the student's first line: no file but the package, no rights, no environment, little of everything."""
    import resource

    os.setsid()
    low, high = sorted((ask, reply))
    for first, last in ((3, low), (low + 1, high), (high + 1, 4096)):
        os.closerange(first, last)
    limits = {"AS": 1 << 30, "CPU": int(seconds) + 1, "FSIZE": MOST_BYTES, "NOFILE": 64, "CORE": 0} | ({} if os.getuid() else {"NPROC": 8})
    for name, limit in limits.items():
        with contextlib.suppress(ValueError):            # some systems refuse some of them
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    with contextlib.suppress(PermissionError):           # neither root nor a user namespace: the files stay readable
        os.chroot(root)
        root, sys.path[:] = "/", ["/"]
    os.chdir(root)
    _become(uid)
    if sys.platform == "linux":
        libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
        libc.prctl(38, 1, 0, 0, 0)                       # PR_SET_NO_NEW_PRIVS
    os.environ.clear()
    sys.argv, sys.dont_write_bytecode = [""], True
    for name in [name for name in sys.modules if name.startswith("minideepseek")]:
        del sys.modules[name]                            # found again under the new root


def _become(uid):
    """Root turns into that user, or into `nobody` where the system has no such number. Raises OSError when neither works."""
    if not os.getuid():
        os.setgroups([])
        try:
            os.setresgid(uid, uid, uid)
        except OSError:
            return _become(NOBODY) if uid != NOBODY else os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)


def _kill_all(uid):
    """Every process of that user; without root, every child of this process, to which orphans come. Return when they are gone."""
    if not os.getuid():
        killer = os.fork()
        if not killer:
            try:
                _become(uid)
                if os.getuid() and os.geteuid():
                    os.kill(-1, signal.SIGKILL)          # all that this user may kill: his own
            finally:
                os._exit(0)
    while True:
        if os.getuid():
            children = Path(f"/proc/self/task/{os.getpid()}/children")
            for pid in children.read_text().split() if children.exists() else ():
                os.kill(int(pid), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def demo():
    """A file that looks around, and one that never ends."""
    with tempfile.TemporaryDirectory() as root:
        for name in ("sandbox.py", "__init__.py"):
            Path(root, "minideepseek/classroom").mkdir(parents=True, exist_ok=True)
            Path(root, "minideepseek/classroom", name).write_bytes(Path(__file__).with_name(name).read_bytes())
        Path(root, "minideepseek/__init__.py").touch()
        Path(root, "minideepseek/classroom/worker.py").write_text(
            "import os, time\ndef main(ask, reply):\n    text = os.read(ask, 99).decode()\n"
            "    os.write(reply, f'{text}: user {os.getuid()}, {len(os.environ)} variables, files {os.listdir()}'.encode())\n    time.sleep(9)\n")
        began = time.monotonic()
        (_, first), (_, second) = run(root, ["one", "two"], 0.2)
        took = time.monotonic() - began
    print("inside   ", first.decode())
    print(f"claim     two processes that sleep for 9 seconds are gone after {took:.1f}, what they wrote is here: {second[:3].decode()}")
    assert took < 8 and second.startswith(b"two")


if __name__ == "__main__":
    from minideepseek.classroom.sandbox import demo  # the imported copy, so that every name exists once
    demo()
