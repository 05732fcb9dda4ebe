import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from minideepseek.autograd.shapes import ShapeError
from minideepseek.autograd.tape import Tape, Tensor
from minideepseek.basics.swiglu import swiglu_forward
from minideepseek.moe import expert_parallel
from minideepseek.moe.expert_parallel import (
    MPI, Simulated, away, backward_ranks, combine, combine_back, compute, compute_back, cut, forward_ranks, link_bytes, pack, pack_back,
    parallel_experts, parallel_experts_backward, parallel_experts_examples, parallel_experts_forward, spans)
from minideepseek.moe.experts import experts_backward, experts_forward
from minideepseek.moe.node_limited import transfers
from tests.house import COMPONENTS, ROOT, lies
from tests.mutants import mutants

rng = np.random.default_rng(0)


def case(M=7, D=5, F=3, E=6, K=2, among=None, seed=1, dtype=np.float64):
    """Arguments and a dy; the experts are chosen among those of `among`."""
    rng = np.random.default_rng(seed)
    W = [rng.standard_normal(shape, dtype) for shape in [(E, D, F), (E, D, F), (E, F, D)]]
    among = np.arange(E) if among is None else np.array(among)
    chosen = np.array([rng.permutation(among)[:K] for _ in range(M)]).reshape(M, K)
    return (rng.standard_normal((M, D), dtype), rng.random((M, K), dtype), chosen, *W), rng.standard_normal((M, D), dtype)


def same(ours, theirs, atol=1e-12):
    for a, b in zip(ours, theirs, strict=True):
        if b is None:
            assert a is None
        else:
            assert a.shape == b.shape and a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def both(args, dy, **config):
    """[y, dx, dgate, None, dW_gate, dW_up, dW_down] of the ranks, and of one rank."""
    y, cache = parallel_experts_forward(*args, **config)
    y1, cache1 = experts_forward(*args)
    return [y, *parallel_experts_backward(dy, cache)], [y1, *experts_backward(dy, cache1)]


@pytest.mark.parametrize("n_ranks", (1, 2, 3, 4, 5, 8, 11))
@pytest.mark.parametrize("sizes", (
    {}, {"K": 1}, {"K": 6}, {"M": 1}, {"M": 2}, {"M": 64}, {"E": 1, "K": 1}, {"E": 8, "K": 3},
    {"among": [0, 5]}, {"among": [3], "K": 1}, {"E": 9, "among": [4, 5, 6]}), ids=str)
def test_equal_to_one_rank(sizes, n_ranks):
    """Ragged shares, more ranks than tokens or experts, experts and whole ranks that nobody asks."""
    same(*both(*case(**sizes), n_ranks=n_ranks))


def test_equal_to_one_rank_with_leading_axes_and_in_float32():
    (x, gate, chosen, *W), dy = case(M=12)
    args = x.reshape(3, 4, 5), gate.reshape(3, 4, 2), chosen.reshape(3, 4, 2), *W
    same(*both(args, dy.reshape(3, 4, 5), n_ranks=5))
    same(*both(*case(dtype=np.float32), n_ranks=3), atol=1e-5)


def test_equal_to_a_loop_over_tokens_and_choices():
    (x, gate, chosen, *W), _ = case()
    y, _ = parallel_experts_forward(x, gate, chosen, *W, n_ranks=3)
    plain = np.zeros_like(y)
    for m, k in np.ndindex(chosen.shape):
        plain[m] += gate[m, k] * swiglu_forward(x[m], *[w[chosen[m, k]] for w in W])[0]
    np.testing.assert_allclose(y, plain, atol=1e-12)


def shared_out(args, dy, homes, owned):
    """What each rank holds, tokens and experts shared out as we please."""
    x, gate, chosen, *W = args
    return [(x[h], gate[h], chosen[h]) for h in homes], [[w[own] for w in W] for own in owned], [dy[h] for h in homes]


def slices(*lengths):
    return [slice(end - n, end) for n, end in zip(lengths, np.cumsum(lengths))]


@pytest.mark.parametrize("homes, owned", (
    (slices(7, 0, 0), slices(0, 0, 6)), (slices(0, 6, 1), slices(1, 5, 0)), (slices(2, 2, 3), slices(0, 1, 5)), (slices(0, 0, 7), slices(6, 0, 0))))
