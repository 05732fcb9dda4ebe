"""Expert parallelism: each rank keeps some tokens and some experts; two all-to-alls carry the rows there and back.

Derivation: whiteboard/moe/expert_parallel.md     Source: DeepSeek-V3, arXiv:2412.19437, sec. 3.2
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import os
from types import SimpleNamespace

import numpy as np

from minideepseek.autograd.gradcheck import report
from minideepseek.autograd.tape import op
from minideepseek.basics.linear import matmul
from minideepseek.moe.bias_balance import expert_counts
from minideepseek.moe.experts import experts_backward, experts_forward
from minideepseek.plots import experts as pictures
from minideepseek.plots.canvas import plot_path

LAUNCHED = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")          # set by the mpiexec of MPICH and its kin, and by that of Open MPI


class Simulated:
    """All ranks in this process. What r sends to q is what q receives from r: the table of parcels, transposed."""

    def __init__(self, n_ranks):
        self.n_ranks, self.ranks = n_ranks, range(n_ranks)

    def all_to_all(self, parcels):
        """parcels[r][q], packed by rank r for rank q   ->   arrived[q][r], at rank q from rank r."""
        return [list(column) for column in zip(*parcels)]


class MPI:
    """One rank in this process, the others in those that mpiexec started beside it: lists over ranks have one entry.

    Raises ImportError, with the line to type, without mpi4py.
    """

    def __init__(self):
        try:
            from mpi4py import MPI as library
        except ImportError as error:
            raise ImportError("ranks in several processes need mpi4py: pip install 'minideepseek[mpi]'") from error
        self.world = library.COMM_WORLD
        self.n_ranks, self.ranks = self.world.size, [self.world.rank]

    def all_to_all(self, parcels):
        """[[to each rank]]   ->   [[from each rank]]; every rank must call it, and waits for the others."""
        return [self.world.alltoall(parcels[0])]


def spans(n, n_ranks):
    """Who owns which of n things, in order: one slice per rank, as even as n allows; with few things some are empty.

    Raises ValueError unless n_ranks is a whole number from 1 on.
    """
    if not (isinstance(n_ranks, (int, np.integer)) and n_ranks >= 1):
        raise ValueError(f"n_ranks = {n_ranks!r}: it takes a whole number of ranks, at least 1")
    edges = [n * r // n_ranks for r in range(n_ranks + 1)]
    return [slice(start, stop) for start, stop in zip(edges, edges[1:])]


def cut(rows, lengths):
    """Rows in a line -> one parcel for each length. np.concatenate is the way back."""
    return np.split(rows, np.cumsum(lengths)[:-1])


def pack(x, chosen, owned):
    """At home, before the dispatch: sort the assignments by expert, hence by rank, and cut them into parcels.

    x: (M, D), chosen: (M, K): the tokens of one rank   owned: the experts of every rank, as slices
    -> for each rank its rows, and how many are for each of its experts; and the order
    """
    M, K = chosen.shape
    order = np.argsort(chosen.reshape(M * K), kind="stable")                            # (A,)     # eq. 1
    x_sorted = x[order // K]                                                            # (A, D)   # eq. 2
    counts = np.bincount(chosen.reshape(M * K), minlength=owned[-1].stop)               # (E,)
    counts_to = [counts[own] for own in owned]
    return cut(x_sorted, [n.sum() for n in counts_to]), counts_to, order


def compute(parcels, counts, W_gate, W_up, W_down, *, gemm=matmul):
    """At the experts: run the experts of one rank on the N rows that arrived, each with one choice and gate 1.

    parcels, counts: from each rank   W_gate, W_up, W_down: of this rank's experts   -> parcels back to each rank, cache
    """
    arrived = np.concatenate(parcels)                                                   # (N, D)   # eq. 3
    expert = np.concatenate([np.repeat(np.arange(len(W_gate)), n) for n in counts])     # (N,)     # eq. 4
    one = np.ones((len(arrived), 1), arrived.dtype)                                     # (N, 1)
    answers, cache = experts_forward(arrived, one, expert[:, None], W_gate, W_up, W_down, gemm=gemm)   # (N, D)   # eq. 5
    lengths = [len(rows) for rows in parcels]
    return cut(answers, lengths), (cache, lengths)


def combine(parcels, gate, order):
    """At home again: undo the sort, then add up the K answers of each token by gate. gate: (M, K)   -> y: (M, D), cache."""
    y_sorted = np.concatenate(parcels)                                                  # (A, D)   # eq. 6
    unsorted = np.empty_like(y_sorted)                                                  # (A, D)
    unsorted[order] = y_sorted                                                          # eq. 7
    answers = unsorted.reshape(*gate.shape, y_sorted.shape[-1])                         # (M, K, D)
    y = np.sum(gate[:, :, None] * answers, axis=1)                                      # (M, D)   # eq. 8
    return y, (gate, answers, order, [len(rows) for rows in parcels])


def combine_back(dy, cache):
    """dy: (M, D) of one rank   -> the gradient of each answer, in a parcel to the rank that gave it; dgate: (M, K)."""
    gate, answers, order, lengths = cache
    dgate = np.vecdot(dy[:, None, :], answers)                                          # (M, K)   # eq. 10
    danswers = gate[:, :, None] * dy[:, None, :]                                        # (M, K, D)   # eq. 11
    dy_sorted = danswers.reshape(-1, dy.shape[-1])[order]                               # (A, D)   # eq. 12
    return cut(dy_sorted, lengths), dgate


def compute_back(parcels, cache):
    """-> the gradient of each row that arrived, in a parcel to the rank it came from; and those of this rank's weights."""
    experts_cache, lengths = cache
    danswers = np.concatenate(parcels)                                                  # (N, D)   # eq. 13
    darrived, _, _, *dW = experts_backward(danswers, experts_cache)                     # (N, D)   # eq. 14
    return cut(darrived, lengths), dW


