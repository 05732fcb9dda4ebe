"""Step 6: mixture of experts. Every token visits two of eight experts, and a small bias keeps all eight busy.

    python examples/06_mixture_of_experts.py [--plot FILE.png]

A router scores the experts for every token, the best two are chosen, and their answers are added up by weights called
gates. One shared expert serves every token. So the model holds much and computes little. But a router that favours a
few experts leaves the others idle; the bias rule mends this, without any gradient.
Pages: whiteboard/moe/router.md, whiteboard/moe/experts.md, whiteboard/moe/deepseek_moe.md, whiteboard/moe/bias_balance.md
"""
import os
import sys

sys.path[0:1] = [os.path.abspath(__file__ + "/../..")]   # run as a script: take the package from this repository

import argparse

import numpy as np

from minideepseek.basics.swiglu import swiglu_forward
from minideepseek.corpus.town import text_of
from minideepseek.model.count import active, total
from minideepseek.model.presets import preset
from minideepseek.moe.bias_balance import expert_counts, max_violation, update_bias
from minideepseek.moe.deepseek_moe import deepseek_moe_forward
from minideepseek.moe.router import router_forward
from minideepseek.plots.canvas import BLUE, GREY, ORANGE
from minideepseek.tokenizer.bpe import train

SENTENCE = "Sarah visits the bank to deposit money while Zarah visits the bank to sit by the water"
FIRST, SECOND = 3, 11                                    # the places of the two banks
D, E, F, K = 16, 8, 12, 2                                # model width, experts, their width, how many a token visits
STEPS, GAMMA, BATCH = 300, 0.002, 1024                   # of the rule; tokens in a batch


