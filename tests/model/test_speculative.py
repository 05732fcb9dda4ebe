import dataclasses
import itertools

import numpy as np
import pytest
from scipy import stats

from minideepseek.model import speculative
from minideepseek.model.block import position_tables
from minideepseek.model.config import Config
from minideepseek.model.generate import distribution, draw, generate
from minideepseek.model.mtp import mtp_module
from minideepseek.model.speculative import Round, acceptance, expected_tokens, residual, speculate, speculation_report, verify
from minideepseek.model.transformer import init, predict_further, trainable, transformer

CONFIG = Config(vocab_size=30, d_model=16, n_layers=2, n_dense_layers=1, d_ff=12, max_positions=24, n_heads=2, q_rank=6, kv_rank=5, d_nope=4, d_rope=2,
                d_value=4, n_routed=4, top_k=2, d_expert=6, n_groups=1, n_groups_kept=1, n_mtp=2)
PROMPT = [3, 1, 4, 1, 5]


def model(**fields):
    """A random model whose modules resemble its last layer: some of their drafts are right, others are not."""
    config, rng = dataclasses.replace(CONFIG, **fields), np.random.default_rng(0)
    weights = init(config, rng, std=0.25, head_std=0.5, dtype=np.float64)
    D, last = config.d_model, weights.layers[-1]
    of_state = 0.1 * rng.standard_normal((3, D, D))
    modules = []
    for k, module in enumerate(weights.mtp):
        halves = [1.3 * np.eye(D), of_state[k]]
        gains = {name: rng.uniform(0.8, 1.2, D) for name in ("g_hidden", "g_embedding", "g_final")}
        modules.append(module._replace(W_merge=np.vstack(halves if config.mtp_embedding_first else halves[::-1]), block=last, **gains))
    return config, weights._replace(E=5 * weights.E, g_final=rng.uniform(0.5, 1.5, D), mtp=tuple(modules))


def text_of(rounds):
    return [token for one in rounds for token in one.tokens]


# ---- the rule, by hand and by counting

P, Q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])


class Dial:
    """A generator that says what we want."""
    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def random(self):
        return self.numbers.pop(0)


def test_the_rule_by_hand():
    p, q = np.stack([P, P[::-1]]), Q[None]
    assert verify([2], q, p, Dial(0.39, 0.1)) == (1, 0)                 # 0.2 / 0.5 = 0.4: accepted, then a token from the last row
    assert verify([2], q, p, Dial(0.41, 0.9)) == (0, 0)                 # rejected: only token 0 has more in p than in q
    assert verify([0], q, p, Dial(0.999, 0.9)) == (1, 2) == verify([1], q, p, Dial(0.999, 0.9))     # p >= q: accepted always
    np.testing.assert_allclose(residual(P, Q), [1, 0, 0])
    np.testing.assert_allclose(residual(np.array([0.4, 0.4, 0.2]), np.array([0.1, 0.2, 0.7])), [0.6, 0.4, 0])
    assert acceptance(P, Q) == pytest.approx(0.7) and acceptance(np.stack([P, P]), np.stack([Q, P])).tolist() == pytest.approx([0.7, 1])
    assert [expected_tokens(0.5, n) for n in (0, 1, 2, 3)] == [1, 1.5, 1.75, 1.875] and expected_tokens(1, 4) == 5
    assert expected_tokens(0.85, 1) == 1.85 and expected_tokens(0.9, 3) == pytest.approx((1 - 0.9 ** 4) / (1 - 0.9))


def test_what_is_discarded_and_what_is_not():
    p = np.stack([P, P, P, P])
    q = np.stack([P, Q, P])
    assert verify([0, 2, 1], q, p, Dial(0.9, 0.9, 0.9)) == (1, 0)       # the second is rejected: the third is not even looked at
    assert verify([0, 2, 1], q, p, Dial(0.9, 0.3, 0.9, 0.6)) == (3, 1)
    assert verify([], np.zeros((0, 3)), p[:1], Dial(0.6)) == (0, 1)     # no draft: one token from p


def test_nothing_in_excess():
    """p and q differ by rounding only: the residual is p, not 0 / 0."""
    assert np.array_equal(residual(P, P), P) and np.array_equal(residual(P * (1 - 1e-16), P), P * (1 - 1e-16))


