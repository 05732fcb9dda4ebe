"""The recorded session of the page for students: planted, walked again, and compared with what is printed there."""
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.house import ROOT, read

PAGE = read("whiteboard/students.md")
SESSIONS = re.findall(r"^```console\n(.*?)^```$", PAGE, re.M | re.S)
KEYS = [                                  # what the reader has to find in each of them, digit by digit
    ["mla_backward             WRONG: mla_backward: dx["],
    ["  checked in place: right: dW_DQ dg_q dW_UQ dW_QR dW_KR dW_UK dW_UV dW_O", "mla.md eq. 24", "mla.md eq. 25", "mla.md eq. 32"],
    ["mla_backward()\n-> H, N = cache.n_heads", "  dc_kv = dc_v\n", "[0, 0, 0, ... 0] mean 0 std 0"],
]


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What the three sessions print on a copy in which the line of the page is planted, without the path of the copy."""
    copy = tmp_path_factory.mktemp("students") / "planted"
    for part in ("minideepseek", "examples"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    right = re.search(r"find the line\n\n```\n(.*)\n```", PAGE)[1]
    wrong = re.search(r"and let it say `(.*?)`", PAGE)[1]
    source = (copy / "minideepseek/attention/mla.py").read_text(encoding="utf-8")
    assert source.count(right) == 1, "the line on the page is no longer that of mla.py"
    (copy / "minideepseek/attention/mla.py").write_text(source.replace(right.split("  #")[0].strip(), wrong), encoding="utf-8")

    def walk(session):
        words = shlex.split(session.splitlines()[0].removeprefix("$ "))
        settings = dict(word.split("=", 1) for word in words if "=" in word)
        commands = re.findall(r"^\(Pdb\) (.*)$", session, re.M)
        run = subprocess.run([sys.executable, *words[len(settings) + 1:]], input="\n".join(commands) + "\n", cwd=copy, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | settings, timeout=60)
        return run.stdout.replace(f"{copy}{os.sep}", "").replace("(Pdb) ", "")       # pdb does not repeat what is piped in

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(walk, SESSIONS))


@pytest.mark.parametrize("number", range(3))
def test_a_session_prints_what_the_page_shows(number, printed):
    """Line by line and in this order; of numbers only that there is one, since their last digits are the machine's."""
    def form(line):
        return re.sub(r"[-+]?\d[\d.]*(e[-+]?\d+)?", "#", line)

    rest = [form(line) for line in printed[number].splitlines()]
    for line in SESSIONS[number].splitlines():
        if line != "..." and not line.startswith(("$ ", "(Pdb) ")):
            assert form(line) in rest, f"not printed, or not in this order: {line}\n{printed[number]}"
            rest = rest[rest.index(form(line)) + 1:]
    assert "***" not in printed[number]


@pytest.mark.parametrize("number", range(3))
def test_the_clues_are_there_on_the_page_and_in_the_debugger(number, printed):
    for key in KEYS[number]:
        assert key in printed[number] and key in SESSIONS[number], key


def test_the_page_names_no_machine():
    assert len(SESSIONS) == 3 and not re.search(r"(?<![\w.])/(home|tmp|work|usr|root)/", PAGE)
