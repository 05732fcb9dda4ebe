"""The bug museum as a lab: every exercise shows its symptom, --fix removes it, and its path in the debugger leads to the cause."""
import os
import re
import runpy
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.house import ROOT

LAB = sorted((ROOT / "examples/bugs").glob("*.py"))
NAMES = [path.stem for path in LAB]
SHOWN = {   # what the path in the debugger brings to light, and what --fix prints of it
    "01_too_good_to_be_true": (r"array\((\[[\d, ]*\])\)[\s\S]*array\(\1\)", r"step 150   loss 2\.7"),        # shown = wanted
    "02_flat_attention": (r"\n\(Pdb\) 192\n\(Pdb\) 576\n", r"standard deviation 1\.00"),
    "03_one_key_many_heads": (r"dk_rope\[.*differ.*mla\.md eq\. 18[\s\S]*\(0\.0\)\n", r"norm says 599\.60"),
    "04_only_the_first_token": (r"array\(\[\[1\., 1\., 1\.\]\]\), array\(\[\[0\., 0\., 0\.\]\]\)", r"difference +0e\+00 +\de-16"),
    "05_a_prompt_in_pieces": (r"\[1, 0, 0, 0, 0, 0, 0, 0\]", r"0e\+00\n"),
    "06_gates_that_drift": (r"array\(\[0\.38\d+, 1\.23\d+\]\)", r"after +\[0\.546 0\.454\]"),
    "07_one_busy_expert": (r"\[307\.[\s\S]*array\(\[ 1\.,  1\., -1\., -1\.", r"step 120   MaxVio 0\.0"),
    "08_a_doubled_slope": (r"looks 2 times too large; see whiteboard/moe/balance_loss\.md eq\. 29", r"norm says 0\.0"),
    "09_two_where_one_is_right": (r"\('x', \{'x': array\(\[1\.\]\)\}, array\(\[1\.\]\)\)\n\(Pdb\) True", r"dr = 1, "),
    "10_a_check_that_passes": (r"e-1\d\)\n[\s\S]*array\(\[1\., 1\., 1\.\]\)", "is found out"),
    "11_the_common_words": (r"only rows that occur more than once in ids are wrong: a scatter that overwrites", r"gets +70 +20 +7 +2 +1\n"),
    "12_quiet_experts": (r"(?:9 +share .*\[0\.5, 0\.5\] [\s\S]*){2}", r"2\.5: the gates of a token add up to 2\.5"),
    "13_a_number_too_large": (r"made in to_fp8_forward, 13_a_number_too_large\.py:\d+: q = x\.astype", "first nan at step None"),
}


def run(path, *args):
    """In this process: what it prints, and how it ends."""
    argv, place = sys.argv[:], sys.path[:]
    sys.argv = [str(path), *args]
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = argv, place


def recipe(path):
    """-> (environment, arguments of python, commands at the prompt) of the path that its docstring shows."""
    lines = path.read_text(encoding="utf-8").split("at the prompt:\n\n")[1].split("\n\n")[0].splitlines()
    words = shlex.split(lines[0].strip().removeprefix("$ "))
    settings = dict(word.split("=", 1) for word in words if "=" in word)
    return settings, words[len(settings) + 1:], [re.split(r" {3,}", line.strip())[0] for line in lines[1:]]


@pytest.fixture(scope="module")
def sessions(request):
    """{name: what a real pdb prints when the path is walked}, two at a time."""
    def walk(path):
        settings, args, commands = recipe(path)
        return subprocess.run([sys.executable, *args], input="\n".join(commands + ["q"]) + "\n", cwd=ROOT, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | settings, timeout=60).stdout

    wanted = {item.callspec.params["path"] for item in request.session.items if "path" in getattr(getattr(item, "callspec", None), "params", {})}
    with ThreadPoolExecutor(2) as pool:
        yield {path.stem: pool.submit(walk, path) for path in LAB if path in wanted}


def test_each_exercise_is_numbered_and_listed():
    index = (ROOT / "examples/bugs/README.md").read_text(encoding="utf-8")
    assert NAMES == list(SHOWN) and [name[:2] for name in NAMES] == [f"{n:02d}" for n in range(1, len(NAMES) + 1)]
    assert re.findall(r"\]\((.*?)\.py\)", index) == NAMES


@pytest.mark.parametrize("path", LAB, ids=NAMES)
def test_the_symptom_and_its_cure(path, capsys):
    run(path)
    assert capsys.readouterr().out.endswith("\nsymptom: here\n")
    run(path, "--fix")
    cured = capsys.readouterr().out
    assert cured.endswith("\nsymptom: gone\n") and re.search(SHOWN[path.stem][1], cured), cured


@pytest.mark.parametrize("path", LAB, ids=NAMES)
def test_its_path_in_the_debugger_leads_to_the_cause(path, sessions):
    printed = sessions[path.stem].result()
    assert "***" not in printed and re.search(SHOWN[path.stem][0], printed), printed


@pytest.mark.parametrize("path", LAB, ids=NAMES)
def test_its_docstring_names_a_page(path):
    assert (ROOT / re.search(r"^Derivation: (\S+\.md)     Bug \d+ of the museum$", path.read_text(encoding="utf-8"), re.M)[1]).exists()
