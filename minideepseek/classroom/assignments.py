"""The assignments: eight weeks as data, each with the functions it takes away and the cases they are graded on.

Derivation: whiteboard/classroom/assignments.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

from typing import Callable, NamedTuple

import numpy as np

from minideepseek.classroom.blank import ExerciseError


class Task(NamedTuple):
    """Functions of one file that earn their points together. Without cases they belong to a component, graded on its x_examples."""
    name: str
    file: str                       # basics/rmsnorm.py
    points: int
    functions: tuple = ()           # what the student writes; (): name_forward and name_backward
    cases: Callable | None = None   # (rng) -> {case: (function of the file or of this one, args, config)}
    tolerance: float = 1e-9         # of the largest value
    config: dict = {}               # what a component is asked with in every case but the first

    @property
    def module(self):
        return f"minideepseek.{self.file.removesuffix('.py').replace('/', '.')}"

    @property
    def written(self):
        return self.functions or (f"{self.name}_forward", f"{self.name}_backward")


class Assignment(NamedTuple):
    name: str
    title: str
    tasks: tuple
    hides: tuple = ()               # files with near copies of the solution: emptied too, and not graded
    equivalent: dict = {}           # {part of a mutant's description: why it may lose no points}

    @property
    def files(self):
        """What a student hands in, relative to the submission."""
        return tuple(dict.fromkeys(f"minideepseek/{task.file}" for task in self.tasks))


def assignment(name):
    """The assignment of that name. Raises ExerciseError with the names there are."""
    if name not in ASSIGNMENTS:
        raise ExerciseError(f"no assignment {name!r}: there are {', '.join(ASSIGNMENTS)}")
    return ASSIGNMENTS[name]


def replay(x, W, r, *, way="one loss"):
    """Gradients a tape gives for y = (x W + r) + x W; the way says what is asked of it besides."""
    from minideepseek.autograd.tape import Tape, Tensor, op
    from minideepseek.basics import embedding, linear, residual

    add = op(residual.add_forward, (lambda dy, cache: (dy,)) if way == "a backward that breaks" else residual.add_backward)
    times, rows = op(linear.linear_forward, linear.linear_backward), op(embedding.embedding_forward, embedding.embedding_backward)
    x, W, r, ids = [Tensor(array) for array in (x, W, r, np.array([2, 0, 2]))]

    def record():
        with Tape() as tape:
            h = times(x, W.data if way == "constants" else W) if x.data.ndim else add(x, W)
            y = add(add(h, rows(ids, rows(ids, r)) if way == "constants" else r), h)
            add(r, r)                                               # reaches no loss
        return tape, y, h

    tape, y, h = record()
    losses = {y: np.cos(y.data), h: np.sin(h.data)} if way == "two losses" else {y: np.cos(y.data)} if x.data.ndim else y
    notes = 0
    try:
        (Tape() if way == "a loss of another tape" else tape).backward(losses, keep=way == "kept")
    except TypeError as error:
        notes = len(error.__notes__)
    if way == "twice":
        tape.backward(losses)
    if way == "two tapes":
        again, y, _ = record()
        again.backward({y: np.ones(y.data.shape)})
    return x.grad, W.grad, r.grad, h.grad, ids.grad, notes, len(tape.records)


def _tape_cases(rng):
    def case(way, *shapes):
        return "replay", tuple(rng.standard_normal(shape) for shape in shapes or ((3, 4), (4, 2), (3, 2))), {"way": way}

    ways = ("one loss", "two losses", "kept", "constants", "two tapes", "twice", "a loss of another tape", "a backward that breaks")
    return {way: case(way) for way in ways} | {"a number": case("one loss", (), (), ())}


def slopes(x, W, *, turn=1.0, pull=0.0, jump=1e9):
    """What finite_differences finds for sin(turn x W) + pull / (sum of a row of x), and for x > jump, an integer: how far its slopes are off."""
    from minideepseek.autograd.finite_differences import finite_differences

    def forward(x, ids, W, *, turn):
        with np.errstate(divide="ignore", invalid="ignore"):
            return (np.sin(turn * (x @ W)) + (pull / x.sum(axis=1, keepdims=True) if pull else 0.0), (x > jump).astype(int)), None

    found, cos = finite_differences(forward, (x, np.arange(3), W), {"turn": turn}, seed=1), turn * np.cos(turn * (x @ W))
    pulled = pull / np.maximum(x.sum(axis=1, keepdims=True), 1e-9) ** 2
    exact = {0: lambda d: cos * (d.reshape(x.shape) @ W) - pulled * d.reshape(x.shape).sum(axis=1, keepdims=True), 2: lambda d: cos * (x @ d.reshape(W.shape))}
    results = [np.array(sorted(found))]
    for position, (directions, rows) in sorted(found.items()):
        rights = np.array([exact[position](d).ravel() for d in (np.eye((x, 0, W)[position].size) if directions is None else directions)])
        results += [np.round((rows - rights) / (np.abs(rights).max() or 1.0), 8), np.array(rows.shape), directions is None]
    return tuple(results)


def _slope_cases(rng):
    x, W = rng.random((2, 3)) + 0.5, rng.standard_normal((3, 4))
    return {"every entry": ("slopes", (x, W), {"turn": 1.3}), "tiny inputs": ("slopes", (1e-3 * x, W), {"pull": 1.0}),
            "zeros": ("slopes", (0 * x, W), {}), "a choice that flips": ("slopes", (x, W), {"jump": x[1, 2] + 1e-5}),
            "a slope that is nan": ("slopes", (x * [[0.0], [1.0]], W), {"pull": 1.0}),
            "directions": ("slopes", (rng.standard_normal((30, 40)), rng.standard_normal((40, 25))), {"turn": 0.1})}


def _rope_cases(rng):
    positions = rng.permutation(90)[:5]
    return {"theta": ("frequencies", (6,), {}), "one pair": ("frequencies", (2,), {}), "another base": ("frequencies", (10,), {"base": 500.0}),
            "odd": ("frequencies", (5,), {}), "none": ("frequencies", (0,), {}),
            "tables": ("rope_tables", (positions, rng.random(3)), {}), "float32": ("rope_tables", (positions * 1000, rng.random(4), "float32"), {})}


def _visible_cases(rng):
    return {f"{T} queries, {S} keys": ("visible", (T, S), {}) for T, S in ((4, 4), (2, 5), (5, 2), (1, 3))}


def remember(c_kv, k_rope, *, capacity, cuts, keep=None, sizes=()):
    """Fill a LatentCache piece by piece, forget all but `keep` tokens, add one; what it returned, and what it holds."""
    from minideepseek.attention.kv_cache import LatentCache

    batch, kv_rank, d_rope = sizes or (len(c_kv), c_kv.shape[-1], k_rope.shape[-1])
    cache = LatentCache(batch, capacity, kv_rank, d_rope, c_kv.dtype)
    seen = [part for start, stop in cuts for part in cache.append(c_kv[:, start:stop], k_rope[:, start:stop])]
    if keep is not None:
        cache.truncate(keep)
        seen += cache.append(c_kv[:, :1], k_rope[:, :1])
    return *seen, cache.length


def _cache_cases(rng):
    def case(*cuts, capacity=6, batch=2, width=3, turned=4, **config):
        return "remember", (rng.standard_normal((batch, 5, width)), rng.standard_normal((batch, 5, turned))), {"capacity": capacity, "cuts": cuts} | config

    wanted = {"sizes": (2, 3, 4)}                                   # what does not fit would be stretched by broadcasting
    return {"in one piece": case((0, 5)), "in pieces": case((0, 2), (2, 3), (3, 5)), "just full": case((0, 5), capacity=5),
            "rejected drafts": case((0, 2), (2, 5), keep=3), "all forgotten": case((0, 4), keep=0), "nothing forgotten": case((0, 4), keep=4),
            "too many": case((0, 4), (4, 5), capacity=4), "another batch": case((0, 2), batch=1, **wanted), "another latent": case((0, 2), width=1, **wanted),
            "another key": case((0, 2), turned=1, **wanted), "more kept than there are": case((0, 2), keep=3), "fewer than none kept": case((0, 2), keep=-1)}


def decode(x, *weights, cuts, cos, sin, **config):
    """Absorbed attention over a text in pieces: the outputs in a row, and the cache behind the last."""
    from minideepseek.attention.kv_cache import LatentCache
    from minideepseek.attention.mla_absorb import mla_decode

    cache = LatentCache(len(x), x.shape[1], weights[7].shape[0], weights[5].shape[1], x.dtype)
    rows = [mla_decode(x[:, a:b], *weights, cache=cache, cos=cos[a:b], sin=sin[a:b], **config) for a, b in cuts]
    return np.concatenate(rows, axis=1), cache.c_kv, cache.k_rope, cache.length


def _decode_cases(rng):
    from minideepseek.attention.mla import mla_examples

    cuts = {"query latent": [(0, 3)], "no query latent": [(0, 1), (1, 2), (2, 3)], "half-split": [(0, 2), (2, 3)]}
    examples = mla_examples(rng)
    return {case: ("decode", examples[case][0], examples[case][1] | {"cuts": cuts[case], "eps": 0.1}) for case in cuts}


def _choice_cases(rng):
    score, b = rng.random((5, 12)), 0.1 * rng.standard_normal(12)

    def case(top_k, n_groups, kept, scoring="sigmoid", b=b):
        return "choose", (score, b), {"top_k": top_k, "n_groups": n_groups, "n_groups_kept": kept, "scoring": scoring}

    return {"V3's groups": ("group_scores", (score, 3, "sigmoid"), {}), "V2's groups": ("group_scores", (score, 3, "softmax"), {}),
            "no groups": case(3, 1, 1), "no bias": case(2, 1, 1, b=None), "one of two groups": case(2, 2, 1), "two of three groups": case(5, 3, 2),
            "one expert": ("choose", (np.array([[0.9, 0.0, 0.6, 0.7, 0.1, 0.2]]), None), case(1, 3, 1)[2]), "V2": case(4, 4, 2, "softmax"),
            "negative scores": ("choose", (score - 9, b), case(3, 3, 1)[2])}


def _bias_cases(rng):
    b, counts = rng.standard_normal(5), np.array([3, 9, 4, 0, 4])

    def case(b=b, counts=counts, gamma=0.01, **config):
        return "update_bias", (b, counts, gamma), config

    return {"sign": case(), "proportional": case(rule="proportional"), "relative": case(rule="relative"), "standing still": case(gamma=0.0),
            "float32": case(b.astype(np.float32)), "nothing counted": case(counts=0 * counts), "relative to nothing": case(counts=0 * counts, rule="relative"),
            "one bias for all": case(b[:1]), "integers": case(counts, counts), "a negative speed": case(gamma=-0.01), "no speed": case(gamma=float("inf")),
            "another rule": case(rule="other"), "negative counts": case(counts=-counts)}


def judge_drafts(drafts, q, p, *, times):
    """How often `verify` keeps n drafts and adds token t: a table (n+1, U)."""
    from minideepseek.model.speculative import verify

    rng, table = np.random.default_rng(1), np.zeros(p.shape)
    for _ in range(times):
        table[verify(drafts, q, p, rng)] += 1
    return table / times


def _verify_cases(rng):
    one = np.eye(4)
    q, p = np.array([[0.5, 0.1, 0.3, 0.1], [0.1, 0.6, 0.2, 0.1]]), np.array([[0.2, 0.5, 0.2, 0.1], [0.4, 0.3, 0.0, 0.3], [0.1, 0.1, 0.1, 0.7]])

    def case(drafts, q, p, times=1):
        return "judge_drafts", (np.array(drafts), q, p), {"times": times}

    return {"greedy, all right": case([2, 0], one[[2, 0]], one[[2, 0, 3]]), "greedy, the second wrong": case([2, 0], one[[2, 0]], one[[2, 1, 3]]),
            "greedy, the first wrong": case([1, 0], one[[1, 0]], one[[2, 0, 3]]), "no drafts": case(np.zeros(0, int), one[:0], one[[2]]),
            "never drawn from q": case([1], one[[0]], one[[0, 1]]), "no such token": case([4], one[[0]], one[[0, 1]]), "one below": case([-1], one[[3]], one[[3, 1]]),
            "one row too few": case([0, 1], q, p[:2]), "fewer tokens in q": case([2, 0], one[[2, 0], :3], one[[2, 0, 1]]),
            "p not a number": case([0], q[:1], np.nan * p[:2]),
            "drawn": case([0, 1], q, p, 8000), "as likely in both": case([1, 3], q, np.vstack([q, p[2]]), 8000)}


def _residual_cases(rng):
    p, q = rng.dirichlet(np.ones(6), 2)
    return {"p and q": ("residual", (p, q), {}), "q and p": ("residual", (q, p), {}), "equal": ("residual", (p, p), {}),
            "one-hot": ("residual", (np.eye(3)[1], np.eye(3)[2]), {})}


def narrow(x, *, fmt, **config):
    """round_to, or with a block quantise, in the format of that name; nan, inf and the sign of a zero made visible."""
    from minideepseek.precision import formats
    from minideepseek.precision.formats import round_to
    from minideepseek.precision.tiles import quantise

    if "block" in config:
        return quantise(x, fmt=getattr(formats, fmt), **config)
    y = round_to(x, getattr(formats, fmt), **config)
    return np.nan_to_num(y, nan=-1.0, posinf=-2.0, neginf=-3.0), np.isnan(y), np.signbit(y)


def _rounding_cases(rng):
    x = rng.standard_normal(300) * 2.0 ** rng.integers(-20, 20, 300)
    x[:10] = 0.0, -0.0, 1.0625, 1.1875, 2.0 ** -10, 464.0, 1e9, -1e9, 1e39, 1e-39          # ties, the smallest, the largest
    one = {"fmt": "E4M3", "overflow": "saturate"}
    return {"E4M3": ("narrow", (x,), one), "E4M3, nan": ("narrow", (x,), one | {"overflow": "nan"}), "E5M2, inf": ("narrow", (x,), {"fmt": "E5M2", "overflow": "nan"}),
            "E2M1": ("narrow", (x,), one | {"fmt": "E2M1"}), "E8M0": ("narrow", (x,), {"fmt": "E8M0", "overflow": "nan"}),
            "BF16 of float32": ("narrow", (np.delete(x, 8).astype(np.float32),), one | {"fmt": "BF16"}), "too large": ("narrow", (x,), one | {"overflow": "error"}),
            "small enough": ("narrow", (x[:6],), {"fmt": "E5M2", "overflow": "error"}), "integers": ("narrow", (np.arange(3),), one)}


def _quantise_cases(rng):
    x = rng.standard_normal((5, 7)) * 10.0 ** rng.integers(-3, 4, (5, 7))
    end = np.where(np.arange(7) < 3, 3e38, x)                       # a power of two for 3e38 is one too large for float32
    inf, nan = [np.where(x == x[1, 2], value, x) for value in (np.inf, np.nan)]

    def case(block, x=x, fmt="E4M3", **config):
        return "narrow", (x,), {"fmt": fmt, "block": block} | config

    return {"tiles": case((1, 3)), "blocks": case((2, 3)), "one scale": case((None, None)), "columns": case((3, 1)), "E2M1": case((2, 2), fmt="E2M1"),
            "powers of two": case((2, 3), power_of_two=True), "powers already": case((1, 1), 448 * 2.0 ** rng.integers(-4, 4, (3, 2)), power_of_two=True),
            "wide": case((1, 40), rng.standard_normal((2, 80))), "zeros": case((2, 2), 0 * x), "float32": case((1, 4), x.astype(np.float32)),
            "near the end": case((1, 3), end), "beyond the end": case((1, 3), end, power_of_two=True), "inf": case((2, 2), inf),
            "nan": case((2, 2), nan), "a vector": case((1, 2), x[0])}


def _dequantise_cases(rng):
    q, scale = rng.integers(-8, 9, (5, 7)) / 4, rng.random((3, 3)).astype(np.float32)
    return {"ragged": ("dequantise_blocks", (q, scale, (2, 3)), {}), "float64": ("dequantise_blocks", (q, scale, (2, 3), "float64"), {}),
            "not enough scales": ("dequantise_blocks", (q, scale[:2], (2, 3)), {}), "too many": ("dequantise_blocks", (q, scale, (5, 7)), {}),
            "three axes": ("dequantise_blocks", (rng.random((3, 3, 3)), scale, (1, 1)), {}), "rows in one": ("spread_blocks", (scale[:1], (5, 7), (None, 3)), {})}


def _sum_cases(rng):
    A, B = rng.integers(-15, 16, (3, 70)) * 2.0 ** rng.integers(-6, 3, (3, 70)), rng.integers(-15, 16, (70, 2)) / 8
    return {f"{bits} bits, groups of {group}, promoted {promote}": ("narrow_matmul", (A, B), {"bits": bits, "group": group, "promote": promote})
            for bits, group, promote in ((14, 32, 64), (6, 4, 12), (4, 7, None), (8, 1, 3), (10, 4, 0), (45, 1000, 8))} | {
        "as the hardware": ("narrow_matmul", (np.tile(A, 5), np.tile(B, (5, 1))), {}), "nothing to add": ("narrow_matmul", (A[:, :0], B[:0]), {}),
        "zeros first": ("narrow_matmul", (A * (np.arange(70) > 40), B), {"bits": 6, "group": 8})}


ASSIGNMENTS = {one.name: one for one in (
    Assignment("1-tape", "The tape and the slope", (
        Task("tape", "autograd/tape.py", 60, ("Tape.backward",), _tape_cases),
        Task("finite_differences", "autograd/finite_differences.py", 40, ("finite_differences",), _slope_cases)),
        equivalent={"in  error.add_note(": "only the words of an error", "in  rms = ": "another step finds the same slope", "1.0 -> 2.0  in  h = ": "the same",
                    "in  near = ": "step times direction, or direction times step", "in  far = ": "the same"}),
    Assignment("2-norms", "Norms, SwiGLU, cross entropy", (
        Task("rmsnorm", "basics/rmsnorm.py", 20), Task("layernorm", "basics/layernorm.py", 20), Task("silu_mul", "basics/swiglu.py", 15),
        Task("swiglu", "basics/swiglu.py", 20), Task("cross_entropy", "basics/cross_entropy.py", 25)),
        equivalent={"1 -> 2  in  n_valid = ": "no loss, divided by anything"}),
    Assignment("3-rope", "Rotary positions", (
        Task("tables", "attention/rope.py", 40, ("frequencies", "rope_tables"), _rope_cases), Task("rope", "attention/rope.py", 60))),
    Assignment("4-attention", "Attention and the cache", (
        Task("visible", "attention/causal.py", 10, ("visible",), _visible_cases), Task("causal_attention", "attention/causal.py", 60),
        Task("cache", "attention/kv_cache.py", 30, ("LatentCache.append", "LatentCache.truncate"), _cache_cases)),
        hides=("attention/self_attention.py", "attention/flash.py", "attention/sink.py", "attention/gated.py"),
        equivalent={"0 -> 1  in  mask = ": "a softmax does not see a constant", "in  p = np.pad(": "padding by nothing"}),
    Assignment("5-mla", "Latent attention, naive and absorbed", (
        Task("mla", "attention/mla.py", 70, config={"eps": 0.1}), Task("mla_decode", "attention/mla_absorb.py", 30, ("mla_decode",), _decode_cases)),
        hides=("attention/multi_head.py", "attention/grouped_query.py", "attention/decoupled_rope.py"),
        equivalent={"in  o, cache.flash = ": "tiles of any size give the same", "W_UK -> g_kv": "both are C long"}),
    Assignment("6-moe", "Routing, experts, balance", (
        Task("choice", "moe/router.py", 20, ("group_scores", "choose"), _choice_cases), Task("router", "moe/router.py", 20),
        Task("experts", "moe/experts.py", 30), Task("sequence_balance", "moe/balance_loss.py", 15),
        Task("update_bias", "moe/bias_balance.py", 15, ("update_bias",), _bias_cases)),
        hides=("moe/classic.py", "moe/capacity.py", "moe/expert_parallel.py"),
        equivalent={"-> np.sort(": "the last axis is the default", "-> np.take_along_axis(": "the same", "1e-20": "a digit that no double holds",
                    "0 -> 1  in  score = ": "softmax_forward returns p twice", "share -> chosen": "of the same shape", "-> np.argsort(": "the order within an expert",
                    "-> np.bincount(": "experts at the end that nobody chose", "-> csr_array(": "the last token and assignment are always there",
                    "weights=(W_gate": "of the cached weights only shape and dtype are read", "cache -> dy  in  dx = ": "of the same shape"}),
    Assignment("7-mtp", "Prediction modules and speculation", (
        Task("mtp_projection", "model/mtp.py", 50, config={"eps": 0.1}), Task("verify", "model/speculative.py", 35, ("verify",), _verify_cases, 0.15),
        Task("residual", "model/speculative.py", 15, ("residual",), _residual_cases)),
        equivalent={"p -> q  in  if q.shape": "the first half of the condition saw to it"}),
    Assignment("8-fp8", "FP8: formats, tiles, the narrow accumulator", (
        Task("round_to", "precision/formats.py", 30, ("spacing", "round_to"), _rounding_cases, 0.0),
        Task("quantise", "precision/tiles.py", 25, ("_scales", "quantise"), _quantise_cases, 1e-6),
        Task("dequantise_blocks", "precision/tiles.py", 15, ("spread_blocks", "dequantise_blocks"), _dequantise_cases, 1e-6),
        Task("narrow_matmul", "precision/accumulate.py", 30, ("add_group", "leading_bit", "cut", "narrow_matmul"), _sum_cases, 0.0)),
        hides=("precision/tuning.py",),
        equivalent={"2 -> 3  in  last = ": "anything beyond the largest number", "np.errstate(": "only a warning", "overflow -> fmt  in  if": "nothing is lost when it is clamped",
                    "rounded -> steps": "one array under two names", "in  return np.where(lost": "replaces what is not there", "np.clip(first, x": "the middle one of three",
                    "steps -> quantum  in  rounded": "another place to keep it", "1 -> 2  in  K, chunk": "a chunk may be longer than K",
                    "columns > 32": "two ways to one maximum", "32 -> 33": "the same", "columns -> across": "the same"}),
)}


def demo():
    """The eight weeks."""
    for one in ASSIGNMENTS.values():
        print(f"{one.name:12s} {one.title:38s} {', '.join(f'{task.name} {task.points}' for task in one.tasks)}")
    totals = {sum(task.points for task in one.tasks) for one in ASSIGNMENTS.values()}
    print(f"claim        {len(ASSIGNMENTS)} assignments of {totals} points")
    assert totals == {100}


if __name__ == "__main__":
    from minideepseek.classroom.assignments import demo  # the imported copy, so that every name exists once
    demo()
