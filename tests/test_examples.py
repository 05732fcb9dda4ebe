"""The examples run, from another folder and uninstalled; and the recipe of the first step-through holds."""
import csv
import os
import shutil
import subprocess
import sys

import pytest

from minideepseek.training.experiment import spread
from tests.house import ROOT, read

STEP = ROOT / "examples/step_through_backward.py"


def test_step_through_backward_runs_from_anywhere(tmp_path):
    run = subprocess.run([sys.executable, str(STEP)], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert all(op in run.stdout for op in ("rmsnorm", "swiglu", "add", "linear", "cross_entropy", "|dW_gate|"))


def test_the_recipe_in_its_docstring_works_in_pdb(tmp_path):
    recipe = STEP.read_text(encoding="utf-8").split("at the (Pdb) prompt:")[1].split("Questions")[0]
    commands = [line.strip().split("   ")[0] for line in recipe.splitlines() if line.strip()]
    assert commands[0] == "tbreak main" and "b rmsnorm_backward" in commands and commands[-1] == "q"
    commands = [c for command in commands for c in ([command] * 3 if command == "n" else [command])]
    run = subprocess.run([sys.executable, "-m", "pdb", str(STEP)], cwd=tmp_path, input="\n".join(commands) + "\n",
                         capture_output=True, text=True)
    assert "Error" not in run.stdout and "***" not in run.stdout, run.stdout
    assert "(4, 6)" in run.stdout and "('rmsnorm'," in run.stdout and "# eq. 6" in run.stdout


def test_the_fuzzer_finds_no_fault():
    run = subprocess.run([sys.executable, str(ROOT / "examples/fuzz_checkpoints.py"), "--files", "2000", "--seed", "1"], capture_output=True, text=True)
    assert run.returncode == 0 and "claim: 0 faults in 2000 files" in run.stdout, run.stdout + run.stderr


@pytest.mark.parametrize("name", ["01_text_to_tokens", "02_tokens_to_embeddings", "03_embeddings_to_qkv", "04_positions", "05_latent_attention",
                                  "06_mixture_of_experts", "07_multi_token_prediction", "08_the_block_and_the_model"])
def test_a_numbered_example_keeps_its_claim_and_draws(name, tmp_path):
    steps = ["--steps", "12"] if name.startswith("07") else []                 # of a training that takes half a minute
    run = subprocess.run([sys.executable, str(ROOT / f"examples/{name}.py"), "--plot", "picture.png", *steps], cwd=tmp_path, capture_output=True, text=True,
                         env=os.environ | {"OPENBLAS_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stdout + run.stderr
    assert "\nclaim " in run.stdout and "To think about:" in run.stdout
    picture = (tmp_path / "picture.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n") and len(picture) > 10_000


def test_a_process_killed_while_saving_leaves_a_whole_checkpoint():
    run = subprocess.run([sys.executable, str(ROOT / "examples/kill_while_saving.py"), "--cycles", "4"], capture_output=True, text=True)
    assert run.returncode == 0 and "claim: 0 faults in 4 kills" in run.stdout, run.stdout + run.stderr


def test_a_resumed_run_ends_in_the_same_bytes():
    run = subprocess.run([sys.executable, str(ROOT / "examples/resume_bit_for_bit.py"), "--stops", "1", "--steps", "6"], capture_output=True, text=True)
    assert run.returncode == 0 and "claim: 1 of 1 runs end in the same bytes" in run.stdout, run.stdout + run.stderr


@pytest.mark.parametrize("name", ["training_table", "attention_ladder", "balance_experiment", "expert_specialisation", "fp8_training"])
def test_an_experiment_that_was_run_prints_its_table(name, tmp_path):
    """All rows are in the CSV, so nothing is trained; the file is left as it is."""
    for path in (ROOT / "examples").glob(f"{name}*.csv"):
        shutil.copy(path, tmp_path)
    before = (tmp_path / f"{name}.csv").read_bytes()
    run = subprocess.run([sys.executable, str(ROOT / f"examples/{name}.py"), "--out", str(tmp_path / f"{name}.csv")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert " to " in run.stdout and (tmp_path / f"{name}.csv").read_bytes() == before


@pytest.mark.parametrize("name, key, columns, places", [
    ("balance_experiment", "way", ("above_floor", "max_violation_held_out", "max_violation_batch"), ("README.md", "whiteboard/moe/bias_balance.md")),
    ("expert_specialisation", "way", ("bits_last_layer",), ("whiteboard/moe/bias_balance.md",)),
    ("training_table", "variant", ("above_floor",), ("README.md",)),
    ("attention_ladder", "attention", ("above_floor",), ("README.md",)),
])
def test_what_is_written_of_an_experiment_is_in_its_csv(name, key, columns, places):
    with open(ROOT / f"examples/{name}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for place in places:
        text = read(place)
        for way in {row[key] for row in rows}:
            for column in columns:
                assert spread([row for row in rows if row[key] == way], column) in text, f"{place}: {way}, {column}"


def test_what_is_written_of_fp8_training_is_in_its_csv():
    with open(ROOT / "examples/fp8_training.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for way in {row["way"] for row in rows} - {"fp32", "fp32, another last bit"}:
        mine = ", ".join(f"{float(row['signed_percent']):+.3f}" for row in rows if row["way"] == way)
        assert all(mine in read(place) for place in ("README.md", "whiteboard/training/mixed_precision.md")), way


def test_the_dispatch_is_timed():
    run = subprocess.run([sys.executable, str(ROOT / "examples/dispatch_cost.py"), "--repeats", "1"], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.count("\n") == 9, run.stdout + run.stderr
