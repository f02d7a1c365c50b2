"""The models of Hugging Face that are ours under other names: one table a family, read in both directions.

GPT-2, StarCoder2, Llama, Mistral, Qwen 2 and 3, OLMo 2 and 3, SmolLM 3, Gemma 2 and 3 (text). key_maps.py reads them.
"""

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Family:
    """The tables of one family. "Their fields" are those of config.json."""

    model_class: str
    """Of transformers."""
    blocks: dict
    """Field of GPTConfig -> the value that all models of the family have; other fields are as usual, or in `fields`."""
    fields: dict
    """Field of GPTConfig -> their name, or several names that must agree."""
    defaults: dict
    """Their field -> what it is when a config.json lacks it. A field of `fields` without one must be there."""
    fixed: dict
    """Their fields that we do not have -> the values we support. The first is written, and is their default."""
    modules: dict
    """Our module -> theirs; {} is the layer. Of several of theirs, ours has the rows one after the other."""
    dropouts: dict = field(default_factory=lambda: {"attention_dropout": 0.0})
    """Their names for our one dropout -> their default."""
    prefix: str = "model."
    """Begins the names of all weights but the head's, in files of a whole model; other files leave it out."""
    letters: str = "L"
    """What layers can be, in the letters of `window_pattern`. "L": no windows. "S": all layers have one window, or none
    has. "SL": each layer, by layer_types. "SLN": no_rope_layers, too."""
    default_pattern: str = ""
    """`window_pattern` of a config.json without layer_types. "": its other fields say it."""
    local_rope: str | None = None
    """Where layers that slide have their own rotation, and rope_parameters an entry for each of layer_types: the field
    of transformers 4 with the base of those that slide."""
    scaled_embedding: bool = False
    """Embeddings are multiplied by sqrt(d_model)."""
    tokenizer: str = ""
    """The class that AutoTokenizer takes for all models of the family, whatever tokenizer_config.json says."""
    equal_heads: bool = False
    """n_head must divide d_model, also where head_dim is given."""
    transposed: tuple = ()
    """Our modules whose matrix they store transposed."""
    ignored: str = r"rotary_emb\.inv_freq$"
    """A pattern of names in their files that are not weights."""