def draw(path, words, gates, before, after, violations):
    """The gates of the sentence; the load of the experts before and after; MaxVio step by step."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplot_mosaic([["gates", "load"], ["gates", "rule"]], figsize=(12, 6.5), width_ratios=(3, 4))
    ax = axes["gates"]
    ax.imshow(gates, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for place, e in np.argwhere(gates > 0):
        ax.text(e, place, f"{gates[place, e]:.2f}", ha="center", va="center", fontsize=8)
    ax.set_yticks(range(len(words)), [f"{word.strip()} {place:2d}" for place, word in enumerate(words)])
    for place in (FIRST, SECOND):
        ax.get_yticklabels()[place].set(fontweight="bold", bbox={"facecolor": ORANGE, "alpha": 0.5, "pad": 1})
    ax.set(xticks=range(E), xlabel="expert", title="gates before balancing (a row sums to 1)")
    ax = axes["load"]
    ax.bar(np.arange(E) - 0.2, before, 0.4, color=BLUE, label="before")
    ax.bar(np.arange(E) + 0.2, after, 0.4, color=ORANGE, label=f"after {STEPS} steps of the rule")
    ax.axhline(BATCH * K / E, color=GREY, linestyle="--", label="a fair share")
    ax.set(xticks=range(E), xlabel="expert", ylabel=f"tokens served, of {BATCH:,}")
    ax.legend(fontsize=9)
    axes["rule"].plot(violations, color=BLUE, linewidth=1)
    axes["rule"].set(ylim=(0, None), xlabel="step", ylabel="MaxVio of the batch\n(0: all experts alike)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", metavar="FILE.png", help="write the picture")
    options = parser.parse_args()

    town = "".join(text_of(0, 100_000))
    tokenizer = train(town + (SENTENCE + "\n") * 50, 1000)          # every word of the sentence is one token
    ids, stream = tokenizer.encode(SENTENCE), tokenizer.encode(town)
    words, rng = [tokenizer.token_bytes(id).decode("utf-8") for id in ids], np.random.default_rng(0)
    table, W_router = rng.standard_normal((tokenizer.vocab_size, D)), rng.standard_normal((D, E)) / D**0.5
    table[:, 0], W_router[0] = 1, np.linspace(-1, 1, E)             # the first channel is always 1: a favour for the last experts
    x = table[ids]                                                  # (T, D)
    (gate, chosen), _ = router_forward(x, W_router, top_k=K)
    print(f"1. The router scores {E} experts for each token and keeps the best {K}. Their gates sum to 1:")
    for place in (0, FIRST, 6, SECOND, 16):
        print(f"   {words[place].strip():5s} at {place:2d}: " + ", ".join(f"expert {e} with {g:.2f}" for e, g in zip(chosen[place], gate[place])))
    print("   Both banks go to the same experts: the router reads the vector of the token, and here nothing has been mixed into it yet.")

    W_gate, W_up, W_down = [rng.standard_normal(shape) / shape[1]**0.5 for shape in ((E, D, F), (E, D, F), (E, F, D))]
    shared = [rng.standard_normal(shape) / shape[0]**0.5 for shape in ((D, F), (D, F), (F, D))]
    (y, _), _ = deepseek_moe_forward(x, W_router, W_gate, W_up, W_down, *shared, top_k=K)
    (routed, _), _ = deepseek_moe_forward(x, W_router, W_gate, W_up, W_down, None, None, None, top_k=K)
    always, _ = swiglu_forward(x, *shared)
    adds = np.abs(y - (routed + always)).max()
    print("\n2. The shared expert serves every token, without a gate. Answer = routed experts + shared expert:")
    print("   length of the answer to 'water': " + ", ".join(f"{name} {np.linalg.norm(part[-1]):.2f}" for name, part in
          (("routed", routed), ("shared", always), ("both", y))) + f"; routed + shared = both, difference {adds:.0e}")
    v3 = preset("v3")
    print(f"\n3. DeepSeek-V3 visits {v3.top_k} of {v3.n_routed} experts, and the shared one: "
          f"it holds {total(v3) / 1e9:.0f} billion numbers, and one token uses {active(v3, embedding=False) / 1e9:.0f} billion.")

    def served(b_select):
        """How many tokens of a fresh batch of town text each expert serves; the same word in other company: a little noise."""
        batch = table[rng.choice(stream, BATCH)]
        batch[:, 1:] += 0.5 * rng.standard_normal((BATCH, D - 1))
        (_, picked), _ = router_forward(batch, W_router, top_k=K, b_select=b_select)
        return expert_counts(picked, E)

    b_select = np.zeros(E)
    before, violations = served(b_select), []
    for _ in range(STEPS):
        counts = served(b_select)
        violations.append(max_violation(counts))
        b_select = update_bias(b_select, counts, GAMMA)
    after = served(b_select)                                        # a fresh batch
    print(f"\n4. Tokens served by each expert, of {BATCH:,} that visit {K} each. A fair share is {BATCH * K // E}:")
    print(f"   before {before}   MaxVio {max_violation(before):.2f}: the busiest has {max_violation(before):.0%} more than its share")
    print(f"   after  {after}   MaxVio {max_violation(after):.2f}")
    print(f"   The rule, {STEPS} times: who served too many gets its bias lowered by {GAMMA}, who served too few, raised. No gradient.")

    (gate_after, chosen_after), _ = router_forward(x, W_router, top_k=K, b_select=b_select)
    kept = (chosen_after == chosen).all(axis=1)
    equal = np.array_equal(gate_after[kept], gate[kept])
    print(f"\n5. The bias only selects: {(~kept).sum()} of the sentence's {len(ids)} tokens now visit others, or in another order. "
          f"The {kept.sum()} that\n   kept theirs have the same gates, bit for bit: {equal}. Gates come from scores without the bias.")

    if options.plot:
        gates = np.zeros((len(ids), E))
        np.put_along_axis(gates, chosen, gate, axis=1)
        draw(options.plot, words, gates, before, after, violations)
    the = (stream == ids[2]).mean()
    print(f"\nTo think about: 'the' alone is {the:.0%} of the town's tokens. What if it were half of them: could the rule still balance?")
    print("Why is it better that the bias stays out of the gates? (next: 07_multi_token_prediction.py)")
    right = adds < 1e-12 and equal and max_violation(before) > 0.5 and max_violation(after) < 0.25 and (chosen[FIRST] == chosen[SECOND]).all()
    print(f"\nclaim     the rule alone brings MaxVio from {max_violation(before):.2f} to {max_violation(after):.2f}, the router unchanged: {right}")
    return int(not right)


if __name__ == "__main__":
    raise SystemExit(main())
