import numpy as np
import pytest

from minideepseek.autograd.tape import Tape, Tensor
from minideepseek.basics.swiglu import swiglu_forward
from minideepseek.moe.capacity import capacity, drop, drop_backward, drop_forward, dropped_and_empty, keep_within
from minideepseek.moe.experts import experts, experts_backward, experts_forward
from minideepseek.moe.router import best, router, router_forward

rng = np.random.default_rng(0)
M, E, K = 60, 6, 2


def draw(lean=1.0):
    """A router that leans to the last experts: (chosen, score of the chosen), no two scores equal."""
    score = rng.random((M, E)) + lean * np.linspace(0, 1, E)
    chosen = best(score, K)
    return chosen, np.take_along_axis(score, chosen, -1)


@pytest.mark.parametrize("sizes, seats", [
    ((8, 4, 1, 1.0), 2), ((8, 4, 1, 1.25), 3), ((8, 4, 2, 1.25), 5), ((9, 4, 1, 1.0), 3),
    ((50, 1, 1, 1.1), 55), ((1000, 10, 1, 1.1), 110), ((3, 8, 1, 1.0), 1), ((np.int64(8), 4, 1, np.float64(1.25)), 3), ((8, 4, 1, 2), 4),
])
def test_seats_by_hand(sizes, seats):
    assert capacity(*sizes) == seats and type(capacity(*sizes)) is int


@pytest.mark.parametrize("n_tokens", (1, 7, 60, 61))
def test_a_balanced_batch_drops_nothing_at_factor_one(n_tokens):
    chosen = (np.arange(n_tokens * K) % E).reshape(n_tokens, K)
    assert keep_within(chosen, None, capacity(n_tokens, E, K, 1.0), E, order="arrival").all()


@pytest.mark.parametrize("order, kept", (("arrival", [1, 1, 0, 1]), ("affinity", [0, 1, 1, 1])))
def test_four_tokens_by_hand(order, kept):
    chosen, score = np.array([[0], [0], [0], [1]]), np.array([[0.5], [0.6], [0.9], [0.7]])
    assert keep_within(chosen, score, 2, 2, order=order)[:, 0].tolist() == kept


@pytest.mark.parametrize("order", ("arrival", "affinity"))
@pytest.mark.parametrize("n_devices", (None, 3, 2))
@pytest.mark.parametrize("limit", (0, 1, 7, 15, 31, 60))
def test_against_the_plainest_loop(order, n_devices, limit):
    chosen, score = draw()
    protected = rng.random(M) < 0.1
    places = [(m, k) for m in range(M) for k in range(K)]
    if order == "affinity":
        places.sort(key=lambda place: -score[place])
    places.sort(key=lambda place: not protected[place[0]])
    free = [limit] * (n_devices or E)
    expected = np.zeros((M, K), bool)
    for m, k in places:
        owner = chosen[m, k] * (n_devices or E) // E
        expected[m, k] = free[owner] > 0 or protected[m]
        free[owner] -= 1
    kept = keep_within(chosen, score, limit, E, order=order, n_devices=n_devices, protected=protected)
    assert kept.dtype == bool and (kept == expected).all()
    batched = keep_within(chosen.reshape(3, 20, K), score.reshape(3, 20, K), limit, E, order=order, n_devices=n_devices,
                          protected=protected.reshape(3, 20))
    assert (batched.reshape(M, K) == expected).all()


def test_as_many_are_kept_as_there_are_seats_and_the_best_of_them_by_affinity():
    chosen, score = draw()
    for order in ("arrival", "affinity"):
        kept = keep_within(chosen, score, 15, E, order=order)
        for e in range(E):
            mine = chosen == e
            assert (kept & mine).sum() == min(mine.sum(), 15)
            if order == "affinity" and (~kept & mine).any():
                assert score[mine & kept].min() > score[mine & ~kept].max()


def test_arrival_depends_on_the_order_of_the_batch_and_affinity_does_not():
    chosen, score = draw()
    shuffle = rng.permutation(M)
    moved = {}
    for order in ("arrival", "affinity"):
        kept = keep_within(chosen, score, 15, E, order=order)
        moved[order] = (keep_within(chosen[shuffle], score[shuffle], 15, E, order=order) != kept[shuffle]).any()
    assert moved == {"arrival": True, "affinity": False}


