"""Mistakes that public code of this architecture really makes, planted here: that file's own tests must notice.

The numbers are those of the museum; a file's bugs are planted as soon as the file exists.
"""
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.house import plant

DRAFTS = "tests/model/test_speculative.py"                # whose own tests take long: those that notice are named
BUGS = {
    "1 the module is scored on the token it was shown": (
        "minideepseek/model/transformer.py", "cross_entropy(p.logits, targets[:, k + 1:], ignore_index", "cross_entropy(p.logits, targets[:, k:-1], ignore_index"),
    "2 the head reads the state that came in": (
        "minideepseek/model/mtp.py", "    logits = linear(normed, W_head) ", "    logits = linear(merged, W_head) "),
    "3 the module has an embedding of its own": (
        "minideepseek/model/mtp.py", "    e = embedding(ahead, E) ", "    e = embedding(ahead, np.array(getattr(E, 'data', E))) "),
    "4 [hidden; embedding]": (
        "minideepseek/model/mtp.py", "both = np.concatenate([n_e, n_h] if embedding_first else [n_h, n_e], axis=-1)",
        "both = np.concatenate([n_h, n_e] if embedding_first else [n_e, n_h], axis=-1)"),
    "5 drafts kept above a threshold": (
        "minideepseek/model/speculative.py", "if not rng.random() * q[i, x] < p[i, x]:", "if p[i, x] < 0.3:"),
    "5 drafts never verified": (
        "minideepseek/model/speculative.py", "if not rng.random() * q[i, x] < p[i, x]:", "if False:"),
    "5 a lost draft replaced from p, not from what p has more": (
        "minideepseek/model/speculative.py", "draw(residual(p[i], q[i]), rng)", "draw(p[i], rng)", f"{DRAFTS}::test_every_place_is_distributed_as_the_target_says"),
    "6 p read one place late": (
        "minideepseek/model/speculative.py", "n_accepted, token = verify(drafts, q, p, rng)", "n_accepted, token = verify(drafts, q, p[[*range(1, n + 1), n]], rng)", f"{DRAFTS}::test_what_is_compared"),
    "6 the model's cache keeps rejected drafts": (
        "minideepseek/model/speculative.py", "            cache.truncate(P) ", "            pass "),
    "6 a module's cache keeps what rests on drafts": (
        "minideepseek/model/speculative.py", "truncate(max(P - k, 0))", "truncate(P)", f"{DRAFTS}::test_what_is_compared"),
    "26 whole numbers up to 448 for FP8": (
        "minideepseek/precision/formats.py", "quantum = spacing(clamped, fmt)", "quantum = np.ones_like(clamped)"),
    "27 cast without clamping": (
        "minideepseek/precision/formats.py", "clamped = np.clip(x, first, last, out=np.empty_like(x))", "clamped = x.copy()"),
    "28 the mean of the scales": (
        "minideepseek/precision/fp8_gemm.py", "scale_A[:, b, None] * scale_B[b]", "scale_A.mean(axis=1)[:, None] * scale_B[b]"),
    "28 scales after the full sum": (
        "minideepseek/precision/fp8_gemm.py", "y = y + chunk * scale ", "y = (total := chunk + (total if b else 0)) * scale "),
    "29 E5M2 for gradients": (
        "minideepseek/precision/fp8_gemm.py", "def fp8_gemm(A, B, *, role, tile=128, fmt=E4M3, gradient_fmt=E4M3,", "def fp8_gemm(A, B, *, role, tile=128, fmt=E4M3, gradient_fmt=E5M2,"),
    "10 absorption that mixes heads": (
        "minideepseek/attention/mla_absorb.py", "W_UK.reshape(C, H, -1).transpose(1, 2, 0)", "W_UK.reshape(C, -1, H).transpose(2, 1, 0)"),
    "12 the cache keeps keys and values too": (
        "minideepseek/attention/kv_cache.py", "        return kv_rank + d_rope ", "        return kv_rank + d_rope + n_heads * (d_key + d_value) "),
    "14 every new token at position 0": (
        "minideepseek/model/decode.py", "np.arange(start, start + T), weights.E.dtype)        # position", "np.arange(T), weights.E.dtype)  # position"),
    "30 the scale divided": (
        "minideepseek/precision/tiles.py", "(q.astype(np.float32) * spread_blocks(", "(q.astype(np.float32) / spread_blocks("),
    "7 scores scaled by the latent's size": (
        "minideepseek/attention/mla.py", "heads_first(v, H), scale=scale)", "heads_first(v, H), scale=(c_kv.shape[-1] + k_raw.shape[-1]) ** -0.5)"),
    "8 the key with position is not summed over heads": (
        "minideepseek/attention/mla.py", "dk[..., N:].sum(axis=1)[:, :, None]", "dk[:, 0, :, None, N:]"),
    "9 no norm on the key-value latent": (
        "minideepseek/attention/mla.py", "linear_forward(c_kv, W_UV, gemm=gemm)", "linear_forward(c_kv_raw, W_UV, gemm=gemm)"),
    "11 the query latent skipped": (
        "minideepseek/attention/mla.py", "c_q, cache.norm_q = rmsnorm_forward(c_q_raw, g_q, eps=eps)", "c_q, cache.norm_q = c_q_raw, rmsnorm_forward(c_q_raw, g_q, eps=eps)[1]"),
    "13 pairs mixed up": (
        "minideepseek/attention/rope.py", "(x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])",
        "(x[..., :half], x[..., half:]) if interleaved else (x[..., 0::2], x[..., 1::2])"),
    "15 ramp bounds without floor and ceil": (
        "minideepseek/attention/yarn.py", "max(math.floor(pair_that_turns(beta_fast)), 0)", "max(pair_that_turns(beta_fast), 0)"),
    "15 mscale applied once": (
        "minideepseek/attention/yarn.py", "temperature(factor, mscale) ** 2 /", "temperature(factor, mscale) /"),
    "16 the mask forgets the cached keys": (
        "minideepseek/attention/causal.py", "np.arange(T)[:, None] + (S - T)", "np.arange(T)[:, None]"),
    "17 tile instead of repeat": (
        "minideepseek/attention/grouped_query.py",
        "    k = np.repeat(k_group, H // G, axis=1)          # 0, 0, 1, 1: repeat        # (B, H, T, K)   # eq. 6\n    v = np.repeat(v_group, H // G, axis=1) ",
        "    k = np.tile(k_group, (1, H // G, 1, 1))\n    v = np.tile(v_group, (1, H // G, 1, 1)) "),
    "18 the selection bias added to the gates": (
        "minideepseek/moe/router.py", "picked = np.take_along_axis(score, chosen, axis=-1)",
        "picked = np.take_along_axis(score if b_select is None else score + b_select, chosen, axis=-1)"),
    "19 counts compared with a share of 1/E: all biases drift": (
        "minideepseek/moe/bias_balance.py", "np.sign(counts.mean() - counts)", "np.sign(1 / counts.size - counts)"),
    "20 the bias of an overloaded expert raised": (
        "minideepseek/moe/bias_balance.py", "np.sign(counts.mean() - counts)", "np.sign(counts - counts.mean())"),
    "21 group score of V2 used for V3": (
        "minideepseek/moe/router.py", 'n_best = 2 if scoring == "sigmoid" else 1', "n_best = 1"),
    "21 masked groups set to 0 instead of -inf": (
        "minideepseek/moe/router.py", "np.where(kept[:, :, None], groups, -np.inf)", "np.where(kept[:, :, None], groups, 0)"),
    "22 the scaling factor forgotten": (
        "minideepseek/moe/router.py", "gate = share * scaling", "gate = share * 1.0"),
    "22 the scaling factor applied before normalising": (
        "minideepseek/moe/router.py", "picked = np.take_along_axis(score, chosen, axis=-1) ", "picked = scaling * np.take_along_axis(score, chosen, axis=-1); scaling = 1.0 "),
    "23 one gate normalised: the constant 1": (
        "minideepseek/moe/classic.py", 'scoring="softmax", normalise=normalise)', 'scoring="softmax", normalise=True)'),
    "24 computed and never added": (
        "minideepseek/training/step.py", 'if speeds["balance_weight"] else {})', 'if False else {})'),
    "24 a slope for f of the older losses": (
        "minideepseek/moe/balance_loss.py", "dP = f * dloss ", "dP = 2 * f * dloss "),
    "24 f differentiated as if it moved with P": (
        "minideepseek/moe/balance_loss.py", "dP = f * (dloss / B) ", "dP = 2 * f * (dloss / B) "),
    "24 f made of scores, which have a slope": (
        "minideepseek/moe/balance_loss.py", "f = wanted.sum(axis=1) * E / (top_k * T) ", "f = share.sum(axis=1) * E / T "),
    "24 f left out": (
        "minideepseek/moe/balance_loss.py", "loss = (f * P).sum(", "loss = P.sum("),
    "24 counted over the batch, not over each sequence": (
        "minideepseek/moe/balance_loss.py", "f = wanted.sum(axis=1) * E / (top_k * T) ", "f = np.stack([wanted.mean(axis=(0, 1)) * E / top_k] * B) "),
    "25 the layer adds the residual that the block adds too": (
        "minideepseek/moe/deepseek_moe.py", "        y = y_routed + y_shared ", "        y = x + y_routed + y_shared "),
    "33 in-place += on a gradient two parents share": (
        "minideepseek/autograd/tape.py",
        "                    grads[x] = np.asarray(grads[x] + dx) if x in grads else dx   # never +=: the array may be shared",
        "                    if x in grads:\n                        grads[x] += dx\n                    else:\n                        grads[x] = dx"),
    "34 no topological order: replayed as recorded": (
        "minideepseek/autograd/tape.py", "        yield records.pop()", "        yield records.pop(0)"),
    "35 a set of parents": (
        "minideepseek/autograd/tape.py", "            for x, dx in zip(record.inputs, dxs):",
        "            for x, dx in {id(x): (x, dx) for x, dx in zip(record.inputs, dxs)}.values():"),
    "36 all-ones cotangent": (
        "minideepseek/autograd/gradcheck.py", "return self.rng.standard_normal(sum(y.size for y in self.outputs))",
        "return np.ones(sum(y.size for y in self.outputs))"),
    "37 dE[ids] += dy loses duplicates": (
        "minideepseek/basics/embedding.py", "    dE = P.T @ dy.reshape(M, D)",
        "    dE = np.zeros((U, D), dy.dtype); dE[ids] += dy"),
    "38 the grader grades the reference": (
        "minideepseek/classroom/grade.py", "expected(asked), read_answers(answer))", "expected(asked), expected(asked))",
        "tests/classroom/test_grade.py::test_an_empty_submission_scores_nothing_and_every_check_fails"),
    "36b nan passes a comparison written the wrong way round": (
        "minideepseek/autograd/causes.py", "bool((np.abs(a - b) <= 1e-6 * np.abs(b).max(initial=0)).all())",
        "not (np.abs(a - b) > 1e-6 * np.abs(b).max(initial=0)).any()"),
}


@pytest.fixture(scope="module")
def planted(request, tmp_path_factory):
    """{bug: its plant, under way} for the bugs that were asked for, two at a time."""
    wanted = [item.callspec.params["bug"] for item in request.session.items if item.module is request.module and hasattr(item, "callspec")]
    with ThreadPoolExecutor(2) as pool:
        yield {bug: pool.submit(plant, tmp_path_factory.mktemp("planted"), *BUGS[bug]) for bug in wanted}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_noticed(bug, planted):
    planted[bug].result()


def test_planting_needs_exactly_one_place(tmp_path):
    with pytest.raises(AssertionError, match="stands there 0 times"):
        plant(tmp_path, "minideepseek/basics/linear.py", "no such line", "")


def test_planting_a_harmless_change_is_itself_a_failure(tmp_path):
    with pytest.raises(AssertionError, match="was not noticed"):
        plant(tmp_path, "minideepseek/basics/residual.py", "Both roads get all of dy.", "Both roads get all of it.")
