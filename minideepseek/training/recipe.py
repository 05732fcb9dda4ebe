"""The recipe of a run: every number that training needs beside the model, checked when it is made, and named presets.

Derivation: whiteboard/training/recipe.md     Source: DeepSeek-V3, arXiv:2412.19437, sec. 4.2, for the kinds of numbers
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import dataclasses
import math
import sys

from minideepseek.model.config import ATTENTION
from minideepseek.model.presets import PRESETS
from minideepseek.tokenizer.chat import SPECIAL


PRECISIONS = ("fp32", "bf16", "fp8")


class RecipeError(ValueError):
    """A recipe no run can have; the message names the field and the value received."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train. Raises RecipeError at construction for a value that breaks a rule."""
    model: str = "tiny"              # a preset of model/presets.py
    attention: str = "mla"           # or a rung below it: mha, gqa (two key-value heads), mqa
    seed: int = 0
    steps: int = 750
    batch: int = 8                   # windows per step
    length: int = 128                # tokens in a window
    pieces: int = 2                  # the batch is cut into; their gradients add up, in order, whoever computes them
    corpus_bytes: int = 4_000_000    # of town stories; with a text file, all of it
    vocab_size: int = 512            # of the tokenizer, special tokens included

    init_std: float = 0.08           # about 1 / sqrt(d_model); V3's 0.006 is half of that at its width
    head_std: float = 0.03           # of the output head: above 0.4 / sqrt(d_model) the first loss is no longer ln(vocabulary)
    peak: float = 3e-3               # learning rate
    warmup: int = 40                 # steps
    decay: int = 450                 # the last steps, in which it falls
    floor: float = 1e-4              # what it falls to
    weight_decay: float = 0.1
    clip: float = 1.0                # largest global norm of the gradient

    balance: str = "bias"            # bias: loss-free, with a weak sequence-wise loss; aux: that loss alone; none
    gamma: float = 0.01              # speed of the selection bias; V3: 0.001, over far more steps
    gamma_off: int = 75              # the last steps, in which it stands still
    balance_weight: float = 1e-4     # alpha of the sequence-wise loss
    n_mtp: int = 1
    mtp_first: float = 0.3           # weight of the modules' loss ...
    mtp_then: float = 0.1            # ... and in the last third

    precision: str = "fp32"          # of the products of linear layers, and of AdamW's moments; see mixed_precision
    fp8_tile: int = 32               # entries that share a scale; V3: 128, in far larger matrices
    fp8_scales: str = "tiles"        # or "tensor": one for each whole matrix, as before V3
    fp8_gradients: str = "E4M3"      # or "E5M2", as before V3

    log_every: int = 10
    evaluate_every: int = 150
    save_every: int = 150
    evaluation_stories: int = 256    # held-out texts; of a text file: windows

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), field.type
            if kind is float:
                fits = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
            else:
                fits = type(value) is kind
            self._rule(fits, field.name, f"must be {({int: 'a whole number', float: 'a finite number', str: 'a string'}[kind])}")
        for name in ("steps", "batch", "length", "pieces", "corpus_bytes", "warmup", "fp8_tile", "log_every", "evaluate_every", "save_every", "evaluation_stories",
                     "init_std", "head_std", "peak", "clip"):
            self._rule(getattr(self, name) > 0, name, "must be positive")
        for name in ("seed", "decay", "floor", "weight_decay", "gamma", "gamma_off", "balance_weight", "n_mtp", "mtp_first", "mtp_then"):
            self._rule(getattr(self, name) >= 0, name, "must not be negative")
        self._rule(self.batch % self.pieces == 0, "pieces", f"does not divide batch = {self.batch}")
        self._rule(self.warmup + self.decay <= self.steps, "warmup", f"and decay = {self.decay} do not fit into steps = {self.steps}")
        self._rule(self.gamma_off <= self.steps, "gamma_off", f"exceeds steps = {self.steps}")
        self._rule(self.vocab_size >= 256 + len(SPECIAL), "vocab_size", f"has no room for 256 bytes and {len(SPECIAL)} special tokens")
        self._rule(self.model in PRESETS, "model", f"does not exist; there are {', '.join(PRESETS)}")
        self._rule(self.length <= PRESETS[self.model].max_positions, "length", f"exceeds the model's max_positions = {PRESETS[self.model].max_positions}")
        self._rule(self.floor <= self.peak, "floor", f"exceeds peak = {self.peak}")
        self._rule(self.length > self.n_mtp + 1, "length", f"is too short for n_mtp = {self.n_mtp} modules")
        self._rule(self.attention in ATTENTION, "attention", f"must be one of {', '.join(ATTENTION)}")
        for name, allowed in (("balance", ("bias", "aux", "none")), ("precision", PRECISIONS), ("fp8_scales", ("tiles", "tensor")), ("fp8_gradients", ("E4M3", "E5M2"))):
            self._rule(getattr(self, name) in allowed, name, f"must be one of {', '.join(allowed)}")

    def _rule(self, holds, name, message):
        if not holds:
            raise RecipeError(f"{name} = {getattr(self, name)!r} {message}")

    def with_steps(self, steps):
        """The same recipe for another number of steps: decay and gamma_off keep their share, the warm-up at most a quarter."""
        scale, warmup = steps / self.steps, max(1, min(self.warmup, steps // 4))
        return dataclasses.replace(self, steps=steps, warmup=warmup, decay=min(steps - warmup, round(self.decay * scale)),
                                   gamma_off=round(self.gamma_off * scale))

    def to_dict(self):
        """All fields, as plain numbers and strings."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields):
        """A recipe from a dictionary. Raises RecipeError that lists the unknown fields."""
        unknown = sorted(map(str, fields.keys() - {field.name for field in dataclasses.fields(cls)}))
        if unknown:
            raise RecipeError(f"unknown fields: {', '.join(unknown)}")
        return cls(**fields)

    def differences(self, other):
        """['steps: 100 here, 200 there', ...]: the fields in which two recipes differ."""
        here, there = self.to_dict(), other.to_dict()
        return [f"{name}: {here[name]!r} here, {there[name]!r} there" for name in here if here[name] != there[name]]


RECIPES = {
    "micro": Recipe(model="micro", steps=400, decay=300, init_std=0.12, corpus_bytes=1_500_000, gamma_off=40, evaluate_every=200, save_every=200, fp8_tile=16),
    "tiny": Recipe(),
    "small": Recipe(model="small", steps=1_500, init_std=0.06, head_std=0.025, length=256, decay=1_000, vocab_size=1_024, corpus_bytes=12_000_000, peak=1.5e-3, warmup=100, gamma_off=150,
                    evaluate_every=500, save_every=250, fp8_tile=64),
}


def recipe(name):
    """The recipe of a name. Raises RecipeError that lists the names there are."""
    if name not in RECIPES:
        raise RecipeError(f"preset {name!r} does not exist; there are {', '.join(RECIPES)}")
    return RECIPES[name]


def demo():
    """The presets side by side, and two recipes no run can have."""
    fields = ("model", "steps", "batch", "length", "vocab_size", "peak", "gamma")
    print("preset   ", " ".join(f"{field:>10s}" for field in fields))
    for name, one in RECIPES.items():
        print(f"{name:9s}", " ".join(f"{getattr(one, field)!s:>10s}" for field in fields))
    refused = 0
    for wrong in ({"batch": 8, "pieces": 3}, {"peak": math.nan}):
        try:
            Recipe(**wrong)
        except RecipeError as error:
            refused += 1
            print("refused  ", error)
    same = Recipe.from_dict(RECIPES["small"].to_dict()) == RECIPES["small"]
    print(f"claim     {refused} of 2 refused; a recipe survives the way through a dictionary: {same}")
    assert refused == 2 and same


if __name__ == "__main__":
    from minideepseek.training.recipe import demo  # the imported copy, so that every name exists once
    demo()