def pack_back(parcels, order, top_k):
    """The gradients of a rank's own rows are home: undo the sort, add up those of each token. -> dx: (M, D)."""
    dx_sorted = np.concatenate(parcels)                                                 # (A, D)   # eq. 15
    unsorted = np.empty_like(dx_sorted)                                                 # (A, D)
    unsorted[order] = dx_sorted                                                         # eq. 16
    return np.sum(unsorted.reshape(-1, top_k, dx_sorted.shape[-1]), axis=1)             # eq. 17


def forward_ranks(comm, tokens, weights, owned, *, gemm=matmul):
    """The layer, stage by stage, for the ranks that live in this process: every list has one entry for each of them.

    tokens: (x, gate, chosen) of a rank   weights: (W_gate, W_up, W_down) of its experts   owned: see pack   -> [y], cache
    cache.dispatch_bytes, cache.combine_bytes: rows sent to each rank, without the few counts that go ahead of them
    """
    parcels, counts, order = zip(*[pack(x, chosen, owned) for x, _, chosen in tokens])
    counts_here = comm.all_to_all(counts)                       # first how many, then the rows
    arrived = comm.all_to_all(parcels)                          # dispatch
    answers, computed = zip(*[compute(p, n, *W, gemm=gemm) for p, n, W in zip(arrived, counts_here, weights)])
    returned = comm.all_to_all(answers)                         # combine
    ys, combined = zip(*[combine(p, gate, o) for p, (_, gate, _), o in zip(returned, tokens, order)])
    return ys, SimpleNamespace(order=order, top_k=tokens[0][2].shape[1], compute=computed, combine=combined,
                               dispatch_bytes=bytes_of(parcels), combine_bytes=bytes_of(answers))


def backward_ranks(comm, dys, cache):
    """The forward read from the bottom up: through the same exchange, each parcel goes back where it came from.

    -> [dx], [dgate], [(dW_gate, dW_up, dW_down) of a rank's own experts]
    """
    parcels, dgates = zip(*[combine_back(dy, c) for dy, c in zip(dys, cache.combine)])
    arrived = comm.all_to_all(parcels)                          # backward of the combine: goes the way of the dispatch
    dparcels, dWs = zip(*[compute_back(p, c) for p, c in zip(arrived, cache.compute)])
    returned = comm.all_to_all(dparcels)                        # backward of the dispatch: goes the way of the combine
    return [pack_back(p, o, cache.top_k) for p, o in zip(returned, cache.order)], dgates, dWs


