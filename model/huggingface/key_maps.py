"""Hugging Face's GPT-2 and StarCoder2 as our GPT: tables of fields and weights, read in both directions.

GPT-2 has learned positions; StarCoder2 has rotary positions, and one window for all layers or none. Weights are only
renamed, concatenated and transposed: a round trip gives the same bits.
"""

import re
import warnings
from dataclasses import dataclass

import torch
from einops import rearrange

from ..config import GPTConfig


@dataclass(frozen=True)
class Architecture:
    """The tables of one of their architectures."""

    model_class: str
    fields: dict
    """Field of GPTConfig -> their name."""
    fixed: dict
    """Their fields that we do not have -> the values we support. The first is written, and is their default."""
    dropouts: dict
    """Their names for our one dropout -> their default."""
    prefix: str
    """Begins the names of all weights but the head's, in files of a whole model; other files leave it out."""
    modules: dict
    """Our module -> theirs; {} is the layer. Of several of theirs, ours has the rows one after the other."""
    transposed: tuple = ()
    """Our modules whose matrix they store transposed."""
    ignored: str = "$^"
    """A pattern of names in their files that are not weights."""


GPT2 = Architecture(
    model_class="GPT2LMHeadModel",
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
STARCODER2 = Architecture(
    model_class="Starcoder2ForCausalLM",
    fields={
        "vocab_size": "vocab_size",
        "context_length": "max_position_embeddings",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_kv_head": "num_key_value_heads",
        "d_model": "hidden_size",
        "mlp_width": "intermediate_size",
        "window": "sliding_window",
        "norm_epsilon": "norm_epsilon",
        "tie_weights": "tie_word_embeddings",
    },
    fixed={"hidden_act": ("gelu_pytorch_tanh", "gelu_new"), "use_bias": (True,)},
    dropouts={"residual_dropout": 0.0, "embedding_dropout": 0.0, "attention_dropout": 0.0},
    prefix="model.",
    modules={
        "wte": "model.embed_tokens",
        "blocks.{}.ln_1": "model.layers.{}.input_layernorm",
        "blocks.{}.attn.qkv": tuple(f"model.layers.{{}}.self_attn.{x}_proj" for x in "qkv"),
        "blocks.{}.attn.proj": "model.layers.{}.self_attn.o_proj",
        "blocks.{}.ln_2": "model.layers.{}.post_attention_layernorm",
        "blocks.{}.mlp.fc": "model.layers.{}.mlp.c_fc",
        "blocks.{}.mlp.proj": "model.layers.{}.mlp.c_proj",
        "ln_f": "model.norm",
        "lm_head": "lm_head",
    },
    ignored=r"rotary_emb\.inv_freq$",
)
ARCHITECTURES = {"gpt2": GPT2, "starcoder2": STARCODER2}  # by their model_type
_ROWS_OF_TOKENS = ("wte.weight", "embed_tokens.weight", "lm_head.weight")
_UNPADDED = "vocab_size_without_pad"  # a field of config.json that transformers keeps


def config_from_theirs(values) -> GPTConfig:
    """The GPTConfig of a parsed config.json. Raises ValueError, with the field, for a model that we do not have."""
    architecture = ARCHITECTURES.get(values.get("model_type"))
    if architecture is None:
        raise ValueError(
            f"model_type is {values.get('model_type')!r}, and only {' and '.join(ARCHITECTURES)} can be converted "
            "(register_attention runs others on these kernels, unconverted)"
        )
    if values.get("quantization_config"):
        raise ValueError("its weights are quantized: convert a version in fp32, fp16 or bf16")
    for name, meanings in architecture.fixed.items():
        if values.get(name, meanings[0]) not in meanings:
            raise ValueError(f"{name} is {values[name]!r}, and only {meanings[0]!r} can be converted")
    ours = {name: values[theirs] for name, theirs in architecture.fields.items() if theirs in values}
    if missing := [
        architecture.fields[name]
        for name in ("vocab_size", "context_length", "n_layer", "n_head", "n_kv_head", "d_model")
        if name in architecture.fields and name not in ours
    ]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    ours["dropout"] = _one_dropout({name: values.get(name, usual) for name, usual in architecture.dropouts.items()})
    ours |= {"positions": "learned"} if architecture is GPT2 else _rotary_fields(values)
    config = GPTConfig(**ours)
    if values.get("head_dim") not in (None, config.head_dim):
        raise ValueError(
            f"head_dim is {values['head_dim']}, and only {config.head_dim} can be converted for a width of "
            f"{config.d_model} and {config.n_head} heads"
        )
    return config


def config_to_theirs(config) -> dict:
    """The content of their config.json. Raises ValueError for a model that transformers has no class for."""
    if config.modern_fields:
        raise ValueError(f"neither GPT-2 nor StarCoder2 has {config.modern_fields}: such a model cannot be converted")
    windows = {config.layer_window(layer) for layer in range(config.n_layer)}
    if config.positions == "learned" and (windows != {None} or config.n_kv_head < config.n_head):
        raise ValueError(
            "transformers has no class with learned positions and a window or grouped KV heads: GPT-2 has neither, and "
            "StarCoder2 rotary positions"
        )
    if len(windows) > 1:
        raise ValueError(
            f"window_pattern is {config.window_pattern!r}, but StarCoder2 has one window for all layers: call "
            "set_window(window, 'S'), and train on with it"
        )
    if any(map(config.layer_prefix, range(config.n_layer))):
        raise ValueError(
            f"prefix is {config.prefix}, but StarCoder2 has a window alone: call set_window(window, prefix=0), and "
            "train on with it"
        )
    if config.positions == "rope" and config.rotated < config.head_dim:
        raise ValueError(f"rotary_dim is {config.rotated}, but StarCoder2 rotates whole heads of {config.head_dim}")
    model_type, architecture = architecture_of(config)
    ours = {"window": windows.pop()}  # of the layers: a pattern of L layers only has no window
    return {
        "architectures": [architecture.model_class],
        "model_type": model_type,
        **{theirs: ours.get(name, getattr(config, name)) for name, theirs in architecture.fields.items()},
        **{name: meanings[0] for name, meanings in architecture.fixed.items()},
        **dict.fromkeys(architecture.dropouts, config.dropout),
        **(_their_rotary_fields(config) if config.positions == "rope" else {}),
    }


def architecture_of(config) -> tuple[str, Architecture]:
    """(model_type, tables) of a GPTConfig's architecture."""
    model_type = "gpt2" if config.positions == "learned" else "starcoder2"
    return model_type, ARCHITECTURES[model_type]


def weights_to_theirs(config, weights) -> dict:
    """Their {name: tensor} of our state dict. Neither has a tied head."""
    theirs = {}
    for name, tensor in weights.items():
        names, transposed = _their_names(config, name)
        for their_name, part in zip(names, tensor.split(_rows(config, names, tensor)), strict=True):
            theirs[their_name] = (
                rearrange(part, "outputs inputs -> inputs outputs").contiguous() if transposed else part
            )
    return theirs


def weights_from_theirs(config, weights, names) -> dict:
    """Our state dict, with these `names`, of their {name: tensor}, which `normalized` made complete."""
    ours = {}
    for name in names:
        their_names, transposed = _their_names(config, name)
        parts = [weights[their_name] for their_name in their_names]
        parts = [rearrange(part, "inputs outputs -> outputs inputs") for part in parts] if transposed else parts
        ours[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return ours


def normalized(config, weights) -> dict:
    """Their {name: tensor} with full names, weights only, and without a tied head.

    Raises ValueError for a tied head that differs from the embedding.
    """
    _, architecture = architecture_of(config)
    weights = {name: tensor for name, tensor in weights.items() if not re.search(architecture.ignored, name)}
    if not any(name.startswith(architecture.prefix) for name in weights):
        weights = {
            name if name.startswith("lm_head") else architecture.prefix + name: weights[name] for name in weights
        }
    if config.tie_weights and "lm_head.weight" in weights:
        head = weights.pop("lm_head.weight")
        if not torch.equal(head, weights.get(architecture.modules["wte"] + ".weight", head)):
            raise ValueError("lm_head.weight is not the embedding, but tie_word_embeddings is true: make it false")
    return weights


def with_pad_row(values, weights) -> tuple[dict, dict]:
    """Their config.json and weights, with one token more: the embedding, and the head, repeat their last row."""
    rows = values["vocab_size"]
    more = {name: torch.cat([x, x[-1:]]) for name, x in weights.items() if name.endswith(_ROWS_OF_TOKENS)}
    return {**values, "vocab_size": rows + 1, _UNPADDED: rows}, {**weights, **more}


def without_pad_row(values, weights) -> tuple[dict, dict]:
    """What was given to `with_pad_row`; anything else is returned as it is."""
    rows = values.get(_UNPADDED)
    if rows is None or values.get("vocab_size") != rows + 1:
        return values, weights
    fewer = {name: x[:rows].clone() for name, x in weights.items() if name.endswith(_ROWS_OF_TOKENS)}
    return {**values, "vocab_size": rows}, {**weights, **fewer}


def _their_names(config, name):
    """([their names], whether their matrix is transposed) of one of our parameters."""
    _, architecture = architecture_of(config)
    module, kind = name.rsplit(".", 1)
    layer = re.search(r"\.(\d+)\.", module)
    module = module if layer is None else module.replace(layer[0], ".{}.")
    theirs = architecture.modules[module]
    theirs = (theirs,) if isinstance(theirs, str) else theirs
    number = None if layer is None else layer[1]
    return [
        f"{their.format(number)}.{kind}" for their in theirs
    ], kind == "weight" and module in architecture.transposed


def _rows(config, names, tensor):
    """How many rows of our tensor each of their names has: all, or those of q, k and v."""
    kv_size = config.n_kv_head * config.head_dim
    return [len(tensor)] if len(names) == 1 else [config.d_model, kv_size, kv_size]


def _one_dropout(dropouts):
    if len(set(dropouts.values())) > 1:
        shown = ", ".join(f"{name} {value}" for name, value in dropouts.items())
        warnings.warn(f"a GPT has one dropout, and takes the largest of {shown}", stacklevel=4)
    return float(max(dropouts.values()))


def _rotary_fields(values):
    """rope_theta and rope_scaling; transformers 5 has both in rope_parameters, 4 the second in rope_scaling."""
    theirs = values.get("rope_parameters") or values.get("rope_scaling") or {}
    options = {name: value for name, value in theirs.items() if value is not None}
    kind = options.pop("rope_type", None) or options.get("type") or "default"
    options.pop("type", None)
    theta = options.pop("rope_theta", None) or values.get("rope_theta") or 10000.0
    if options.pop("partial_rotary_factor", 1.0) != 1.0 or (values.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError("partial_rotary_factor is not 1, and StarCoder2 rotates whole heads")
    if kind != "default" and "factor" not in options:
        raise ValueError(f"rope_type is {kind!r}, but its factor is missing")
    if kind == "default":
        scaling = None
    elif kind == "linear":
        scaling = ("linear", options["factor"])
    elif kind in ("yarn", "llama3"):
        options.setdefault("original_max_position_embeddings", values.get("max_position_embeddings"))
        scaling = (kind, options)
    else:
        raise ValueError(f"rope_type is {kind!r}, and only default, linear, yarn and llama3 can be converted")
    return {"rope_theta": float(theta), "rope_scaling": scaling}


def _their_rotary_fields(config):
    """Their fields of our rope_theta and rope_scaling, for transformers 5 and 4."""
    theta, kind, options = config.rope_theta, "default", {}
    if config.rope_scaling is not None:
        kind, options = config.rope_scaling
        if kind == "ntk":  # only another base
            theta, kind, options = theta * options ** (config.head_dim / (config.head_dim - 2)), "default", {}
        elif kind == "linear":
            options = {"factor": options}
    scaling = {"rope_type": kind, **options}
    older = {} if kind == "default" else {"rope_scaling": scaling}
    return {"rope_theta": theta, "rope_parameters": {**scaling, "rope_theta": theta}, **older}