GPT2 = Family(
    model_class="GPT2LMHeadModel",
    blocks={"positions": "learned"},
    fields={
        "vocab_size": "vocab_size",
        "context_length": "n_positions",
        "n_layer": "n_layer",
        "n_head": "n_head",
        "d_model": "n_embd",
        "mlp_width": "n_inner",
        "norm_epsilon": "layer_norm_epsilon",
        "tie_weights": "tie_word_embeddings",
    },
    defaults={"n_inner": None, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    fixed={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of one formula
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    dropouts={"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
    prefix="transformer.",
    modules={
        "wte": "transformer.wte",
        "wpe": "transformer.wpe",
        "blocks.{}.ln_1": "transformer.h.{}.ln_1",
        "blocks.{}.attn.qkv": "transformer.h.{}.attn.c_attn",
        "blocks.{}.attn.proj": "transformer.h.{}.attn.c_proj",
        "blocks.{}.ln_2": "transformer.h.{}.ln_2",
        "blocks.{}.mlp.fc": "transformer.h.{}.mlp.c_fc",
        "blocks.{}.mlp.proj": "transformer.h.{}.mlp.c_proj",
        "ln_f": "transformer.ln_f",
        "lm_head": "lm_head",
    },
    transposed=("blocks.{}.attn.qkv", "blocks.{}.attn.proj", "blocks.{}.mlp.fc", "blocks.{}.mlp.proj"),  # Conv1D
    ignored=r"\.attn\.(masked_)?bias$",  # causal masks
)

# what all others share
_FIELDS = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "d_model": "hidden_size",
    "mlp_width": "intermediate_size",
    "norm_epsilon": "rms_norm_eps",
    "tie_weights": "tie_word_embeddings",
}
_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10000.0}
_MODULES = {
    "wte": "model.embed_tokens",
    "blocks.{}.ln_1": "model.layers.{}.input_layernorm",
    "blocks.{}.attn.qkv": tuple(f"model.layers.{{}}.self_attn.{x}_proj" for x in "qkv"),
    "blocks.{}.attn.proj": "model.layers.{}.self_attn.o_proj",
    "blocks.{}.ln_2": "model.layers.{}.post_attention_layernorm",
    "blocks.{}.mlp.fc": tuple(f"model.layers.{{}}.mlp.{x}_proj" for x in ("gate", "up")),
    "blocks.{}.mlp.proj": "model.layers.{}.mlp.down_proj",
    "ln_f": "model.norm",
    "lm_head": "lm_head",
}
_QK_NORMS = {f"blocks.{{}}.attn.{x}_norm": f"model.layers.{{}}.self_attn.{x}_norm" for x in "qk"}

STARCODER2 = Family(
    model_class="Starcoder2ForCausalLM",
    blocks={},
    fields={**_FIELDS, "norm_epsilon": "norm_epsilon", "window": "sliding_window"},
    defaults={"norm_epsilon": 1e-5, "tie_word_embeddings": True, "rope_theta": 10000.0, "sliding_window": None},
    fixed={"hidden_act": ("gelu_pytorch_tanh", "gelu_new"), "use_bias": (True,)},
    dropouts={"residual_dropout": 0.0, "embedding_dropout": 0.0, "attention_dropout": 0.0},
    modules={
        **_MODULES,
        "blocks.{}.mlp.fc": "model.layers.{}.mlp.c_fc",
        "blocks.{}.mlp.proj": "model.layers.{}.mlp.c_proj",
    },
    letters="S",
)
LLAMA = Family(
    model_class="LlamaForCausalLM",
    blocks={"norm": "rms", "mlp": "swiglu"},
    fields={**_FIELDS, "head_dim": "head_dim", "bias": ("attention_bias", "mlp_bias")},
    defaults={
        **_DEFAULTS,
        "num_key_value_heads": None,
        "head_dim": None,
        "attention_bias": False,
        "mlp_bias": False,
    },
    fixed={"hidden_act": ("silu",)},
    modules=_MODULES,
    equal_heads=True,
)
_NO_BIAS = {**LLAMA.blocks, "bias": False}
MISTRAL = Family(
    model_class="MistralForCausalLM",
    blocks=_NO_BIAS,
    fields={**_FIELDS, "head_dim": "head_dim", "window": "sliding_window"},
    defaults={**_DEFAULTS, "head_dim": None, "sliding_window": 4096},
    fixed=LLAMA.fixed,
    modules=_MODULES,
    letters="S",
)
QWEN2 = Family(
    model_class="Qwen2ForCausalLM",
    blocks={**_NO_BIAS, "qkv_bias": True},
    fields={**_FIELDS, "window": "sliding_window"},
    defaults={**_DEFAULTS, "sliding_window": 4096, "use_sliding_window": False},
    fixed=LLAMA.fixed,
    modules=_MODULES,
    letters="SL",
    tokenizer="Qwen2Tokenizer",
)
QWEN3 = replace(
    QWEN2,
    model_class="Qwen3ForCausalLM",
    blocks={**_NO_BIAS, "qk_norm": True},
    fields={**QWEN2.fields, "head_dim": "head_dim"},
    defaults={**QWEN2.defaults, "head_dim": 128},
    fixed={**LLAMA.fixed, "attention_bias": (False,)},
    modules={**_MODULES, **_QK_NORMS},
    tokenizer="",
)
OLMO2 = Family(
    model_class="Olmo2ForCausalLM",
    blocks={**_NO_BIAS, "qk_norm": "all", "norm_position": "after"},
    fields=_FIELDS,
    defaults={**_DEFAULTS, "rms_norm_eps": 1e-5, "num_key_value_heads": None},
    fixed=QWEN3.fixed,
    modules={
        **{ours: theirs for ours, theirs in _MODULES.items() if ".ln_" not in ours},
        **_QK_NORMS,
        "blocks.{}.post_1": "model.layers.{}.post_attention_layernorm",
        "blocks.{}.post_2": "model.layers.{}.post_feedforward_layernorm",
    },
)
OLMO3 = replace(
    OLMO2,
    model_class="Olmo3ForCausalLM",
    fields={**_FIELDS, "window": "sliding_window"},
    defaults={**OLMO2.defaults, "rope_theta": 500000.0, "sliding_window": 4096},
    letters="SL",
    default_pattern="SSSL",
    local_rope="rope_theta",
)
SMOLLM3 = Family(
    model_class="SmolLM3ForCausalLM",
    blocks=LLAMA.blocks,
    fields={**_FIELDS, "bias": LLAMA.fields["bias"], "window": "sliding_window"},
    defaults={
        **_DEFAULTS,
        "tie_word_embeddings": True,
        "rope_theta": 2000000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    fixed=LLAMA.fixed,
    modules=_MODULES,
    letters="SLN",
)
GEMMA2 = Family(
    model_class="Gemma2ForCausalLM",
    blocks={"norm": "rms1", "norm_position": "both", "mlp": "geglu", "bias": False},
    fields={
        **_FIELDS,
        "head_dim": "head_dim",
        "window": "sliding_window",
        "attention_scale": "query_pre_attn_scalar",
        "attention_softcap": "attn_logit_softcapping",
        "logit_softcap": "final_logit_softcapping",
    },
    defaults={
        **_DEFAULTS,
        "tie_word_embeddings": True,
        "head_dim": 256,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    fixed={
        "hidden_activation": ("gelu_pytorch_tanh",),
        "attention_bias": (False,),
        "use_bidirectional_attention": (None, False),
    },
    modules={
        **OLMO2.modules,
        "blocks.{}.ln_1": "model.layers.{}.input_layernorm",
        "blocks.{}.ln_2": "model.layers.{}.pre_feedforward_layernorm",
    },
    letters="SL",
    default_pattern="SL",
    scaled_embedding=True,
    equal_heads=True,
)
GEMMA3 = replace(
    GEMMA2,
    model_class="Gemma3ForCausalLM",
    blocks={**GEMMA2.blocks, "qk_norm": True},
    fields={ours: theirs for ours, theirs in GEMMA2.fields.items() if ours != "attention_softcap"},
    defaults={
        **{name: value for name, value in GEMMA2.defaults.items() if name != "attn_logit_softcapping"},
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "final_logit_softcapping": None,
    },
    fixed={
        **GEMMA2.fixed,
        "use_bidirectional_attention": (False, None),
        "attn_logit_softcapping": (None,),  # their code does not read it
    },
    default_pattern="SSSSSL",
    local_rope="rope_local_base_freq",
)
# by their model_type; a model goes out as the first that can say it
FAMILIES = {
    "gpt2": GPT2,
    "starcoder2": STARCODER2,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "olmo2": OLMO2,
    "olmo3": OLMO3,
    "smollm3": SMOLLM3,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
}
