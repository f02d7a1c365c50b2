"""The weights of Hugging Face's own classes, copied into ours, give their logits: the architectures are what we say."""

import pytest
import torch

from model import GPT, GPTConfig

transformers = pytest.importorskip("transformers")


@torch.no_grad()
def randomize(model):
    """Weights with none at its initial value, biases and norms included, large enough that attention is not uniform."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)


def copy(module, weight, bias=None):
    module.weight.data.copy_(weight.data)
    if bias is not None:
        module.bias.data.copy_(bias.data)


@pytest.mark.parametrize("fused_kernels", [True, False])
def test_the_original_architecture_is_gpt2(fused_kernels):
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=97, n_positions=33, n_embd=60, n_layer=3, n_head=5, attn_implementation="eager"
        )
    ).eval()
    randomize(theirs)
    config = GPTConfig.for_architecture("original", vocab_size=97, context_length=33, n_layer=3, n_head=5, d_model=60)
    ours = GPT(config, fused_kernels=fused_kernels).eval()
    source = theirs.transformer
    copy(ours.wte, source.wte.weight)
    copy(ours.wpe, source.wpe.weight)
    copy(ours.ln_f, source.ln_f.weight, source.ln_f.bias)
    for mine, block in zip(ours.blocks, source.h, strict=True):
        copy(mine.ln_1, block.ln_1.weight, block.ln_1.bias)
        copy(mine.ln_2, block.ln_2.weight, block.ln_2.bias)
        # GPT-2's Conv1D holds the transpose of a Linear's matrix
        copy(mine.attn.qkv, block.attn.c_attn.weight.T, block.attn.c_attn.bias)
        copy(mine.attn.proj, block.attn.c_proj.weight.T, block.attn.c_proj.bias)
        copy(mine.mlp.fc, block.mlp.c_fc.weight.T, block.mlp.c_fc.bias)
        copy(mine.mlp.proj, block.mlp.c_proj.weight.T, block.mlp.c_proj.bias)
    tokens = torch.randint(97, (2, 33))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens)[0], theirs(tokens).logits, atol=1e-4, rtol=1e-4)
    assert ours.num_parameters() == theirs.num_parameters()


@pytest.mark.parametrize("fused_kernels", [True, False])
@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("window", [7, None])
def test_the_modified_architecture_is_starcoder2(fused_kernels, tie_weights, window):
    theirs = transformers.Starcoder2ForCausalLM(
        transformers.Starcoder2Config(
            vocab_size=97, hidden_size=60, intermediate_size=240, num_hidden_layers=3, num_attention_heads=6,
            num_key_value_heads=2, max_position_embeddings=40, sliding_window=window, tie_word_embeddings=tie_weights,
            residual_dropout=0.0, embedding_dropout=0.0, attn_implementation="eager",
        )
    ).eval()  # fmt: skip
    randomize(theirs)
    config = GPTConfig(
        vocab_size=97, context_length=40, window=window, n_layer=3, n_head=6, n_kv_head=2, d_model=60,
        tie_weights=tie_weights,
    )  # fmt: skip
    ours = GPT(config, fused_kernels=fused_kernels).eval()
    copy(ours.wte, theirs.model.embed_tokens.weight)
    copy(ours.ln_f, theirs.model.norm.weight, theirs.model.norm.bias)
    if not tie_weights:
        copy(ours.lm_head, theirs.lm_head.weight)
    for mine, layer in zip(ours.blocks, theirs.model.layers, strict=True):
        copy(mine.ln_1, layer.input_layernorm.weight, layer.input_layernorm.bias)
        copy(mine.ln_2, layer.post_attention_layernorm.weight, layer.post_attention_layernorm.bias)
        projections = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        copy(mine.attn.qkv, torch.cat([p.weight for p in projections]), torch.cat([p.bias for p in projections]))
        copy(mine.attn.proj, layer.self_attn.o_proj.weight, layer.self_attn.o_proj.bias)
        copy(mine.mlp.fc, layer.mlp.c_fc.weight, layer.mlp.c_fc.bias)
        copy(mine.mlp.proj, layer.mlp.c_proj.weight, layer.mlp.c_proj.bias)
    tokens = torch.randint(97, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens)[0], theirs(tokens).logits, atol=1e-4, rtol=1e-4)
    assert ours.num_parameters() == theirs.num_parameters()
