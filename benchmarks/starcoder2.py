"""A model of ours in Hugging Face's StarCoder2 class, with the same weights: one function, two implementations."""

import harness
import torch

from model import GPT


def why_not(config):
    """Why Hugging Face's StarCoder2 cannot be this config, in a few words; None if it can."""
    if missing := harness.not_installed("transformers"):
        return missing
    windows = {config.layer_window(layer) for layer in range(config.n_layer)}
    if config.positions != "rope" or len(windows) > 1 or config.rotated != config.head_dim or config.rope_scaling:
        return "StarCoder2 has rotary positions over the whole head, and one window for all layers"
    return None


@torch.no_grad()
def starcoder2_of(model: GPT, max_positions: int):
    """The model as a transformers.Starcoder2ForCausalLM (SDPA attention), in its dtype, on its device, in its mode.

    max_positions: the longest sequence; it only silences a warning, since rotary positions do not end.
    """
    from transformers import Starcoder2Config, Starcoder2ForCausalLM

    config = model.config
    theirs = Starcoder2ForCausalLM(
        Starcoder2Config(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=4 * config.d_model,
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            num_key_value_heads=config.n_kv_head,
            max_position_embeddings=max_positions,
            sliding_window=config.layer_window(0),
            norm_epsilon=config.norm_epsilon,
            rope_theta=config.rope_theta,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            attention_dropout=config.dropout,
            residual_dropout=config.dropout,
            embedding_dropout=config.dropout,
            tie_word_embeddings=config.tie_weights,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,  # a token that is padding gets no gradient in its embedding
            attn_implementation="sdpa",
        )
    ).to(model.wte.weight)
    theirs.load_state_dict(dict(_renamed(model)))
    return theirs.train(model.training)


def _renamed(model):
    """(their name, tensor) of every parameter."""
    config, weights = model.config, model.state_dict()
    kv_size = config.n_kv_head * config.head_dim
    head = "wte.weight" if config.tie_weights else "lm_head.weight"
    yield "model.embed_tokens.weight", weights["wte.weight"]
    yield "lm_head.weight", weights[head]
    for kind in ("weight", "bias"):
        yield f"model.norm.{kind}", weights[f"ln_f.{kind}"]
        for i in range(config.n_layer):
            ours, theirs = f"blocks.{i}", f"model.layers.{i}"
            # one matrix of ours is three of theirs
            qkv = weights[f"{ours}.attn.qkv.{kind}"].split([config.d_model, kv_size, kv_size])
            for name, part in zip("qkv", qkv, strict=True):
                yield f"{theirs}.self_attn.{name}_proj.{kind}", part
            for mine, name in (
                ("ln_1", "input_layernorm"),
                ("attn.proj", "self_attn.o_proj"),
                ("ln_2", "post_attention_layernorm"),
                ("mlp.fc", "mlp.c_fc"),
                ("mlp.proj", "mlp.c_proj"),
            ):
                yield f"{theirs}.{name}.{kind}", weights[f"{ours}.{mine}.{kind}"]
