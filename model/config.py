"""The shape of a model: `GPTConfig`, and the named steps from GPT-2 to the modified architecture."""

from dataclasses import dataclass, fields

# Each step adds one change to the one before it; "original" is GPT-2, "rope-window-gqa" the modified architecture.
ARCHITECTURES = ("original", "rope", "rope-window", "rope-window-gqa", "modern")
MODERN = {"qk_norm": True, "tie_weights": False, "embedding_scale": 10.0}  # by experiment: docs/training-defaults.md
# minGPT's and nanoGPT's words -> the field
OTHER_WORDS = {
    "vocab": "vocab_size",
    "block_size": "context_length",
    "context_size": "context_length",
    "n_embd": "d_model",
    **dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), "dropout"),
}


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The shape of a GPT. A wrong field raises ValueError, in one line.

    The defaults are StarCoder2's architecture (rotary positions, biases, tanh GELU, LayerNorm); positions="learned" is
    GPT-2's. `window` switches sliding-window attention on, `n_kv_head` grouped KV heads.
    """

    vocab_size: int
    """Number of tokens in the vocabulary."""
    context_length: int
    """Tokens of a training sequence. Learned positions end here; rotary positions do not."""
    n_layer: int
    """Transformer blocks."""
    n_head: int
    """Query heads of a layer."""
    n_kv_head: int | None = None
    """Key and value heads of a layer, a divisor of n_head. None = n_head; 1 is multi-query attention."""
    d_model: int
    """Width of the residual stream."""
    head_dim: int | None = None
    """Elements of a head. None = d_model / n_head."""
    mlp_width: int | None = None
    """Width inside the MLP. None = 4 * d_model."""
    mlp: str = "gelu"
    """Between the MLP's matrices: "gelu" (tanh formula), "relu2", relu(x)^2 (arXiv:2109.08668), "swiglu", silu(gate) *
    x, or "geglu", gelu(gate) * x (arXiv:2002.05202). With a gate the first matrix has 2 * mlp_width rows, the gate's
    before x's."""
    norm: str = "layer"
    """"layer" is LayerNorm, "rms" RMSNorm (arXiv:1910.07467), which has no bias, "rms1" RMSNorm times 1 + weight, as
    Gemma has it."""
    norm_position: str = "before"
    """Where a sub-layer's norm stands: "before" it, "after" it (OLMo 2), or on "both" sides (Gemma 2). The head has one
    before it."""
    qk_norm: bool | str = False
    """True: each head of q and k has an RMSNorm before the rotation (Qwen 3), one weight for the heads of a layer.
    "all": one RMSNorm over all heads together (OLMo 2)."""
    bias: bool = True
    """Whether linear layers and LayerNorms have a bias."""
    qkv_bias: bool | None = None
    """Whether the projection to q, k and v has one (Qwen 2). None = bias."""
    embedding_scale: float = 1.0
    """Factor of the token embeddings; Gemma's is sqrt(d_model)."""
    attention_scale: float | None = None
    """Factor of the products of q and k. None = head_dim ** -0.5."""
    attention_softcap: float | None = None
    """Bounds attention's scores to softcap * tanh(score / softcap) (Gemma 2, arXiv:2408.00118). None = no bound."""
    logit_softcap: float | None = None
    """Bounds the model's logits in the same way."""
    positions: str = "rope"
    """"rope": q and k are rotated by their position. "learned": one vector a position is added to the embedding."""
    window: int | None = None
    """Keys a query sees on a sliding layer, its own included (Hugging Face's `sliding_window`). None = all earlier."""
    window_pattern: str = "S"
    """One letter a layer, repeated: S has the sliding `window`, L sees all earlier keys, N too and rotates nothing
    (SmolLM 3; arXiv:2501.18795). "SSSL": every fourth is L."""
    prefix: int = 0
    """First positions of each document that every later query of a sliding layer sees besides its window: attention
    sinks (StreamingLLM, arXiv:2309.17453). Layers that see all earlier keys have no use for it."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths: the longest is about 2 pi * rope_theta tokens."""
    rope_scaling: tuple | None = None
    """Scales rotary positions to longer contexts: the `scaling` of kernels.rope_tables, e.g. ("linear", 2.0)."""
    local_rope_theta: float | None = None
    """Base of S layers, whose positions are not scaled then (Gemma 3, OLMo 3). None = as all layers."""
    rotary_dim: int | None = None
    """Rotated elements of a head, an even number. None = the whole head."""
    dropout: float = 0.0
    """Dropout probability in training, for embeddings, attention weights and residual branches."""
    tie_weights: bool = True
    """Whether the output projection is the token embedding."""
    norm_epsilon: float = 1e-5
    """Added to the variance, or the mean square, in every norm."""

    def __new__(cls, *values, **named):
        """Raises TypeError that says what to write, for values without a name and for other libraries' words."""
        problems = ["give names: vocab_size=..., context_length=... (others' block_size), ..."] if values else []
        problems += [f"{word} is {OTHER_WORDS[word]} here" for word in named if word in OTHER_WORDS]
        if problems:
            raise TypeError("GPTConfig: " + "; ".join(problems))
        return super().__new__(cls)

    def __post_init__(self):
        for name in ("vocab_size", "context_length", "n_layer", "n_head", "d_model"):
            _check_count(name, getattr(self, name))
        if self.head_dim is None and self.d_model % self.n_head:
            raise ValueError(
                f"n_head={self.n_head} does not divide d_model={self.d_model}: heads are of equal size, or of head_dim"
            )
        defaults = {
            "n_kv_head": self.n_head,
            "head_dim": self.d_model // self.n_head,
            "mlp_width": 4 * self.d_model,
            "qkv_bias": self.bias,
        }
        for name, default in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
            if name != "qkv_bias":
                _check_count(name, getattr(self, name))
        if self.n_head % self.n_kv_head:
            raise ValueError(
                f"n_kv_head={self.n_kv_head} does not divide n_head={self.n_head} (grouped KV heads need "
                f"n_head % n_kv_head == 0): take one of {', '.join(map(str, _divisors(self.n_head)))}"
            )
        if self.window is not None:
            _check_count("window", self.window, hint="the query's own key included, or None for all earlier keys")
        if not isinstance(self.prefix, int) or isinstance(self.prefix, bool) or self.prefix < 0:
            raise ValueError(f"prefix={self.prefix!r} is not a whole number of at least 0")
        if self.prefix > self.context_length:
            raise ValueError(f"prefix={self.prefix} is more than the context_length of {self.context_length} positions")
        if not self.window_pattern or set(self.window_pattern) - set("SLN"):
            raise ValueError(
                f"window_pattern={self.window_pattern!r} is not made of the letters S (slides by window), L (sees all "
                "earlier keys) and N (as L, without rotation): write e.g. 'SSSL'"
            )
        if self.positions not in ("rope", "learned"):
            raise ValueError(f"positions={self.positions!r} is neither 'rope' nor 'learned'")
        self._check_blocks()
        if self.positions == "rope":
            self._check_rotary()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} is not a probability below 1")
        if not self.norm_epsilon > 0:
            raise ValueError(f"norm_epsilon={self.norm_epsilon} is not positive")

    def _check_blocks(self):
        known = {
            "norm": ("layer", "rms", "rms1"),
            "norm_position": ("before", "after", "both"),
            "mlp": ("gelu", "relu2", "swiglu", "geglu"),
            "qk_norm": (False, True, "all"),
            "bias": (True, False),
            "qkv_bias": (True, False),
        }
        for name, values in known.items():
            value = getattr(self, name)
            if not any(type(value) is type(other) and value == other for other in values):  # 1 is not True
                raise ValueError(f"{name}={value!r} is unknown: take one of {', '.join(map(str, values))}")
        for name in ("embedding_scale", "attention_scale", "attention_softcap", "logit_softcap", "local_rope_theta"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and value > 0):
                raise ValueError(f"{name}={value!r} is not a number above 0")

    def _check_rotary(self):
        if self.rotary_dim is not None:
            _check_count("rotary_dim", self.rotary_dim)
        if self.rotated % 2 or self.rotated > self.head_dim:
            raise ValueError(
                f"{self.rotated} elements of a head of {self.head_dim} cannot be rotated in pairs: set rotary_dim to "
                "an even number up to head_dim"
            )
        if not self.rope_theta > 0:
            raise ValueError(f"rope_theta={self.rope_theta} is not positive")
        if self.rope_scaling is not None:
            if not (isinstance(self.rope_scaling, tuple | list) and len(self.rope_scaling) == 2):
                raise ValueError(f"rope_scaling={self.rope_scaling!r} is no pair such as ('linear', 2.0)")
            object.__setattr__(self, "rope_scaling", tuple(self.rope_scaling))  # JSON has lists only

    @classmethod
    def for_architecture(cls, name, **fields):
        """The config of a named step of ARCHITECTURES. Fields that the step does not have are ignored.

        One set of fields makes all steps: "original" and "rope" ignore window and prefix, only "rope-window-gqa" and
        "modern", which has the fields of MODERN besides, take n_kv_head. Raises ValueError for an unknown name, and for
        a step without the window or n_kv_head it needs.
        """
        if name not in ARCHITECTURES:
            raise ValueError(f"architecture {name!r} is unknown: take one of {', '.join(ARCHITECTURES)}")
        fields["positions"] = "learned" if name == "original" else "rope"
        if name == "modern":
            name, fields = "rope-window-gqa", MODERN | fields
        if "window" not in name:
            fields["window"], fields["prefix"] = None, 0
        elif fields.get("window") is None:
            raise ValueError(f"architecture {name!r} needs a window, the number of keys a query sees")
        if "gqa" not in name:
            fields["n_kv_head"] = None
        elif fields.get("n_kv_head") is None:
            raise ValueError(f"architecture {name!r} needs n_kv_head, the number of key and value heads")
        return cls(**fields)

    @property
    def architecture(self) -> str:
        """The name in ARCHITECTURES, or for another combination its parts joined in the same way, as in "rope-gqa"."""
        parts = ["original" if self.positions == "learned" else "rope"]
        parts += ["window"] if any(self.layer_window(i) is not None for i in range(self.n_layer)) else []
        parts += ["gqa"] if self.n_kv_head < self.n_head else []
        modern = all(getattr(self, field) == value for field, value in MODERN.items())
        return "modern" if modern and len(parts) == 3 else "-".join(parts)

    @property
    def modern_fields(self) -> str:
        """The fields in which a block is not GPT-2's, for a message: "norm 'rms', bias False"; "" if there is none."""
        usual = {"head_dim": self.d_model // self.n_head, "qkv_bias": self.bias}
        names = (
            "head_dim mlp norm norm_position qk_norm bias qkv_bias embedding_scale attention_scale attention_softcap "
            "logit_softcap local_rope_theta"
        )
        usual |= {field.name: field.default for field in fields(self) if field.name in names.split()} | usual
        return ", ".join(f"{name} {getattr(self, name)!r}" for name in usual if getattr(self, name) != usual[name])

    @property
    def rotated(self) -> int:
        """Rotated elements of a head."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    def layer_kind(self, layer) -> str:
        """The layer's letter in `window_pattern`."""
        return self.window_pattern[layer % len(self.window_pattern)]

    def layer_window(self, layer) -> int | None:
        """Keys a query of this layer sees; None = all earlier keys."""
        return self.window if self.layer_kind(layer) == "S" else None

    def layer_rope(self, layer) -> tuple | None:
        """(theta, scaling) of the layer's rotation, as `kernels.rope_tables` takes them; None where nothing rotates."""
        if self.positions != "rope" or self.layer_kind(layer) == "N":
            return None
        if self.layer_kind(layer) == "S" and self.local_rope_theta is not None:
            return self.local_rope_theta, None
        return self.rope_theta, self.rope_scaling

    def layer_prefix(self, layer) -> int:
        """First positions that each query of this layer sees besides its window; 0 without a window."""
        return 0 if self.layer_window(layer) is None else self.prefix

    @property
    def prefix_distance(self) -> int | None:
        """The largest distance from a query to the prefix's beginning that rotation shows; None where nothing rotates.

        That of training, or of the first query whose window has left the prefix: past context_length the model sees the
        prefix as it did there.
        """
        if self.positions != "rope" or not self.prefix or self.window is None:
            return None
        return max(self.context_length, self.window + self.prefix) - 1

    def differences(self, other) -> str:
        """The fields that differ, for a message: "n_layer 4 and 6, window None and 32"; "" if equal."""
        pairs = ((field.name, getattr(self, field.name), getattr(other, field.name)) for field in fields(self))
        return ", ".join(f"{name} {mine} and {theirs}" for name, mine, theirs in pairs if mine != theirs)


def _check_count(name, value, hint=None):
    """Raise ValueError unless value is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} is not a whole number of at least 1" + (f" ({hint})" if hint else ""))


def _divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]