def test_by_affinity_a_later_token_can_push_out_an_earlier_one_and_by_arrival_it_cannot():
    """The future leaks: what token 0 gets depends on the score of token 2."""
    chosen, score = np.array([[0], [0], [0]]), np.array([[0.5], [0.6], [0.4]])
    late = score.copy()
    late[2] = 0.9
    assert keep_within(chosen, score, 2, 2, order="affinity")[:, 0].tolist() == [True, True, False]
    assert keep_within(chosen, late, 2, 2, order="affinity")[:, 0].tolist() == [False, True, True]
    chosen, score = draw()
    changed, late = chosen.copy(), score.copy()
    changed[40:], late[40:] = chosen[40:, ::-1], score[40:, ::-1] + 1
    by = {order: (keep_within(chosen, score, 15, E, order=order), keep_within(changed, late, 15, E, order=order)) for order in ("arrival", "affinity")}
    assert (by["arrival"][0][:40] == by["arrival"][1][:40]).all()
    assert (by["affinity"][0][:40] != by["affinity"][1][:40]).any()


@pytest.mark.parametrize("order", ("arrival", "affinity"))
def test_a_sequence_depends_on_its_neighbours_in_the_batch_in_either_order(order):
    chosen, score = np.array([[[0], [0]], [[0], [1]]]), np.array([[[0.8], [0.9]], [[0.7], [0.6]]])
    together = keep_within(chosen, score, 2, 2, order=order)
    alone = keep_within(chosen[1:], score[1:], 2, 2, order=order)
    assert not together[1, 0, 0] and alone.all()


def test_seats_of_a_device_drop_less_than_seats_of_its_experts():
    chosen, score = draw(lean=0.0)
    kept = [keep_within(chosen, score, capacity(M, owners, K, 1.0), E, order="affinity", n_devices=owners).sum() for owners in (6, 3, 2, 1)]
    assert kept == sorted(kept) and kept[0] < kept[-1] == M * K


def test_the_protected_are_kept_beyond_the_limit_and_use_seats():
    chosen, score = np.zeros((5, 1), int), np.array([[0.9], [0.8], [0.1], [0.2], [0.3]])
    protected = np.array([False, False, True, True, True])
    assert keep_within(chosen, score, 2, 2, order="affinity", protected=protected)[:, 0].tolist() == [False, False, True, True, True]
    assert keep_within(chosen, score, 4, 2, order="affinity", protected=protected)[:, 0].tolist() == [True, False, True, True, True]


def layer(kept=None, gate=None):
    """x, chosen and weights of 6 experts, and their answer with gates from a router, some of them dropped."""
    local = np.random.default_rng(3)
    x, W_router = local.standard_normal((M, 5)), local.standard_normal((5, E))
    W = [local.standard_normal(shape) for shape in [(E, 5, 3), (E, 5, 3), (E, 3, 5)]]
    (gate, chosen), _ = router_forward(x, W_router, top_k=K)
    return x, W_router, gate, chosen, W


def test_enough_seats_drop_nothing_and_change_nothing():
    """At the factor E / K each expert has a seat for every token."""
    x, _, gate, chosen, W = layer()
    assert capacity(M, E, K, E / K) == M
    kept = keep_within(chosen, None, M, E, order="arrival")
    gate_kept, _ = drop_forward(gate, kept=kept)
    assert kept.all() and (gate_kept == gate).all()
    assert (experts_forward(x, gate_kept, chosen, *W)[0] == experts_forward(x, gate, chosen, *W)[0]).all()


def test_the_dropped_are_not_served_and_teach_nobody():
    x, _, gate, chosen, W = layer()
    kept = keep_within(chosen, gate, 12, E, order="affinity")
    assert (~kept).any() and kept.any() and (~kept).all(-1).any()
    gate_kept, _ = drop_forward(gate, kept=kept)
    y, cache = experts_forward(x, gate_kept, chosen, *W)
    plain = np.zeros_like(y)
    for m, k in np.argwhere(kept):
        plain[m] += gate[m, k] * swiglu_forward(x[m], *[w[chosen[m, k]] for w in W])[0]
    np.testing.assert_allclose(y, plain, atol=1e-12)
    homeless = (~kept).all(-1)
    assert (y[homeless] == 0).all()                              # the residual stream alone carries them on
    dx, dgate, _, *dW = experts_backward(np.ones_like(y), cache)
    assert (dx[homeless] == 0).all() and dgate[~kept].all()      # the experts still answer: the drop silences it
    assert (drop_backward(dgate, kept)[~kept] == 0).all() and (drop_backward(dgate, kept)[kept] == dgate[kept]).all()


def test_on_the_tape_a_token_without_a_seat_teaches_the_router_nothing():
    x, W_router, gate, chosen, W = layer()
    kept = keep_within(chosen, gate, 12, E, order="affinity")
    leaf = Tensor(x)
    with Tape() as tape:
        g, c = router(leaf, Tensor(W_router), top_k=K)
        y = experts(leaf, drop(g, kept=kept), c, *map(Tensor, W))
    tape.backward({y: np.ones(x.shape)})
    homeless = (~kept).all(-1)
    assert (leaf.grad[homeless] == 0).all() and leaf.grad[~homeless].all()