def test_any_sharing_out_of_tokens_and_experts(homes, owned):
    """Tokens on one rank, all experts on another; a rank that only computes; a rank with nothing at all."""
    args, dy = case()
    tokens, weights, dys = shared_out(args, dy, homes, owned)
    ys, cache = forward_ranks(Simulated(3), tokens, weights, owned)
    dxs, dgates, dWs = backward_ranks(Simulated(3), dys, cache)
    y, alone = experts_forward(*args)
    dx, dgate, _, *dW = experts_backward(dy, alone)
    for r, (home, own) in enumerate(zip(homes, owned)):
        same([ys[r], dxs[r], dgates[r], *dWs[r]], [y[home], dx[home], dgate[home], *[w[own] for w in dW]])


def test_the_gradient_of_an_idle_rank_is_exactly_zero():
    args, dy = case(among=[0, 1, 5])
    _, cache = parallel_experts_forward(*args, n_ranks=3)
    *_, dW_gate, dW_up, dW_down = parallel_experts_backward(dy, cache)
    for dW in (dW_gate, dW_up, dW_down):
        assert not dW[2:5].any() and dW[[0, 1, 5]].any(axis=(1, 2)).all()


class Recording(Simulated):
    """Simulated, and the bytes of every exchange."""

    def __init__(self, n_ranks):
        super().__init__(n_ranks)
        self.seen = []

    def all_to_all(self, parcels):
        self.seen.append(np.array([[p.nbytes for p in line] for line in parcels]))
        return super().all_to_all(parcels)


@pytest.mark.parametrize("dtype", (np.float64, np.float32))
def test_two_exchanges_of_rows_forward_two_backward_and_their_bytes(dtype):
    args, dy = case(M=23, E=7, K=3, dtype=dtype)
    R, comm = 4, Recording(4)
    owned = spans(7, R)
    tokens, weights, dys = shared_out(args, dy, spans(23, R), owned)
    _, cache = forward_ranks(comm, tokens, weights, owned)
    backward_ranks(comm, dys, cache)
    counts, dispatch, combined, dcombined, ddispatch = comm.seen
    expected = link_bytes(args[2], n_experts=7, n_ranks=R, row_bytes=5 * np.dtype(dtype).itemsize)
    assert (dispatch == expected).all() and (combined == expected.T).all() and expected.sum() == 23 * 3 * 5 * np.dtype(dtype).itemsize
    assert (dcombined == dispatch).all() and (ddispatch == combined).all()              # the gradients take the same roads
    assert (cache.dispatch_bytes == dispatch).all() and (cache.combine_bytes == combined).all()
    assert (counts == [[8 * (own.stop - own.start) for own in owned]] * R).all()        # one int64 per expert


def test_an_all_to_all_twice_is_none():
    comm, parcels = Simulated(3), [[f"{r} to {q}" for q in range(3)] for r in range(3)]
    arrived = comm.all_to_all(parcels)
    assert arrived[2] == ["0 to 2", "1 to 2", "2 to 2"] and comm.all_to_all(arrived) == parcels


def test_the_gate_stays_at_home_and_each_expert_runs_once():
    (x, gate, chosen, *W), _ = case(M=6, E=4)
    runs = []

    def gemm(A, B, *, role):
        runs.append(len(A))
        return A @ B

    y, cache = parallel_experts_forward(x, gate, chosen, *W, n_ranks=2, gemm=gemm)
    assert sorted(runs) == sorted(3 * np.bincount(chosen.ravel()).tolist())             # three products an expert, all ranks' rows at once
    y2, cache2 = parallel_experts_forward(x, 2 * gate, chosen, *W, n_ranks=2)
    np.testing.assert_allclose(y2, 2 * y, atol=1e-13)
    for (one, _), (two, _) in zip(cache.ranks.compute, cache2.ranks.compute):
        assert one.y_sorted.tobytes() == two.y_sorted.tobytes()                         # the experts never saw it


def test_spans_cover_everything_once_and_evenly():
    for n in range(20):
        for n_ranks in range(1, 9):
            shares = spans(n, n_ranks)
            lengths = [s.stop - s.start for s in shares]
            assert [i for s in shares for i in range(n)[s]] == list(range(n)) and len(shares) == n_ranks
            assert max(lengths) - min(lengths) <= 1


def test_packing_by_hand():
    """Experts 0 and 1 on rank 0, 2 on rank 1, none on rank 2. Flat chosen 2 0 1 2: sorted 0 1 2 2, the equal ones in order."""
    parcels, counts, order = pack(np.array([[5.0], [7.0]]), np.array([[2, 0], [1, 2]]), slices(2, 1, 0))
    assert order.tolist() == [1, 2, 0, 3]
    assert [p.tolist() for p in parcels] == [[[5], [7]], [[5], [7]], []] and parcels[2].shape == (0, 1)
    assert [n.tolist() for n in counts] == [[1, 1], [2], []]


