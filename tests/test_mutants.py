"""The checker is proved by what it kills: every mutant of every backward, or a written reason why it may live."""
import inspect
import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.house import COMPONENTS
from tests.mutants import PLAIN_SCALINGS, cases, killed_by, mutants

# (component, operator, edit): why this edit changes nothing that a caller could see
ONE_AXIS = "the transpose of an array of one axis is itself"
COPIES = "both are copies of dy"
_mla = "return (dx, dW_DQ, dg_q, dW_UQ, dW_QR, dW_DKV, dW_KR, dg_kv, dW_UK, dW_UV, dW_O)"
_gated = "return (dx, dW_u, dW_v, dW_z, dg_q, db_q, dg_k, db_k, dW_o)"
_shared = """if hasattr(cache, 'shared'):
    dx_shared, dW_shared_gate, dW_shared_up, dW_shared_down = swiglu_backward(dy, cache.shared)
    dx = dx_routed + dx_shared"""
EQUIVALENT = {
    ("add", "swap", "(dx, dr) -> (dr, dx)  in  return (dx, dr)"): COPIES,
    ("add", "wrong variable", "dy -> dx  in  dr = dy.copy()"): COPIES,
    ("deepseek_moe", "wrong variable", f"dx_routed -> dx  in  {_shared}"): "one array under two names",
    ("deepnorm", "transpose", "dg -> dg.T  in  return (dx, df, dg, db)"): ONE_AXIS,
    ("deepnorm", "transpose", "db -> db.T  in  return (dx, df, dg, db)"): ONE_AXIS,
    ("gated_attention", "transpose", f"dg_q -> dg_q.T  in  {_gated}"): ONE_AXIS,
    ("gated_attention", "transpose", f"db_q -> db_q.T  in  {_gated}"): ONE_AXIS,
    ("gated_attention", "transpose", f"dg_k -> dg_k.T  in  {_gated}"): ONE_AXIS,
    ("gated_attention", "transpose", f"db_k -> db_k.T  in  {_gated}"): ONE_AXIS,
    ("layernorm", "transpose", "dg -> dg.T  in  return (dx, dg, db)"): ONE_AXIS,
    ("layernorm", "transpose", "db -> db.T  in  return (dx, dg, db)"): ONE_AXIS,
    ("linear", "wrong variable", "dy2d -> dy  in  dx = gemm(dy2d, W.T, role='dx').reshape(x.shape)"):
        "A @ B takes more axes too; that a gemm is handed two is tested in test_linear",
    ("mla", "transpose", f"dg_kv -> dg_kv.T  in  {_mla}"): ONE_AXIS,
    ("mtp_projection", "transpose", "dg_hidden -> dg_hidden.T  in  return (dh, de, dg_hidden, dg_embedding, dW_merge)"): ONE_AXIS,
    ("mtp_projection", "transpose", "dg_embedding -> dg_embedding.T  in  return (dh, de, dg_hidden, dg_embedding, dW_merge)"): ONE_AXIS,
    ("rmsnorm", "transpose", "dg -> dg.T  in  return (dx, dg)"): ONE_AXIS,
    ("sink_attention", "transpose", "dsink -> dsink.T  in  return (dq, dk, dv, dsink)"): ONE_AXIS,
}


@pytest.fixture(scope="module")
def verdicts():
    """[(mutant without its function, stage or exception that killed it, None for a survivor)] of the whole package."""
    longest_first = sorted(range(len(COMPONENTS)), key=lambda i: -len(inspect.getsource(COMPONENTS[i].backward)))     # keeps two processes busy to the end
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        return [verdict for part in pool.map(of_component, longest_first) for verdict in part]


def of_component(index):
    component = COMPONENTS[index]
    checked_cases = cases(component)
    return [(mutant._replace(backward=None), killed_by(component, mutant, checked_cases)) for mutant in mutants(component)]


def test_every_mutant_dies_or_is_listed_as_equivalent(verdicts):
    survivors = [mutant[:3] for mutant, killer in verdicts if killer is None and mutant[:3] not in EQUIVALENT]
    assert not survivors, "the checks let these through:\n" + "\n".join(map(repr, survivors))


def test_every_mutant_listed_as_equivalent_still_survives(verdicts):
    alive = {mutant[:3] for mutant, killer in verdicts if killer is None}
    assert EQUIVALENT.keys() <= alive, f"no longer there, or no longer alive: {EQUIVALENT.keys() - alive}"


def test_there_are_many_mutants_of_many_kinds(verdicts, capsys):
    made = Counter(mutant.operator for mutant, _ in verdicts)
    crashed = Counter(mutant.operator for mutant, killer in verdicts if isinstance(killer, str))
    alive = Counter(mutant.operator for mutant, killer in verdicts if killer is None)
    with capsys.disabled():
        print(f"\n{'operator':16s} mutants  caught  crashed  equivalent")
        for operator, n in [*made.most_common(), ("all", sum(made.values()))]:
            c, a = (crashed[operator], alive[operator]) if operator != "all" else (sum(crashed.values()), sum(alive.values()))
            print(f"{operator:16s} {n:7d} {n - c - a:7d} {c:8d} {a:11d}")
    total = sum(made.values())
    assert total >= 400
    assert sum(made[operator] for operator in PLAIN_SCALINGS) <= total / 3
    assert sum(crashed.values()) <= total / 2, "too many mutants die of a crash alone"
