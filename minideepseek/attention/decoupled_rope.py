"""Decoupled RoPE: why position inside the compressed keys forbids absorption, in numbers, and the split that mends it.

Derivation: whiteboard/attention/decoupled_rope.md     Source: DeepSeek-V2, arXiv:2405.04434, sec. 2.1.3
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import numpy as np

from minideepseek.attention.rope import frequencies, rope_forward, rope_tables


def turned(x, theta, positions=None):
    """RoPE without a batch: x (T, H, R), theta (R/2,) in radians per position -> (T, H, R). Positions: 0 to T - 1."""
    cos, sin = rope_tables(np.arange(len(x)) if positions is None else positions, theta)    # (T, R/2) (T, R/2)
    return rope_forward(x[None], cos=cos, sin=sin)[0][0]


def scores_rope_inside(c_q, c_kv, W_UQ, W_UK, *, theta):
    """One head that turns the very keys it made from the latent. Neither masked nor scaled.

    c_q: (T, Q)   c_kv: (T, C)   W_UQ: (Q, N)   W_UK: (C, N)   theta: (N/2,)   ->   score: (T, T)
    """
    q = turned((c_q @ W_UQ)[:, None], theta)[:, 0]                                  # (T, N)      # eq. 1
    k = turned((c_kv @ W_UK)[:, None], theta)[:, 0]                                 # (T, N)      # eq. 2
    return q @ k.T                                                                                # eq. 3


def matrix_between(distance, W_UQ, W_UK, *, theta):
    """What stands between the latents of a query and of a key `distance` positions before it, with RoPE inside: (Q, C)."""
    P = turned(np.eye(W_UQ.shape[1])[:, None], theta, [distance])[:, 0]             # (N, N)      # eq. 4
    return W_UQ @ P @ W_UK.T                                                                      # eq. 5


def fit_one_matrix(c_q, c_kv, score, distances):
    """The one matrix M for which c_q M c_kv^T comes nearest to the scores at these distances, and what it leaves.

    c_q: (T, Q)   c_kv: (T, C)   score: (T, T)   ->   M: (Q, C), a number: error and scores compared by their norms
    Needs more pairs of tokens than M has entries, else it fits anything.
    """
    i, j = (np.concatenate(rows) for rows in zip(*((np.arange(d, len(c_q)), np.arange(len(c_q) - d)) for d in distances)))
    products = (c_q[i, :, None] * c_kv[j, None, :]).reshape(len(i), -1)             # (pairs, Q*C)
    M, *_ = np.linalg.lstsq(products, score[i, j], rcond=None)                      # (Q*C,)      # eq. 6
    left = np.linalg.norm(products @ M - score[i, j]) / np.linalg.norm(score[i, j])               # eq. 7
    return M.reshape(c_q.shape[1], -1), left


def scores_split(x, c_q, c_kv, W_UQ, W_QR, W_UK, W_KR, *, n_heads, theta, absorb):
    """Content without position, plus position from a key of its own that all heads share. Neither masked nor scaled.

    x: (T, D)   c_q: (T, Q)   c_kv: (T, C)   W_UQ: (Q, H*N)   W_QR: (Q, H*R)   W_UK: (C, H*N)   W_KR: (D, R)
    n_heads: H   theta: (R/2,)   absorb: give W_UK to the query, not to the latent   ->   score: (H, T, T)
    """
    T, H = len(x), n_heads
    q_nope = (c_q @ W_UQ).reshape(T, H, -1).swapaxes(0, 1)                          # (H, T, N)
    W_UK_heads = W_UK.reshape(len(W_UK), H, -1).swapaxes(0, 1)                      # (H, C, N)
    if absorb:
        content = (q_nope @ W_UK_heads.swapaxes(1, 2)) @ c_kv.T                     # (H, T, T)   # eq. 8
    else:
        content = q_nope @ (c_kv @ W_UK_heads).swapaxes(1, 2)                       # (H, T, T)   # eq. 9
    q_rope = turned((c_q @ W_QR).reshape(T, H, -1), theta).swapaxes(0, 1)           # (H, T, R)   # eq. 10
    k_rope = turned((x @ W_KR)[:, None], theta)[:, 0]       # one for all heads     # (T, R)      # eq. 11
    return content + q_rope @ k_rope.T                                                            # eq. 12


def demo():
    """A quarter turn by hand, one matrix against many distances, and the split both ways."""
    right = np.array([[1.0, 0.0]])                          # latents of one number, made into arrows (c, 0)
    by_hand = [matrix_between(d, right, right, theta=np.array([np.pi / 2])).item() for d in (0, 1, 2)]
    rng, T, D, Q, C, H, N, R = np.random.default_rng(0), 64, 12, 6, 5, 3, 4, 2
    x, c_q, c_kv = (rng.standard_normal((T, width)) for width in (D, Q, C))
    W_UQ, W_QR, W_UK, W_KR = (rng.standard_normal(s) for s in ((Q, H * N), (Q, H * R), (C, H * N), (D, R)))
    print(f"shapes    c_q {c_q.shape}, c_kv {c_kv.shape}: one absorbed matrix would be {(Q, C)} a head, for all distances")
    print("by hand   a quarter turn per position: the matrix is 1 x 1 and must be", ", ".join(f"{m:.0f}" for m in by_hand), "at distance 0, 1, 2")

    theta, distances = frequencies(N), (0, 1, 2, 4, 8, 16)
    inside = scores_rope_inside(c_q, c_kv, W_UQ[:, :N], W_UK[:, :N], theta=theta)
    still, exact = fit_one_matrix(c_q, c_kv, inside, [0])
    wrong = {d: np.linalg.norm(still - M) / np.linalg.norm(M) for d in distances
             for M in [matrix_between(d, W_UQ[:, :N], W_UK[:, :N], theta=theta)]}
    _, left = fit_one_matrix(c_q, c_kv, inside, distances)
    print("inside    the matrix of distance 0, held against the one needed: " + ", ".join(f"{d}: {w:.0%}" for d, w in wrong.items()))
    weights, config = (W_UQ, W_QR, W_UK, W_KR), {"n_heads": H, "theta": frequencies(R)}
    naive, absorbed = (scores_split(x, c_q, c_kv, *weights, **config, absorb=way) for way in (False, True))
    worst = np.abs(naive - absorbed).max()
    print(f"claim     RoPE inside: the best single matrix leaves {left:.0%} of the scores; split: absorbed = naive, max difference {worst:.0e}")
    assert np.allclose(by_hand, [1, 0, -1]) and exact < 1e-12 and wrong[0] < 1e-12 and left > 0.3 and worst < 1e-12


if __name__ == "__main__":
    from minideepseek.attention.decoupled_rope import demo  # the imported copy, so that every name exists once
    demo()
