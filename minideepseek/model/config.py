"""The configuration: every size and choice of a model in one frozen dataclass, checked when it is made.

Derivation: whiteboard/model/config.md     Source: DeepSeek-V3, arXiv:2412.19437, sec. 4.2, for the defaults
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import dataclasses
import math
import sys

ATTENTION = ("mla", "mha", "gqa", "mqa")
BALANCE = ("none", "aux", "bias")
SCORING = ("sigmoid", "softmax")


class ConfigError(ValueError):
    """A configuration no model can have; the message names the field and the value received."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and choices of one model. The defaults are those of DeepSeek-V3.

    Raises ConfigError at construction for a value that breaks a rule; TypeError for a field that does not exist.
    """
    vocab_size: int = 129_280
    d_model: int = 7_168
    n_layers: int = 61
    n_dense_layers: int = 3            # the first layers have one dense feed-forward instead of experts
    d_ff: int = 18_432                 # its width
    max_positions: int = 163_840       # tokens in the position table
    eps: float = 1e-6                  # of the RMSNorms of the stream; those of the latents keep 1e-6

    attention: str = "mla"
    n_heads: int = 128
    n_kv_heads: int | None = None      # key-value heads of gqa; None for the others, which leave no choice
    q_rank: int | None = 1_536         # None: no query latent (V2-Lite)
    kv_rank: int = 512
    d_nope: int = 128
    d_rope: int = 64
    d_value: int = 128
    rope_base: float = 10_000.0
    rope_interleaved: bool = True
    yarn_factor: float = 40.0          # 1: no stretch
    yarn_original: int = 4_096         # tokens
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    flash_tile: int | None = None      # tokens in a tile of FlashAttention; None: the dense core, the same numbers
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    n_routed: int = 256
    n_shared: int = 1
    top_k: int = 8
    d_expert: int = 2_048
    n_groups: int = 8
    n_groups_kept: int = 4
    scoring: str = "sigmoid"           # softmax: V2
    normalise: bool = True
    scaling: float = 2.5
    balance: str = "bias"

    n_mtp: int = 1                     # multi-token-prediction modules
    mtp_embedding_first: bool = True   # their projection reads [embedding; hidden], as public checkpoints do; the paper's order: False
    mtp_reads_normed: bool = True      # a module reads the previous hidden state after its final norm, as the public code does

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None or field.name not in ("q_rank", "n_kv_heads", "flash_tile"):
                _check_kind(field.name, 0 if field.default is None else field.default, value)
        for name in ("vocab_size", "d_model", "n_layers", "d_ff", "max_positions", "n_heads", "kv_rank", "d_nope", "d_rope",
                     "d_value", "yarn_original", "n_routed", "top_k", "d_expert", "n_groups", "n_groups_kept"):
            self._rule(getattr(self, name) > 0, name, "must be positive")
        for name in ("n_dense_layers", "n_shared", "n_mtp"):
            self._rule(getattr(self, name) >= 0, name, "must not be negative")
        for name in ("eps", "rope_base", "yarn_beta_fast", "yarn_beta_slow", "scaling"):
            self._rule(getattr(self, name) > 0, name, "must be positive")
        for name, allowed in (("attention", ATTENTION), ("balance", BALANCE), ("scoring", SCORING)):
            self._rule(getattr(self, name) in allowed, name, f"must be one of {', '.join(allowed)}")
        self._rule(self.flash_tile is None or self.flash_tile > 0, "flash_tile", "must be positive, or None for the dense core")
        self._rule(self.flash_tile is None or self.attention == "mla", "flash_tile", f"must be None: attention = {self.attention!r} has the dense core only")
        self._rule(self.q_rank is None or self.q_rank > 0, "q_rank", "must be positive, or None for no query latent")
        self._rule(self.d_rope % 2 == 0, "d_rope", "must be even: RoPE turns pairs of channels")
        self._rule(self.rotary % 2 == 0, "d_nope", f"and d_rope = {self.d_rope} make a head of odd size, which RoPE turns in pairs")
        self._rule(self.yarn_factor >= 1, "yarn_factor", "must be at least 1")
        self._rule(self.n_dense_layers <= self.n_layers, "n_dense_layers", f"exceeds n_layers = {self.n_layers}")
        if self.attention == "gqa":
            self._rule(self.n_kv_heads is not None and self.n_kv_heads > 0, "n_kv_heads", "must be positive: gqa needs it")
            self._rule(self.n_heads % self.n_kv_heads == 0, "n_kv_heads", f"does not divide n_heads = {self.n_heads}")
        else:
            self._rule(self.n_kv_heads is None, "n_kv_heads", f"must be None: attention = {self.attention!r} leaves no choice")
        self._rule(self.n_routed % self.n_groups == 0, "n_groups", f"does not divide n_routed = {self.n_routed}")
        self._rule(self.n_groups_kept <= self.n_groups, "n_groups_kept", f"exceeds n_groups = {self.n_groups}")
        self._rule(self.top_k <= self.reachable, "top_k", f"exceeds the {self.reachable} experts a token can reach: "
                   f"{self.n_groups_kept} of {self.n_groups} groups of {self.n_routed // self.n_groups}")

    def _rule(self, holds, name, message):
        if not holds:
            raise ConfigError(f"{name} = {getattr(self, name)!r} {message}")

    @property
    def kv_heads(self):
        """Heads of keys and values: of mha, gqa and mqa."""
        return {"mha": self.n_heads, "gqa": self.n_kv_heads, "mqa": 1}[self.attention]

    @property
    def rotary(self):
        """Channels of a head that RoPE turns: d_rope of them in latent attention, all in the kinds below it."""
        return self.d_rope if self.attention == "mla" else self.d_nope + self.d_rope

    @property
    def reachable(self):
        """How many routed experts a token can choose from, once its groups are kept."""
        return self.n_routed // self.n_groups * self.n_groups_kept

    @classmethod
    def from_dict(cls, fields):
        """A configuration from a dictionary of fields. Raises ConfigError that lists the unknown ones."""
        unknown = sorted(map(str, fields.keys() - {field.name for field in dataclasses.fields(cls)}))
        if unknown:
            raise ConfigError(f"unknown fields: {', '.join(unknown)}")
        return cls(**fields)

    def to_dict(self):
        """All fields, as plain numbers and strings."""
        return dataclasses.asdict(self)


def _check_kind(name, default, value):
    """A whole number where the default is one, a finite number where it is a float, a bool for a bool."""
    if isinstance(default, bool) or isinstance(default, str):
        right = isinstance(value, type(default))
    elif isinstance(default, int):
        right = isinstance(value, int) and not isinstance(value, bool)
    else:
        right = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if not right:
        kind = {bool: "True or False", str: "a string", int: "a whole number", float: "a finite number"}[type(default)]
        raise ConfigError(f"{name} = {value!r} must be {kind}")


def demo():
    """V3's own numbers, and what three impossible models are told."""
    v3 = Config()
    print(f"shapes    {len(dataclasses.fields(Config))} fields; V3: {v3.n_layers} layers, {v3.d_model} wide, {v3.n_heads} heads")
    print(f"by hand   {v3.n_groups_kept} of {v3.n_groups} groups of {v3.n_routed // v3.n_groups} experts: a token reaches {v3.reachable}")
    refused = 0
    for wrong in ({"top_k": 129}, {"d_rope": 63}, {"n_groups": 7}, {"scaling": math.nan}):
        try:
            Config(**wrong)
        except ConfigError as error:
            refused += 1
            print(f"refused   {error}")
    print(f"claim     {refused} of 4 impossible models refused; V3 survives the way through a dictionary: {Config.from_dict(v3.to_dict()) == v3}")
    assert refused == 4 and Config.from_dict(v3.to_dict()) == v3 and v3.reachable == 128


if __name__ == "__main__":
    from minideepseek.model.config import demo  # the imported copy, so that every name exists once
    demo()