def test_bytes_by_hand_and_once_per_rank():
    """Two ranks of two experts, three tokens: the first on rank 0, two on rank 1."""
    chosen = np.array([[2, 3], [0, 1], [1, 2]])
    sizes = {"n_experts": 4, "n_ranks": 2, "row_bytes": 10}
    assert link_bytes(chosen, **sizes).tolist() == [[0, 20], [30, 10]]
    assert link_bytes(chosen, **sizes, once_per_rank=True).tolist() == [[0, 10], [20, 10]]
    assert link_bytes(chosen.reshape(3, 1, 2), **sizes).tolist() == [[0, 20], [30, 10]]
    assert away(link_bytes(chosen, **sizes)) == 50 and link_bytes(chosen[:0], **sizes).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("once", (False, True))
def test_bytes_are_the_copies_that_node_limited_routing_counts(once):
    chosen = np.array([rng.permutation(12)[:5] for _ in range(50)])
    home = np.repeat(range(4), [s.stop - s.start for s in spans(50, 4)])
    sent = link_bytes(chosen, n_experts=12, n_ranks=4, row_bytes=3, once_per_rank=once)
    assert away(sent) == 3 * transfers(chosen, home, 12, 4, fan_out=once).sum()
    if once:
        assert (sent <= 3 * np.diff(np.append(0, [s.stop for s in spans(50, 4)]))[:, None]).all()     # at most one row per token


STAGES = (combine_back, compute_back, pack_back, backward_ranks, cut)


def works(args, dys, expected):
    """Are all gradients right, of the right dtype, in memory of their own, and dy untouched?"""
    for (y, cache), dy, (theirs, atol) in zip((parallel_experts_forward(*a, n_ranks=3) for a in args), dys, expected):
        dy = dy.copy()
        dy.flags.writeable = False
        ours = parallel_experts_backward(dy, cache)
        same(ours, theirs, atol)
    return True


@pytest.mark.parametrize("stage", STAGES, ids=lambda f: f.__name__)
def test_every_mutant_of_a_stage_dies(stage, monkeypatch):
    """The house mutates parallel_experts_backward; the stages beneath it are mutated here, against `experts`."""
    args, dys = zip(case(E=4, M=4), case(E=4, M=4, dtype=np.float32))
    expected = [(experts_backward(dy, experts_forward(*a)[1]), atol) for a, dy, atol in zip(args, dys, (1e-12, 1e-5))]
    assert works(args, dys, expected)
    component = next(c for c in COMPONENTS if c.name == "parallel_experts")
    survivors, n = [], 0
    for mutant in mutants(component._replace(backward=stage)):
        n += 1
        monkeypatch.setattr(expert_parallel, stage.__name__, mutant.backward)
        try:
            with np.errstate(all="ignore"):
                works(args, dys, expected)
            survivors.append(mutant.edit)
        except Exception:
            pass
    survivors = [edit for edit in survivors if "np.broadcast_to" not in edit]           # a read-only view of the same numbers: concatenated later
    assert not survivors and n >= 20


def test_the_shape_comments_of_the_stages_are_true():
    (x, gate, chosen, *W), dy = case(M=4, E=6, K=3)
    owned, letters = slices(4, 2), {"M": 4, "K": 3, "A": 12, "D": 5, "E": 6}

    def true(stage, *args, **extra):
        result, wrong, seen = lies(stage, lambda: stage(*args), letters | extra)
        assert seen and not wrong, wrong
        return result

    parcels, counts, order = true(pack, x, chosen, owned)
    N = 2 * len(parcels[1])                                                             # two senders, as it happens with the same rows
    answers, cache = true(compute, [parcels[1]] * 2, [counts[1]] * 2, *[w[owned[1]] for w in W], N=N)
    true(compute_back, answers, cache, N=N)
    _, cache = true(combine, parcels, gate, order)
    dparcels, _ = true(combine_back, dy, cache)
    true(pack_back, dparcels, order, 3)


class OfThread:
    """A communicator with one rank, as MPI is: R threads that meet in a shared table."""

    def __init__(self, rank, table, barrier):
        self.n_ranks, self.ranks, self.table, self.barrier = len(table), [rank], table, barrier

    def all_to_all(self, parcels):
        self.table[self.ranks[0]] = parcels[0]
        self.barrier.wait(5)
        arrived = [line[self.ranks[0]] for line in self.table]
        self.barrier.wait(5)
        return [arrived]


