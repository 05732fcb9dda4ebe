import shutil

import numpy as np
import pytest

from minideepseek.__main__ import main
from minideepseek.interop.parity import compare, parity
from minideepseek.interop.safetensors import CheckpointError
from tests.house import ROOT

FIXTURES = ROOT / "tests/fixtures"


@pytest.mark.parametrize("name", sorted(path.name for path in FIXTURES.glob("v*")))
def test_the_public_implementation_computes_the_same(name):
    lines = parity(FIXTURES / name)
    assert {"ids", *[line.name for line in lines]} == set(np.load(FIXTURES / name / "golden.npz"))      # nothing is left out
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
    good = (FIXTURES / "v3-11/golden.npz").read_bytes()
    for content in (b"", good[:1000], good[:300] + bytes(300) + good[600:]):
        (tmp_path / "golden.npz").write_bytes(content)
        assert main(["parity", str(tmp_path)]) == 2
    for arrays, message in (({"logits": np.zeros(3)}, "holds logits: it needs ids"), ({"ids": np.zeros((1, 2), int)}, "and something to compare")):
        np.savez(tmp_path / "golden.npz", **arrays)
        with pytest.raises(CheckpointError, match=message):
            parity(tmp_path)
    shutil.copytree(FIXTURES / "v3-11", tmp_path / "model")
    for ids, message in ((np.zeros((1, 2)), "ids must be an integer array"), (np.full((1, 2), 96), r"ids\[0, 0\] = 96 is not a token")):
        np.savez(tmp_path / "model/golden.npz", ids=ids, logits=np.zeros(1))
        with pytest.raises(CheckpointError, match=message):
            parity(tmp_path / "model")


def test_nan_is_seen_in_the_summary_and_an_unknown_array_is_wrong(tmp_path, capsys):
    shutil.copytree(FIXTURES / "v3-11", tmp_path / "model")
    golden = dict(np.load(FIXTURES / "v3-11/golden.npz"))
    np.savez(tmp_path / "model/golden.npz", ids=golden["ids"], loss=np.array(np.nan), riddle=np.zeros(3))
    assert main(["parity", str(tmp_path / "model")]) == 1
    printed = capsys.readouterr().out
    assert "loss nan" in printed and "riddle inf" in printed

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