def test_a_bad_p_and_a_bad_q():
    p = np.stack([P, P])
    with pytest.raises(ValueError, match="the probabilities hold nan"):
        verify([0], Q[None], p * np.nan, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"drafts\[0\] = 1 has probability 0.0 in q: it was not drawn from q"):
        verify([1], np.array([[1.0, 0, 0]]), p, np.random.default_rng(0))
    for q, wrong in ((Q, p), (np.stack([Q, Q]), p), (Q[None], p[:1]), (Q[None, :2], p)):
        with pytest.raises(ValueError, match=r"1 drafts need \(n, U\) and \(n \+ 1, U\) with n = 1"):
            verify([0], q, wrong, np.random.default_rng(0))


def test_greedy_is_the_same_rule():
    """One-hot p and q: accepted iff the two argmaxes are equal, else replaced by the target's, whatever the generator says."""
    one_hot = np.eye(4)
    for x, y, last in itertools.product(range(4), repeat=3):
        for a in (0.0, 0.5, 1 - 2 ** -53):
            assert verify([x], one_hot[[x]], one_hot[[y, last]], Dial(a, a)) == ((1, last) if x == y else (0, y))


@pytest.mark.parametrize("seed", range(5))
def test_the_proof_in_numbers(seed):
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.ones(7), 2)
    accepted = q * np.minimum(1, p / q)
    np.testing.assert_allclose(accepted + (1 - acceptance(p, q)) * residual(p, q), p, atol=1e-16)
    np.testing.assert_allclose(acceptance(p, q), accepted.sum())
    np.testing.assert_allclose(acceptance(p, q), 1 - np.abs(p - q).sum() / 2)


CASES = {
    "apart": ([[0.2, 0.3, 0.5]], [[0.5, 0.3, 0.2], [0.2, 0.5, 0.3]]),
    "disjoint": ([[0.5, 0.5, 0, 0]], [[0, 0, 0.3, 0.7], [0.1, 0.2, 0.3, 0.4]]),
    "q is zero where p is not": ([[0.6, 0.4, 0, 0]], [[0.3, 0.2, 0.4, 0.1], [0.4, 0.3, 0.2, 0.1]]),
    "p is zero where q is not": ([[0.3, 0.2, 0.4, 0.1]], [[0.6, 0.4, 0, 0], [0.4, 0.3, 0.2, 0.1]]),
    "equal": ([[0.5, 0.3, 0.2]], [[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]]),
    "three places": ([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1], [0.4, 0.4, 0.2]], [[0.3, 0.4, 0.3], [0.3, 0.3, 0.4], [0.2, 0.5, 0.3], [0.7, 0.2, 0.1]]),
}


def counted(rule, q, p, n_draws=20_000):
    """How often each token came at each place, over many rounds: (n + 1, U)."""
    rng, counts = np.random.default_rng(0), np.zeros(p.shape, int)
    drafts = np.stack([rng.choice(q.shape[1], n_draws, p=row) for row in q], axis=1)
    for row in drafts.tolist():
        n_accepted, token = rule(row, q, p, rng)
        for place, kept in enumerate([*row[:n_accepted], token]):
            counts[place, kept] += 1
    return counts


def fits(counts, p):
    """Chi-square, alpha 0.001: may these counts come from p? A token that p excludes must not come at all."""
    possible = p > 0
    return not counts[~possible].any() and stats.chisquare(counts[possible], counts.sum() * p[possible]).pvalue > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_every_place_is_distributed_as_the_target_says(case):
    q, p = map(np.array, CASES[case])
    counts = counted(verify, q, p)
    assert all(fits(row, expected) for row, expected in zip(counts, p) if row.any()), counts
    reached = counts.sum(axis=1) / 20_000                               # the share of rounds that came to each place
    np.testing.assert_allclose(reached, np.cumprod([1, *acceptance(p[:-1], q)]), atol=0.015)


def by_confidence(drafts, q, p, rng):
    """Bug 5: a draft stays when the target gives it more than a threshold."""
    for i, x in enumerate(drafts):
        if p[i, x] < 0.3:
            return i, draw(residual(p[i], q[i]), rng)
    return len(drafts), draw(p[-1], rng)


def never(drafts, q, p, rng):
    """Bug 5: drafts are not verified."""
    return len(drafts), draw(p[-1], rng)


def replaced_from_p(drafts, q, p, rng):
    """Bug 5: after a rejection a token from p, in place of the residual."""
    n_accepted, token = verify(drafts, q, p, rng)
    return n_accepted, draw(p[n_accepted], rng) if n_accepted < len(drafts) else token


def one_late(drafts, q, p, rng):
    """Bug 6: p is read one position late."""
    return verify(drafts, q, p[[*range(1, len(p)), -1]], rng)


