import shutil

import numpy as np
import pytest

from minideepseek.__main__ import main
from minideepseek.interop.parity import compare, parity
from minideepseek.interop.safetensors import CheckpointError
from tests.house import ROOT

FIXTURES = ROOT / "tests/fixtures"


@pytest.mark.parametrize("name", ["v3-2", "v3-8", "v3-11", "v2-2", "v2-13", "v3mtp-1", "v3mtp-2"])
def test_the_public_implementation_computes_the_same(name):
    lines = parity(FIXTURES / name)
    assert {"logits", "loss"} <= {line.name for line in lines} and len(lines) > 30
    assert not [line for line in lines if not line.right]


def test_the_command_prints_and_exits_by_the_result(tmp_path, capsys):
    assert main(["parity", str(FIXTURES / "v3-11")]) == 0
    assert "v3-11  logits" in capsys.readouterr().out
    shutil.copytree(FIXTURES / "v3-11", tmp_path / "wrong")
    golden = dict(np.load(FIXTURES / "v3-11/golden.npz"))
    golden["logits"] = golden["logits"] + 2e-10
    golden["grad/lm_head.weight"] = golden["grad/lm_head.weight"] * 1.00001
    np.savez(tmp_path / "wrong/golden.npz", **golden)
    assert main(["parity", str(tmp_path / "wrong")]) == 1
    printed = capsys.readouterr().out
    assert "WRONG: beyond 1e-10" in printed and "grad/lm_head.weight" in printed
    assert main(["parity", str(FIXTURES / "v3-11"), "--every"]) == 0
    assert "grad/model.layers.0.self_attn.o_proj.weight" in capsys.readouterr().out


def test_a_folder_that_cannot_be_compared(tmp_path, capsys):
    assert main(["parity", str(tmp_path)]) == 2
    assert "is not a golden file" in capsys.readouterr().err
    np.savez(tmp_path / "golden.npz", logits=np.zeros(3))
    with pytest.raises(CheckpointError, match="holds no ids"):
        parity(tmp_path)


def test_a_gradient_we_lack_or_of_another_shape_is_wrong():
    assert not compare("grad/W", None, np.zeros(2)).right
    assert not compare("logits", np.zeros(3), np.zeros(2)).right
    assert not compare("loss", np.array(np.nan), np.array(1.0)).right
    assert compare("grad/W", np.full(2, 1e-12), np.zeros(2)).right and not compare("grad/W", np.full(2, 2e-12), np.zeros(2)).right


@pytest.mark.parametrize("kind", ["deepseek_v3", "deepseek_v2"])
@pytest.mark.parametrize("seed", range(4))
def test_random_models_of_the_public_implementation(tmp_path, kind, seed):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.public import make

    make(tmp_path, kind, seed)
    assert not [line for line in parity(tmp_path) if not line.right]
