"""Step 7: multi-token prediction. A small module reads the model's state and the next token, and predicts the one after it.

    python examples/07_multi_token_prediction.py [RUN] [--plot FILE.png]

In training all of the text is known. The model predicts the next token at every place. The module is shown that next
token, as if the prediction had come true, and looks one token further: more to learn from the same text. Take care
which token it is scored on: scored on the one it was shown, it has only to copy, and its loss means nothing.
When the model writes, the module drafts the token after next, and the model judges two places in one forward: the same
distribution, greedy the same text, in fewer forwards. RUN is a folder of `python -m minideepseek train`; without one, a small model is trained here.
Pages: whiteboard/model/mtp.md, whiteboard/model/parallel_heads.md, whiteboard/model/speculative.md
"""
import os
import sys

sys.path[0:1] = [os.path.abspath(__file__ + "/../..")]   # run as a script: take the package from this repository
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import dataclasses
import math
import tempfile
from pathlib import Path

import numpy as np

from minideepseek.autograd.params import gradients
from minideepseek.autograd.tape import Tape
from minideepseek.model.presets import preset
from minideepseek.model.speculative import speculation_report
from minideepseek.model.transformer import init, losses, next_token_targets, trainable
from minideepseek.plots.canvas import BLUE, GREY, ORANGE
from minideepseek.plots.speculation import accepted_and_rejected
from minideepseek.tokenizer.bpe import train
from minideepseek.training import pretrain
from minideepseek.training.adamw import adamw_step, new_state
from minideepseek.training.recipe import recipe
from minideepseek.training.step import trained_arrays

SENTENCE = "Sarah visits the bank to deposit money while Zarah visits the bank to sit by the water"
MONEY = 6                                                # its place
SIDES, STEPS = 16, 60                                    # of the dice that nobody can predict; of training
ROWS = ("the model has read up to", "the model predicts", "the module is shown", "the module predicts")


def shown_and_asked(words, place):
    """What stands in each of the ROWS at one place; a dash where the text has ended."""
    return [words[place + ahead].strip() if place + ahead < len(words) else "-" for ahead in (0, 1, 1, 2)]


def dice_losses(config, *, leak):
    """Train only the module, on tokens thrown by dice: its loss at every step, in nats. leak: score it on the token it is shown."""
    weights, rng = init(config, np.random.default_rng(0), std=0.1, dtype=np.float64), np.random.default_rng(1)
    flat, curve = trained_arrays(weights), []
    state = new_state(flat)
    for _ in range(STEPS):
        ids = rng.integers(0, SIDES, (4, 16))
        tensors = trainable(weights)
        with Tape() as tape:
            targets = ids if leak else next_token_targets(ids)          # the leak is a shift that was forgotten
            loss = losses(ids, targets, tensors, config).mtp[0]
        tape.backward(loss)
        adamw_step(flat, gradients(tensors), state, lr=0.005, weight_decay=0.0)
        curve.append(float(loss.data))
    return curve


def small_run(steps):
    """(config, weights, tokenizer) of a micro model that has seen a little of the town."""
    with tempfile.TemporaryDirectory() as parent:
        chosen = dataclasses.replace(recipe("micro").with_steps(steps), evaluate_every=steps, evaluation_stories=16)
        run = pretrain.begin(Path(parent, "run"), chosen)
        pretrain.train(run, say=lambda line: None)
    return run.config, run.weights, run.data.tokenizer


def tell(run, temperature=1.0, depth=0):
    """A story, and its Rounds when there are drafts."""
    config, weights, tokenizer = run
    rounds = []
    text = "".join(pretrain.story(weights, config, tokenizer, seed=3, temperature=temperature, max_new_tokens=80, depth=depth, watch=rounds.append))
    return text, rounds


def marked(one, spell):
    """A Round in letters: [accepted], ~lost~, and the model's own token as it is."""
    accepted, own = one.tokens[:one.n_accepted], one.tokens[one.n_accepted:]
    return "".join([*[f"[{spell(token)}]" for token in accepted], *[f"~{spell(token)}~" for token in one.drafts[one.n_accepted:]], *map(spell, own)])