@pytest.mark.parametrize("bug", [by_confidence, never, replaced_from_p, one_late])
def test_wrong_rules_are_noticed_by_the_same_count(bug):
    q, p = map(np.array, CASES["three places"])
    assert not fits(counted(bug, q, p, 5_000)[0], p[0])


# ---- with models

PROMPTS = [np.random.default_rng(seed).integers(0, 30, 1 + seed % 6) for seed in range(200)]


def test_greedy_texts_are_those_of_plain_decoding():
    """200 prompts, every kind of module, drafts of 1 to 3 tokens; of each kind some are accepted and some are not."""
    kinds = list(itertools.product((1, 2), (True, False), (True, False), (1, 2, 3)))
    models = {kind: model(n_mtp=kind[0], mtp_reads_normed=kind[1], mtp_embedding_first=kind[2]) for kind in kinds}
    accepted, drafted = dict.fromkeys(kinds, 0), dict.fromkeys(kinds, 0)
    for prompt, kind in zip(PROMPTS, itertools.cycle(kinds)):
        config, weights = models[kind]
        rounds = list(speculate(prompt, weights, config, max_new_tokens=6, depth=kind[-1]))
        assert text_of(rounds) == list(generate(prompt, weights, config, max_new_tokens=6))
        accepted[kind] += sum(one.n_accepted for one in rounds)
        drafted[kind] += sum(len(one.drafts) for one in rounds)
    assert all(0 < accepted[kind] < drafted[kind] for kind in kinds), (accepted, drafted)


def same_texts(config, weights):
    """The check of the test above, on a few prompts."""
    options = {"max_new_tokens": 9}
    return all(text_of(speculate(prompt, weights, config, depth=2, **options)) == list(generate(prompt, weights, config, **options)) for prompt in PROMPTS[:8])


def from_scratch(text, drafts, weights, config):
    """What the modules and the model say, without a cache, everything computed anew for each: logits (n, U) and (n + 1, U)."""
    D, of_modules = len(weights.mtp), []
    out = transformer(np.array([text[:-1]]), weights, config)
    for s in range(len(drafts)):
        shown, states = np.array([text + drafts[:s]]), (out.hidden if config.mtp_reads_normed else out.stream).data
        for k in [min(step, D - 1) for step in range(s + 1)]:
            T = states.shape[1]
            found = mtp_module(states, shown[:, k + 1:k + 1 + T], weights.mtp[k], weights.E, weights.W_head, config,
                               *position_tables(config, np.arange(T), np.float64))
            states = found.hidden.data if k < D - 1 else np.concatenate([states, found.hidden.data[:, -1:]], axis=1)
        of_modules.append(found.logits.data[0, -1])
        if s < D:                                                       # each module once: as in training
            further = predict_further(transformer(shown, weights, config), shown, weights._replace(mtp=weights.mtp[:s + 1]), config)[s]
            assert np.abs(further.logits.data[0, -1] - of_modules[s]).max() < 1e-12
    return of_modules, transformer(np.array([text + drafts]), weights, config).logits.data[0, len(text) - 1:]


def worst_distribution(monkeypatch, config, weights, depth, options, seed=2):
    """How far p and q of all rounds are from those made from scratch, and the rounds."""
    seen, rounds, text, worst = [], [], PROMPT, 0.0

    def watched(*args):
        seen.append(args)
        return verify(*args)

    monkeypatch.setattr(speculative, "verify", watched)
    for one in speculate(PROMPT, weights, config, max_new_tokens=14, depth=depth, seed=seed, **options):
        drafts, q, p, _ = seen[-1]
        of_modules, of_model = from_scratch(text, drafts.tolist(), weights, config)
        assert one.drafts == drafts.tolist() and len(one.drafts) == (min(depth, 14 - 1 - len(text) + len(PROMPT)) if rounds else 0)
        worst = max([worst, np.abs(p - distribution(of_model, *options.values())).max(),
                     *[np.abs(row - distribution(logits, *options.values())).max() for row, logits in zip(q, of_modules, strict=True)]])
        text = text + one.tokens
        rounds.append(one)
    return worst, rounds


KINDS = {"V3's": dict(n_mtp=1), "one, again and again": dict(n_mtp=1, mtp_reads_normed=False), "two": dict(n_mtp=2, mtp_embedding_first=False),
         "two, the second again": dict(n_mtp=2, mtp_reads_normed=False), "two, before the norm": dict(n_mtp=2, mtp_reads_normed=False)}