def test_one_rank_per_communicator_runs_the_same_program():
    (x, gate, chosen, *W), dy = case(M=9)
    table, barrier, found = [None] * 4, threading.Barrier(4), [None] * 4

    def run(rank):
        found[rank] = expert_parallel.compare(OfThread(rank, table, barrier), x, gate, chosen, W, dy)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for differences, dispatched, combined in found:                                     # everybody was told everything
        assert differences.shape == (4, 2) and differences.max() < 1e-12
        assert (dispatched == link_bytes(chosen, n_experts=6, n_ranks=4, row_bytes=40)).all() and (combined == dispatched.T).all()


def test_a_difference_is_noticed(monkeypatch):
    """`compare` must be able to fail, also on one rank of many, also with nan."""
    (x, gate, chosen, *W), dy = case(M=9)
    for wrong in (1.001, np.nan):
        monkeypatch.setattr(expert_parallel, "pack_back", lambda *args, wrong=wrong: pack_back(*args) * wrong)
        differences, *_ = expert_parallel.compare(Simulated(4), x, gate, chosen, W, dy)
        assert differences[:, 0].max() < 1e-12 and not differences[:, 1].max() < 1e-6


def test_over_mpi(capsys):
    """The same file under mpiexec: four processes, and what they print must be what one process prints."""
    beside = Path(sys.executable).parent
    mpiexec = shutil.which("mpiexec", path=f"{beside}{os.pathsep}{os.environ.get('PATH', '')}")
    if importlib.util.find_spec("mpi4py") is None or mpiexec is None:
        pytest.skip("needs mpi4py and mpiexec: pip install 'minideepseek[mpi]' mpich")
    # Open MPI refuses root, and more processes than cores, unless told otherwise; MPICH does not look at these
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
           "OMPI_MCA_rmaps_base_oversubscribe": "1", "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
    many = subprocess.run([mpiexec, "-n", "4", sys.executable, "-m", "minideepseek.moe.expert_parallel"],
                          cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert many.returncode == 0, many.stdout + many.stderr
    assert many.stdout.count("claim") == 1 and "4 ranks (MPI) = one rank" in many.stdout          # rank 0 alone prints
    expert_parallel.demo()
    assert capsys.readouterr().out.splitlines()[3:-1] == many.stdout.splitlines()[3:-1]           # the bytes


def test_without_mpi4py_the_line_to_type(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ImportError, match=r"pip install 'minideepseek\[mpi\]'"):
        MPI()


def test_on_the_tape():
    (args, config), *_ = parallel_experts_examples(rng).values()
    leaves = [a if a.dtype.kind == "i" else Tensor(a) for a in args]
    with Tape() as tape:
        y = parallel_experts(*leaves, **config)
    tape.backward({y: np.ones(y.data.shape)})
    assert all(leaf.grad is not None for leaf in leaves if isinstance(leaf, Tensor))


def test_an_expert_that_does_not_exist_is_named():
    (x, gate, chosen, *W), _ = case()
    chosen[1, 0] = 6
    with pytest.raises(ShapeError, match=r"parallel_experts: chosen\[1, 0\] = 6 is not in 0 .. 5"):
        parallel_experts(x, gate, chosen, *W, n_ranks=2)


@pytest.mark.parametrize("change, message", [
    ({"n_ranks": 0}, "n_ranks = 0: it takes a whole number"),
    ({"n_ranks": -2}, "n_ranks = -2"),
    ({"n_ranks": 2.0}, "n_ranks = 2.0"),
    ({"row_bytes": 0}, "row_bytes = 0"),
    ({"n_experts": 3}, "chosen has the id 3, which is not in 0 .. 2"),
    ({"chosen": np.array([[-1, 0]])}, "chosen has the id -1"),
    ({"chosen": np.array([[0.0, 1.0]])}, "chosen has dtype float64"),
])
def test_what_cannot_be_is_named(change, message):
    given = {"chosen": np.array([[0, 3]]), "n_experts": 4, "n_ranks": 2, "row_bytes": 8} | change
    with pytest.raises(ValueError, match=message):
        link_bytes(given.pop("chosen"), **given)


def test_no_ranks_no_layer():
    args, _ = case()
    with pytest.raises(ValueError, match="n_ranks = 0"):
        parallel_experts_forward(*args, n_ranks=0)