def draw(path, words, honest, leaking, rounds, spell):
    """Which word is where, the two losses on dice, and a text with its drafts."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (ax, curve, text) = pyplot.subplots(3, 1, figsize=(10, 12), height_ratios=(3, 4, 5))
    places = range(2, 9)
    for place in places:
        for row, word in enumerate(shown_and_asked(words, place)):
            ax.text(place, row, word, ha="center", va="center", fontweight="bold" if word == "money" else "normal",
                    bbox={"boxstyle": "round", "facecolor": ORANGE if word == "money" else "white", "edgecolor": GREY})
    ax.set(xlim=(1.5, 8.5), ylim=(3.5, -0.5), xticks=places, xlabel="place in the sentence; follow 'money'")
    ax.set_yticks(range(len(ROWS)), ROWS)
    ax.spines[:].set_visible(False)
    curve.plot(honest, color=BLUE, label="scored on the token after the one it is shown")
    curve.plot(leaking, color=ORANGE, linestyle="-.", label="scored on the token it is shown: a leak")
    curve.axhline(math.log(SIDES), color=GREY, linestyle="--", label=f"ln({SIDES}): on dice nobody does better in the long run")
    curve.set(ylim=(0, None), xlabel="training step", ylabel="loss of the module (nats per token)")
    curve.legend()
    accepted_and_rejected(rounds, spell, ax=text)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", metavar="RUN")
    parser.add_argument("--steps", type=int, default=200, help="of training the small model, when no RUN is given")
    parser.add_argument("--plot", metavar="FILE.png", help="write the picture")
    options = parser.parse_args()

    tokenizer = train((SENTENCE + "\n") * 2, 1000)       # trained on nothing else, so every word is one token
    ids = tokenizer.encode(SENTENCE)[None]               # (1, T)
    words, T = [tokenizer.token_bytes(id).decode("utf-8") for id in ids[0]], ids.shape[1]
    print("1. Who reads what, and who predicts what:")
    print("   place" + "".join(f"{row:>26s}" for row in ROWS))
    for place in (0, 1, 2, 3, 4, 5, 6, T - 3, T - 2, T - 1):
        print(f"   {place:5d}" + "".join(f"{word:>26s}" for word in shown_and_asked(words, place)))
    print(f"   Of {T} places the model is scored at {T - 1} and the module at {T - 2}: there the text ends.")

    config = dataclasses.replace(preset("micro"), n_layers=1, vocab_size=tokenizer.vocab_size)    # one dense layer, one module
    weights = init(config, np.random.default_rng(0), std=0.1, dtype=np.float64)

    other = ids.copy()
    other[0, MONEY] = ids[0, -1]                         # ... to deposit water while ...
    runs = [losses(text, next_token_targets(text), weights, config) for text in (ids, other)]
    pairs = [[run.out for run in runs], [run.predictions[0] for run in runs]]       # of the model, of the module
    first = [int((a.logits.data != b.logits.data).any(axis=-1).argmax()) for a, b in pairs]
    print(f"\n2. The test of this table: change 'money', at place {MONEY}, and see whose predictions move.")
    print(f"   The model's move from place {first[0]} on, the module's from place {first[1]} on: there it is shown 'money'. At place {MONEY - 2}")
    print("   it has to predict 'money', and there not a bit has moved: it does not see the answer.")

    honest, leaking = [dice_losses(dataclasses.replace(config, vocab_size=SIDES), leak=leak) for leak in (False, True)]
    print(f"\n3. The leak. Train a module for {STEPS} steps on tokens thrown by dice with {SIDES} sides, which nobody can predict:")
    print(f"   scored on the token after the shown one:  loss {np.mean(honest[-20:]):.3f} nats; ln({SIDES}) = {math.log(SIDES):.3f}, the best there is")
    print(f"   scored on the shown token itself:         loss {np.mean(leaking[-20:]):.3f} nats. It looks brilliant, and has only copied.")

    found = {}
    for name, chosen in (("model", slice(0, 1)), ("module", slice(1, 2)), ("both", slice(0, 2))):
        tensors = trainable(weights)
        with Tape() as tape:
            loss = losses(ids, next_token_targets(ids), tensors, config)
        tape.backward(dict([*loss.seeds(mtp_weight=0.3).items()][chosen]))      # {loss: its weight}
        found[name] = gradients(tensors)
    print("\n4. The module has no embedding and no head of its own: it uses the model's, and the gradients of both add up.")
    errors = {name: np.abs(found["model"][name] + found["module"][name] - found["both"][name]).max() for name in ("E", "W_head")}
    for name, error in errors.items():
        print(f"   {name:6s} gradient: " + ", ".join(f"{who} {np.linalg.norm(grads[name]):.3f}" for who, grads in found.items())
              + f" (lengths; the module's loss has weight 0.3). Sum - both: {error:.0e}")

    run = pretrain.load_run(options.folder) if options.folder else small_run(options.steps)
    spell = lambda token: run[2].token_bytes(token).decode("utf-8", "replace")
    drafted, rounds = tell(run, depth=1)
    same = tell(run, temperature=0.0, depth=1)[0] == tell(run, temperature=0.0)[0]
    print("\n5. Writing with it. The module drafts the token after next, the model judges it: [accepted], ~lost~, and the model's own tokens plain.")
    print("   " + "".join(marked(one, spell) for one in rounds).replace("\n", "\n   "))
    print(f"   {speculation_report(rounds)}")
    print(f"   Greedy, with drafts and without: the same text, token for token: {same}")

    if options.plot:
        draw(options.plot, words, honest, leaking, rounds, spell)
    print("\nTo think about: the gradients add up, but their lengths do not. Why?")
    print("Where in a sentence are drafts lost, and where never? Could any training change that? (next: 08_the_block_and_the_model.py)")
    right = same and first == [MONEY, MONEY - 1] and abs(np.mean(honest[-20:]) - math.log(SIDES)) < 0.1 and leaking[-1] < 0.05 and max(errors.values()) < 1e-12
    print(f"\nclaim     on dice the honest loss stays at ln({SIDES}) = {math.log(SIDES):.2f} ({np.mean(honest[-20:]):.2f}), the leaking one falls to "
          f"{leaking[-1]:.3f}; the shared gradients add: {max(errors.values()):.0e}: {right}")
    return int(not right)


if __name__ == "__main__":
    raise SystemExit(main())