DEPTHS = dict(zip(KINDS, (1, 3, 2, 4, 2)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 1.3, "top_k": 12, "top_p": 0.95}], ids=["greedy", "drawn"])
def test_what_is_compared(kind, options, monkeypatch):
    """q is what a draft was really drawn from, after temperature and cuts; p is the model's at the draft's own position."""
    worst, rounds = worst_distribution(monkeypatch, *model(**KINDS[kind]), DEPTHS[kind], options)
    assert worst < 1e-11
    assert 0 < sum(one.n_accepted for one in rounds) < sum(len(one.drafts) for one in rounds)


@pytest.mark.parametrize("bug", [never, one_late])
def test_wrong_rules_change_the_greedy_text(bug, monkeypatch):
    config, weights = model()
    assert same_texts(config, weights)
    monkeypatch.setattr(speculative, "verify", bug)
    assert not same_texts(config, weights)


def keep_what_was_rejected(monkeypatch, *, of_modules):
    """Bug 6: caches of the model, or of its modules, that are never truncated; with room for all of it."""
    make = speculative.new_caches

    def new_caches(config, batch, capacity, dtype, n_caches=None):
        caches = make(config, batch, 9 * capacity, dtype, n_caches)
        for cache in caches:
            if (n_caches is not None) == of_modules:
                cache.truncate = lambda length: None
        return caches

    monkeypatch.setattr(speculative, "new_caches", new_caches)


def test_caches_that_keep_rejected_drafts_are_noticed(monkeypatch):
    config, weights = model(max_positions=200)
    with monkeypatch.context() as patch:
        keep_what_was_rejected(patch, of_modules=False)
        assert not same_texts(config, weights)
    keep_what_was_rejected(monkeypatch, of_modules=True)
    assert same_texts(config, weights)                                  # the rule is exact for any drafts, also bad ones
    assert worst_distribution(monkeypatch, config, weights, 2, {"temperature": 1.0}, seed=3)[0] > 1e-3        # but fewer of them are accepted


@pytest.mark.parametrize("n_mtp, depth", [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_after_each_round_the_caches_hold_what_is_confirmed(n_mtp, depth, monkeypatch):
    config, weights = model(n_mtp=n_mtp)
    make, made = speculative.new_caches, []
    monkeypatch.setattr(speculative, "new_caches", lambda *args: made.append(make(*args)) or made[-1])
    length = len(PROMPT)
    for one in speculate(PROMPT, weights, config, max_new_tokens=14, depth=depth):
        before, length = length - 1, length + len(one.tokens)
        main, modules = made
        assert [cache.length for cache in main] == [length - 1] * 2                 # all tokens but the last
        if len(one.drafts) == depth:
            assert [cache.length for cache in modules] == [before - k for k in range(min(n_mtp, depth))]     # each position shown a token of the text
    assert length == len(PROMPT) + 14


def test_drawn_texts_have_the_distribution_of_the_model():
    """The first three tokens together, 2,000 texts, against the product of the model's own distributions."""
    options = {"temperature": 1.4, "top_k": 3, "top_p": 0.9}
    config, weights = model(vocab_size=5, n_layers=1, n_mtp=1, q_rank=None)
    expected = np.zeros((5, 5, 5))
    for prefix in np.ndindex(5, 5):
        rows = distribution(transformer(np.array([[1, *prefix]]), weights, config).logits.data[0], *options.values())
        expected[prefix] = rows[0, prefix[0]] * rows[1, prefix[1]] * rows[2]
    counts, accepted, rejected = np.zeros((5, 5, 5), int), 0, 0
    for seed in range(2_000):
        text, rounds = [], speculate([1], weights, config, max_new_tokens=4, depth=2, seed=seed, **options)
        while len(text) < 3:
            one = next(rounds)
            text += one.tokens
            accepted, rejected = accepted + one.n_accepted, rejected + (one.n_accepted < len(one.drafts))
        counts[tuple(text[:3])] += 1
    assert accepted > 300 and rejected > 300
    assert (expected == 0).any() and 2_000 * expected[expected > 0].min() > 5 and fits(counts, expected)


def test_a_text_shorter_than_the_chain_of_modules():
    config, weights = model(n_mtp=3)
    assert text_of(speculate([7], weights, config, max_new_tokens=9, depth=3)) == list(generate([7], weights, config, max_new_tokens=9))


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}])
def test_it_counts_and_stops_exactly(options):
    config, weights = model()
    whole = text_of(speculate(PROMPT, weights, config, max_new_tokens=12, depth=3, **options))
    for count in range(13):
        text = text_of(speculate(PROMPT, weights, config, max_new_tokens=count, depth=3, **options))
        assert len(text) == count and (options or text == whole[:count])
    for token in set(whole):
        rounds = list(speculate(PROMPT, weights, config, max_new_tokens=12, depth=3, stop=[token], **options))
        assert text_of(rounds) == whole[:whole.index(token) + 1] and all(one.tokens for one in rounds)


