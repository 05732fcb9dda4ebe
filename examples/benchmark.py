"""How fast is plain NumPy? A training step and cached decoding of three shapes, beside torch eager when it is installed.

    python examples/benchmark.py [--shapes tiny small medium] [--repeats 7]

Prints the median milliseconds of a step (forward, backward, AdamW; float32), in one process with all BLAS threads, and
with the batch in two pieces on two workers with one BLAS thread each; the share of the machine's own matrix-product peak,
measured in the same run; milliseconds per decoded token; and the same for transformers' DeepseekV3 in torch eager, with
the same weights and batch, alternating with ours. The shapes are the table below; no prediction modules, no balance loss.
"""
import os
import sys

sys.path[0:1] = [os.path.abspath(__file__ + "/../..")]   # run as a script: take the package from this repository

import argparse
import contextlib
import statistics
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

SHAPES = {               # d, layers, heads, experts, top-k, expert width, vocabulary, batch, tokens
    "tiny": (128, 4, 4, 8, 2, 64, 512, 8, 128),
    "small": (256, 6, 8, 16, 4, 128, 4_096, 8, 256),
    "medium": (512, 8, 8, 32, 4, 256, 8_192, 4, 512),
}
DECODED = 32             # tokens


def shape_config(name):
    """The configuration of a shape: (Config, batch, tokens)."""
    from minideepseek.model.config import Config

    d, layers, heads, experts, top_k, width, vocabulary, batch, tokens = SHAPES[name]
    big = name == "medium"
    return Config(vocab_size=vocabulary, d_model=d, n_layers=layers, n_dense_layers=1, d_ff=round(8 * d / 3 / 64) * 64, max_positions=1_024, n_heads=heads,
                  q_rank=d // 2, kv_rank=d // 4, d_nope=64 if big else 32, d_rope=32 if big else 16, d_value=64 if big else 32, yarn_factor=1.0,
                  n_routed=experts, top_k=top_k, d_expert=width, n_groups=1, n_groups_kept=1, n_mtp=0), batch, tokens


def measure(name, mode, repeats):
    """One mode of one shape, in a process of its own: its lines 'key value' on standard output.

    mode: whole (all BLAS threads on the whole batch), split (two pieces, two workers, one BLAS thread each), torch
    """
    import numpy as np

    config, batch, tokens = shape_config(name)
    rows = np.random.default_rng(0).integers(0, config.vocab_size, (batch, tokens + 1))
    if mode == "torch":
        step, decode, nothing = torch_model(config, rows)
    else:
        step, decode, nothing = our_model(config, rows, pieces=2 if mode == "split" else 1)
    with contextlib.ExitStack() as stack:
        stack.callback(nothing)
        for _ in range(2):
            step()
        print("ready", flush=True)
        for line in sys.stdin:                       # the parent says when: modes take turns, so that noise hits all alike
            began = time.perf_counter()
            if line.strip() == "step":
                step()
            elif line.strip() == "decode":
                decode()
            elif line.strip() == "peak":
                a = np.ones((2_048, 2_048), np.float32)
                a @ a
                began = time.perf_counter()
                a @ a
            else:
                import resource
                print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, flush=True)
                continue
            print(time.perf_counter() - began, flush=True)


def our_model(config, rows, pieces):
    """(one training step, decode DECODED tokens, clean up)."""
    import numpy as np

    from minideepseek.model.decode import new_caches, transformer_decode
    from minideepseek.training.allocator import keep_freed_memory
    from minideepseek.training.recipe import Recipe
    from minideepseek.training.step import new_model, train_step

    keep_freed_memory()
    recipe = Recipe(batch=len(rows), length=rows.shape[1] - 1, pieces=pieces, n_mtp=0, balance="none", balance_weight=0.0, steps=1_000)
    weights, state = new_model(recipe, config)
    pool = ThreadPoolExecutor(pieces) if pieces > 1 else None
    counter = iter(range(1_000))

    def step():
        train_step(weights, state, rows[:, :-1], rows[:, 1:], step=next(counter), config=config, recipe=recipe, workers=pool)

    def decode():
        caches = new_caches(config, 1, DECODED + 8, np.float32)
        transformer_decode(rows[:1, :8], weights, config, caches)
        for k in range(DECODED):
            transformer_decode(rows[:1, 8 + k:9 + k], weights, config, caches)

    return step, decode, (pool.shutdown if pool else lambda: None)


def torch_model(config, rows):
    """The same for transformers' DeepseekV3ForCausalLM, eager, with weights that this package saved."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from minideepseek.interop.huggingface import save
    from minideepseek.model.transformer import init

    with tempfile.TemporaryDirectory() as folder:
        save(os.path.join(folder, "model"), config, init(config, np.random.default_rng(0), std=0.02))
        model = AutoModelForCausalLM.from_pretrained(os.path.join(folder, "model"), attn_implementation="eager")
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    tokens, targets = torch.tensor(rows[:, :-1]), torch.tensor(rows[:, 1:])

    def step():
        optimiser.zero_grad()
        logits = model(tokens, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.reshape(-1, config.vocab_size), targets.reshape(-1)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()

    def decode():
        with torch.no_grad():
            out = model(tokens[:1, :8], use_cache=True)
            for k in range(DECODED):
                out = model(tokens[:1, 8 + k:9 + k], past_key_values=out.past_key_values, use_cache=True)

    return step, decode, lambda: None


class Child:
    """A mode in a process of its own."""

    def __init__(self, name, mode, threads):
        environment = os.environ | {"OPENBLAS_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen([sys.executable, os.path.abspath(__file__), "--child", name, mode], env=environment,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.there = any(line.strip() == "ready" for line in iter(self.process.stdout.readline, ""))

    def ask(self, what):
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return measure(*options.child, options.repeats)
    cores = os.cpu_count() or 1
    print("shape    mode           ms/step   against torch   of peak   ms/token   MB at most")
    for name in options.shapes:
        config, batch, tokens = shape_config(name)
        children = {"whole": Child(name, "whole", cores), "split": Child(name, "split", 1), "torch eager": Child(name, "torch", cores)}
        children = {mode: child for mode, child in children.items() if child.there}
        steps, decodes = {mode: [] for mode in children}, {mode: [] for mode in children}
        peaks = []
        for _ in range(options.repeats):
            for mode, child in children.items():
                steps[mode].append(child.ask("step"))
                decodes[mode].append(child.ask("decode"))
            peaks.append(2 * 2_048 ** 3 / children["whole"].ask("peak"))
        from minideepseek.model.count import active, parameters

        flops = 6 * (active(config, embedding=False) - parameters(config)["norms"]) * batch * tokens        # attention's scores left out
        for mode, child in children.items():
            seconds = statistics.median(steps[mode])
            against = f"{statistics.median([t / s for t, s in zip(steps['torch eager'], steps[mode])]):.2f} x" if "torch eager" in children else "-"
            print(f"{name:8s} {mode:12s} {seconds * 1e3:9.1f} {against:>15s} {flops / seconds / statistics.median(peaks):9.0%} "
                  f"{statistics.median(decodes[mode]) / DECODED * 1e3:10.2f} {child.ask('memory'):12.0f}", flush=True)
            child.end()
    if "torch eager" not in children:
        print("torch and transformers are not installed: nothing to compare with")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