def test_a_gate_that_is_not_finite_is_silenced_too():
    """A product with the mask would leave nan and -0.0 behind."""
    y, _ = drop_forward(np.array([np.inf, np.nan, -1.0, 2.0]), kept=np.array([False, False, False, True]))
    assert y.tolist() == [0, 0, 0, 2] and not np.signbit(y).any()


def test_shares_by_hand():
    chosen, kept = np.array([[0], [0], [0], [1]]), np.array([[True], [True], [False], [True]])
    assert dropped_and_empty(chosen, kept, 2, 2) == (0.25, 0.25)
    assert dropped_and_empty(chosen, kept, 3, 2) == (0.25, 0.5)
    assert dropped_and_empty(chosen, np.ones((4, 1), bool), 2, 2) == (0.0, 0.25)        # one protected token too many
    assert dropped_and_empty(np.array([[0], [1], [2], [2]]), np.ones((4, 1), bool), 2, 4, n_devices=2) == (0.0, 0.0)
    assert dropped_and_empty(np.array([[0], [1], [2], [2]]), np.ones((4, 1), bool), 4, 4, n_devices=2) == (0.0, 0.5)    # 8 seats, 4 used


@pytest.mark.parametrize("order", ("arrival", "affinity"))
def test_more_seats_drop_less_and_stay_empty_more(order):
    chosen, score = draw()
    shares = [dropped_and_empty(chosen, keep_within(chosen, score, limit, E, order=order), limit, E) for limit in range(1, M + 1)]
    dropped, empty = np.array(shares).T
    assert (np.diff(dropped) <= 0).all() and (np.diff(empty) >= 0).all()
    assert dropped[-1] == 0 and empty[-1] == pytest.approx(1 - K / E)
    assert dropped[M * K // E - 1] == pytest.approx(empty[M * K // E - 1])              # factor 1: one lost, one empty


def test_the_order_changes_who_is_dropped_and_never_how_many():
    chosen, score = draw()
    by = [keep_within(chosen, score, 12, E, order=order) for order in ("arrival", "affinity")]
    assert (by[0] != by[1]).any() and by[0].sum() == by[1].sum()


ids = np.array([[0, 1], [1, 3]])


@pytest.mark.parametrize("call, message", [
    (lambda: capacity(0, 4, 1, 1.0), "n_tokens = 0 must be positive"),
    (lambda: capacity(8, -4, 1, 1.0), "n_routed = -4"),
    (lambda: capacity(8, 4, 0, 1.0), "top_k = 0"),
    (lambda: capacity(8, 4, 1, 0.0), "factor = 0.0"),
    (lambda: capacity(8, 4, 1, float("nan")), "factor = nan"),
    (lambda: capacity(8, 4, 1, float("inf")), "factor = inf"),
    (lambda: keep_within(ids, ids, 1, 4, order="random"), "order = 'random' must be one of arrival, affinity"),
    (lambda: keep_within(ids, ids, -1, 4, order="arrival"), "limit = -1 must not be negative"),
    (lambda: keep_within(ids, None, 1, 4, order="affinity"), r"score has shape \(\), chosen has shape \(2, 2\)"),
    (lambda: keep_within(ids, np.ones((2, 3)), 1, 4, order="affinity"), r"score has shape \(2, 3\)"),
    (lambda: keep_within(ids, None, 1, 3, order="arrival"), "the id 3, which is not in 0 .. 2"),
    (lambda: keep_within(ids * 1.0, None, 1, 4, order="arrival"), "chosen has dtype float64"),
    (lambda: keep_within(ids, None, 1, 4, order="arrival", n_devices=3), "n_devices = 3 must be positive and divide n_routed = 4"),
    (lambda: keep_within(ids, None, 1, 4, order="arrival", n_devices=0), "n_devices = 0"),
    (lambda: keep_within(ids, None, 1, 4, order="arrival", protected=np.ones((2, 2), bool)), r"protected has shape \(2, 2\), chosen has \(2,\) tokens"),
    (lambda: dropped_and_empty(ids, np.ones(4, bool), 1, 4), r"kept has shape \(4,\), chosen has shape \(2, 2\)"),
    (lambda: dropped_and_empty(ids, np.ones((2, 2), bool), 0, 4), "limit = 0 must be positive"),
    (lambda: dropped_and_empty(ids[:0], np.ones((0, 2), bool), 1, 4), r"chosen has shape \(0, 2\): there is nothing to drop"),
])
def test_what_cannot_be_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_scores_without_a_sign_are_ranked_like_any_others():
    score = np.array([[0], [7]], np.uint8)
    assert keep_within(np.zeros((2, 1), int), score, 1, 2, order="affinity").tolist() == [[False], [True]]