def bytes_of(parcels):
    """The size of every parcel: one line per rank that lives here, one column per rank it sends to."""
    return np.array([[rows.nbytes for rows in line] for line in parcels])


def parallel_experts_forward(x, gate, chosen, W_gate, W_up, W_down, *, n_ranks, gemm=matmul):
    """The experts layer on R simulated ranks, tokens and experts shared out by `spans`; equal to `experts`.

    x: (..., D)   gate: (..., K)   chosen: (..., K) int < E   W_gate: (E, D, F)   W_up: (E, D, F)   W_down: (E, F, D)
    n_ranks: R   ->   y: (..., D)
    """
    E, D, _ = W_gate.shape
    K = gate.shape[-1]
    comm, owned, homes = Simulated(n_ranks), spans(E, n_ranks), spans(gate.size // K, n_ranks)
    tokens = [(x.reshape(-1, D)[home], gate.reshape(-1, K)[home], chosen.reshape(-1, K)[home]) for home in homes]
    weights = [(W_gate[own], W_up[own], W_down[own]) for own in owned]
    ys, cache = forward_ranks(comm, tokens, weights, owned, gemm=gemm)
    y = np.concatenate(ys).reshape(x.shape)                                             # (..., D)   # eq. 9
    return y, SimpleNamespace(comm=comm, ranks=cache, homes=homes, gate_shape=gate.shape)


def parallel_experts_backward(dy, cache):
    """Cut dy as x was cut, run the ranks backward, put the pieces side by side: nothing here is owned by two ranks."""
    dys = [dy.reshape(-1, dy.shape[-1])[home] for home in cache.homes]
    dxs, dgates, dWs = backward_ranks(cache.comm, dys, cache.ranks)
    dx = np.concatenate(dxs).reshape(dy.shape)                                          # (..., D)
    dgate = np.concatenate(dgates).reshape(cache.gate_shape)                            # (..., K)
    dW_gate, dW_up, dW_down = [np.concatenate(dW) for dW in zip(*dWs)]                  # (E, D, F) (E, D, F) (E, F, D)   # eq. 18
    return dx, dgate, None, dW_gate, dW_up, dW_down


parallel_experts = op(parallel_experts_forward, parallel_experts_backward)


def link_bytes(chosen, *, n_experts, n_ranks, row_bytes, once_per_rank=False):
    """Bytes of rows that the dispatch sends from rank to rank: (R, R), line = sender; the diagonal stays at home.

    chosen: (..., K)   row_bytes: of one row of D numbers   once_per_rank: a token goes once to a rank, however many
    of its experts live there, as in DeepSeek-V3, arXiv:2412.19437, sec. 3.2.2; otherwise once per assignment, as here.
    The combine sends the transpose. Raises ValueError for ids out of range, ranks or bytes that are none.
    """
    if not row_bytes >= 1:
        raise ValueError(f"row_bytes = {row_bytes}: a row has at least one byte")
    expert_counts(chosen, n_experts)                                                    # for its door: the ids
    ids = np.reshape(chosen, (-1, np.shape(chosen)[-1]))
    homes, owned = spans(len(ids), n_ranks), spans(n_experts, n_ranks)
    visits = np.array([np.sum((ids >= own.start) & (ids < own.stop), axis=1) for own in owned])        # eq. 19
    rows = np.minimum(visits, 1) if once_per_rank else visits
    return row_bytes * np.array([rows[:, home].sum(axis=1) for home in homes])                        # eq. 20


def away(sent):
    """All bytes that leave their rank: the matrix without its diagonal."""
    return int(sent.sum() - np.trace(sent))


def parallel_experts_examples(rng):
    def case(x_shape, chosen, n_ranks):
        D, E, F = x_shape[-1], 4, 2
        weights = [rng.standard_normal(shape) for shape in [(E, D, F), (E, D, F), (E, F, D)]]
        return (rng.standard_normal(x_shape), rng.random(chosen.shape) + 0.5, chosen, *weights), {"n_ranks": n_ranks}

    return {
        "batch, 2 ranks": case((1, 4, 3), np.array([[[0, 3], [2, 0], [1, 2], [3, 1]]]), 2),
        "3 ranks: 0, 1, 1 tokens, 1, 1, 2 experts, 1 idle": case((2, 3), np.array([[2, 0], [3, 2]]), 3),
    }


def compare(comm, x, gate, chosen, W, dy):
    """Run the layer on comm, and by `experts` alone: how far apart are they, and what did each rank send?

    -> (R, 2) the largest difference of each rank, forward and backward; (R, R) bytes of dispatch, (R, R) of combine
    """
    homes, owned = spans(len(x), comm.n_ranks), spans(len(W[0]), comm.n_ranks)
    tokens = [(x[homes[r]], gate[homes[r]], chosen[homes[r]]) for r in comm.ranks]
    ys, cache = forward_ranks(comm, tokens, [[w[owned[r]] for w in W] for r in comm.ranks], owned)
    dxs, dgates, dWs = backward_ranks(comm, [dy[homes[r]] for r in comm.ranks], cache)
    y, alone = experts_forward(x, gate, chosen, *W)
    dx, dgate, _, *dW = experts_backward(dy, alone)
    found = []
    for i, r in enumerate(comm.ranks):
        home, own = homes[r], owned[r]
        backward = [dxs[i] - dx[home], dgates[i] - dgate[home], *[a - b[own] for a, b in zip(dWs[i], dW)]]
        largest = [np.abs(ys[i] - y[home]).max(initial=0), np.max([np.abs(d).max(initial=0) for d in backward])]
        found.append((largest, cache.dispatch_bytes[i], cache.combine_bytes[i]))
    everybody = comm.all_to_all([[mine] * comm.n_ranks for mine in found])[0]           # the same parcel for everyone
    return [np.array(column) for column in zip(*everybody)]


def demo():
    """Two tokens that swap places, the gradients, and many ranks against one; under mpiexec, one process per rank."""
    comm = MPI() if any(name in os.environ for name in LAUNCHED) else Simulated(4)
    rng = np.random.default_rng(0)
    M, D, F, E, K = 50, 16, 8, 12, 3
    W = [rng.standard_normal(shape) for shape in [(E, D, F), (E, D, F), (E, F, D)]]
    chosen = np.argsort(rng.standard_normal((M, E)) + np.linspace(2, 0, E), axis=1)[:, -K:]     # the first experts are dearest
    x, gate, dy = rng.standard_normal((M, D)), rng.random((M, K)), rng.standard_normal((M, D))
    differences, dispatched, combined = compare(comm, x, gate, chosen, W, dy)
    sizes = {"n_experts": E, "n_ranks": comm.n_ranks, "row_bytes": 8 * D}
    assert differences.max() < 1e-12
    assert (dispatched == link_bytes(chosen, **sizes)).all() and (combined == dispatched.T).all()
    if 0 not in comm.ranks:
        return

    ones = np.ones((2, 1, 1))
    y, _ = parallel_experts_forward(np.array([[2.0], [2.0]]), np.ones((2, 1)), np.array([[1], [0]]), ones, ones, ones * [[[4.0]], [[8.0]]], n_ranks=2)
    print("shapes    x (2, 1), gate (2, 1), chosen (2, 1), W_gate (2, 1, 1), W_up (2, 1, 1), W_down (2, 1, 1), 2 ranks -> y (2, 1)")
    print(f"by hand   each token wants the other rank's expert, which answers 8 or 4 times silu(2) 2 = 3.5232: y = {y[0, 0]:.4f}, {y[1, 0]:.4f}")
    report(parallel_experts_forward, parallel_experts_backward, parallel_experts_examples)
    once = link_bytes(chosen, **sizes, once_per_rank=True)
    print(f"          {M} tokens, {K} of {E} experts each; bytes dispatched from rank (line) to rank (column):")
    for line in dispatched.tolist():
        print("         ", *[f"{n:7,}" for n in line])
    print(f"          over the links {away(dispatched):,}; a token once per rank {away(once):,}; the combine sends the transpose")
    print(f"claim     {comm.n_ranks} ranks ({type(comm).__name__}) = one rank: max difference forward {differences[:, 0].max():.0e}, backward {differences[:, 1].max():.0e}")
    if path := plot_path():
        pictures.link_bytes(dispatched, path=path)


if __name__ == "__main__":
    from minideepseek.moe.expert_parallel import demo  # the imported copy, so that every name exists once
    demo()