def test_it_fills_the_position_table_to_the_last_place():
    config, weights = model()
    assert len(text_of(speculate(PROMPT, weights, config, max_new_tokens=19, depth=3))) == 19 == config.max_positions - len(PROMPT)


def test_one_forward_of_the_model_for_each_round(monkeypatch):
    """At an enormous temperature p and q are both uniform: every draft is accepted."""
    config, weights = model()
    forwards, decode = [], speculative.transformer_decode
    monkeypatch.setattr(speculative, "transformer_decode", lambda ids, *rest: forwards.append(ids.shape[1]) or decode(ids, *rest))
    rounds = list(speculate(PROMPT, weights, config, max_new_tokens=14, depth=3, temperature=1e9, chunk=2))
    assert [len(one.tokens) for one in rounds] == [1, 4, 4, 4, 1] and forwards == [2, 2, 1, 4, 4, 4, 1]
    assert [one.n_accepted for one in rounds] == [len(one.drafts) for one in rounds] == [0, 3, 3, 3, 0]


def test_pieces_of_the_prompt_and_other_forms_of_the_weights_change_nothing(monkeypatch):
    config, weights = model()
    runs = [list(speculate(np.arange(7, dtype=np.uint64), form, config, max_new_tokens=8, depth=3, temperature=1.0, chunk=chunk))
            for chunk, form in ((1, weights), (2, weights), (100, trainable(weights)))]
    assert runs[0] == runs[1] == runs[2]
    assert all(type(token) is int for one in runs[0] for token in [*one.tokens, *one.drafts, one.n_accepted])
    weights32, dtypes = init(config, np.random.default_rng(0), std=0.2), set()
    monkeypatch.setattr(speculative, "verify", lambda drafts, q, p, rng: dtypes.update([p.dtype, q.dtype]) or verify(drafts, q, p, rng))
    assert len(text_of(speculate(PROMPT, weights32, config, max_new_tokens=8, depth=3, temperature=1.0))) == 8 and dtypes == {np.dtype(np.float64)}


@pytest.mark.parametrize("prompt, options, message", [
    ([], {}, r"prompt has shape \(0,\): it must be a row of at least one token"),
    (PROMPT, {"depth": 0}, "depth = 0 must be a positive whole number"),
    (PROMPT, {"depth": 1.5}, "depth = 1.5 must be a positive whole number"),
    (PROMPT, {"chunk": 0}, "chunk = 0 must be a positive whole number"),
    (PROMPT, {"max_new_tokens": 20}, "a prompt of 5 tokens and 20 new ones exceed max_positions = 24"),
    (PROMPT, {"top_p": 0}, "top_p = 0 must be above 0 and at most 1"),
])
def test_bad_input_is_refused_at_the_call(prompt, options, message):
    config, weights = model()
    with pytest.raises(ValueError, match=message):
        speculate(prompt, weights, config, **{"max_new_tokens": 4} | options)


def test_models_that_cannot_draft_are_refused():
    config, weights = model()
    with pytest.raises(ValueError, match="weights.mtp is empty: without a prediction module there is nobody to draft"):
        speculate(PROMPT, weights._replace(mtp=()), config, max_new_tokens=4)
    config = dataclasses.replace(config, attention="mha")
    with pytest.raises(ValueError, match="attention = 'mha': rejected drafts are cut from latent caches"):
        speculate(PROMPT, init(config, np.random.default_rng(0)), config, max_new_tokens=4)


def test_a_report_counts_tokens_forwards_and_drafts():
    rounds = [Round([5], [], 0), Round([1, 2], [1, 7], 1), Round([3], [4, 4], 0), Round([8, 9, 2], [8, 9], 2)]
    assert speculation_report(rounds) == "7 tokens in 4 forwards, 1.75 each; 3 of 6 drafts accepted (50%)"
    assert speculation_report(rounds[:1]) == "1 tokens in 1 forwards, 1.00 each; 0 of 0 drafts accepted"
    assert speculation_report([]) == "0 tokens in 0 forwards, 0.00 each; 0 of 0 drafts accepted"


@pytest.mark.parametrize("x", (-1, 3))
def test_a_draft_outside_the_vocabulary_is_refused(x):
    with pytest.raises(ValueError, match=rf"drafts\[0\] = {x} has probability 0.0 in q"):
        verify([x], np.full((1, 3), 1 / 3), np.full((2, 3), 1 / 3), np.random.default_rng(0))
