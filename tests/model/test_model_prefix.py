"""A model whose sliding layers always see the first tokens: in training, past its context, and in the sampler."""

import dataclasses
import json

import pytest
import torch
from mixes import FIELDS, MIXES, both_paths, lively

from kernels import document_starts
from kernels.band import visible_mask, visible_pairs
from model import GPT, GPTConfig, KVCache, from_pretrained, generate, save_pretrained
from model.decoding import CPUStep
from model.gpt import flops_per_token
from model.huggingface.fields import config_to_theirs

SHORT = GPTConfig(**{**FIELDS, "context_length": 16, "window": 5, "prefix": 3, "window_pattern": "SL"})
PADDING = [0, 3, 11]


def test_the_mask_adds_the_first_tokens_of_each_document():
    starts = document_starts(cu_seqlens=torch.tensor([0, 4, 9]))
    expected = [
        [1, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0, 0],
        [1, 0, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 0, 1, 1, 0],
        [0, 0, 0, 0, 1, 0, 0, 1, 1],
    ]
    assert visible_mask(9, 9, 2, starts=starts, prefix=1)[0, 0].int().tolist() == expected
    assert visible_mask(4, 4, 2, prefix=1).int().tolist() == [row[:4] for row in expected[:4]]
    assert visible_mask(2, 4, 2, prefix=1).int().tolist() == [row[:4] for row in expected[2:4]]


@torch.no_grad()
@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_fused_and_plain_agree_past_the_context_with_documents(positions):
    config = dataclasses.replace(SHORT, positions=positions)
    T = 60 if positions == "rope" else 16
    tokens = torch.randint(41, (2, T))
    starts = document_starts(cu_seqlens=torch.tensor([0, 7, T])).expand(2, -1)
    fused = lively(GPT(config)).eval()
    plain = GPT(config, fused_kernels=False).eval()
    plain.load_state_dict(fused.state_dict())
    for options in ({}, {"starts": starts}):
        ours = fused(tokens, **options)[0]
        torch.testing.assert_close(ours, plain(tokens, **options)[0], atol=1e-4, rtol=1e-4)
    # a document has the logits that it has alone
    torch.testing.assert_close(ours[:, 7:], fused(tokens[:, 7:])[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@both_paths
def test_past_the_context_only_the_distance_to_the_prefix_is_bounded(fused_kernels):
    """One layer: query 40 scores key 1 of the prefix as query 15, the last of the context, would."""
    config = dataclasses.replace(SHORT, n_layer=1, window_pattern="S", n_kv_head=4)
    model = lively(GPT(config, fused_kernels=fused_kernels)).eval()
    x, query, block = torch.randn(1, 41, 32), 40, model.blocks[0].attn
    q, k, v = (part.view(41, 4, 8).transpose(0, 1) for part in block.qkv(x)[0].split(32, dim=-1))  # (H, T, D)
    cos, sin = block.rope(41, x.device)

    def turned(x, position):
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos[position] - b * sin[position], b * cos[position] + a * sin[position]], dim=-1)

    keys = [0, 1, 2, 36, 37, 38, 39, 40]
    at = [15 if key < 3 else query for key in keys]
    scores = [
        (turned(q[:, query], p) * turned(k[:, key], key)).sum(-1) * 8**-0.5 for key, p in zip(keys, at, strict=True)
    ]
    weights = torch.stack(scores, dim=-1).softmax(-1)  # (H, keys)
    expected = block.proj((weights[..., None] * v[:, keys]).sum(1).flatten())
    torch.testing.assert_close(block(x)[0, query], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["rope", "learned"])
def test_the_cpu_step_is_the_model_past_the_context(name):
    config = SHORT if name == "rope" else dataclasses.replace(MIXES["prefix"], positions="learned", context_length=60)
    model = lively(GPT(config)).eval()
    tokens = torch.randint(41, (3, 60))
    caches = [KVCache(config, 3, max_new_tokens_per_call=12, max_length=60, padding=PADDING) for _ in range(2)]
    for cache in caches:
        for x in (*cache.k, *cache.v):
            x.fill_(float("nan"))
        model(tokens[:, :12], cache=cache)
        cache.fit()
    assert caches[0].k[0].shape[2] == config.window + config.prefix
    step = CPUStep(model, caches[0])
    for column in range(12, 60):
        expected = model(tokens[:, column, None], cache=caches[1])[0][:, -1]
        torch.testing.assert_close(step(tokens[:, column]), expected, atol=1e-4, rtol=1e-4)
    for row, padding in enumerate(PADDING):
        alone = model(tokens[row : row + 1, padding:])[0][0, -1]
        torch.testing.assert_close(expected[row], alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@both_paths
def test_greedy_text_is_that_of_whole_forwards(fused_kernels):
    model = lively(GPT(SHORT, fused_kernels=fused_kernels)).eval()
    text = torch.randint(41, (1, 20))
    made = [int(new) for new in generate(model, text, 20, greedy=True, prefill_chunk=7)]
    for token in made:
        assert token == int(model(text)[0][0, -1].argmax())
        text = torch.cat([text, torch.tensor([[token]])], dim=1)


def test_set_window_keeps_or_changes_the_prefix():
    model = lively(GPT(MIXES["rope"])).eval()
    tokens = torch.randint(41, (1, 30))
    whole = model(tokens)[0]
    model.set_window(6, prefix=24)  # sees everything
    torch.testing.assert_close(model(tokens)[0], whole, atol=1e-4, rtol=1e-4)
    model.set_window(7)
    assert model.config.prefix == 24 and all(block.attn.prefix == 24 for block in model.blocks)
    model.set_window(7, "SL")
    assert [block.attn.prefix for block in model.blocks] == [24, 0, 24]
    model.set_window(7, "S", prefix=0)
    assert (model(tokens)[0][:, -1] - whole[:, -1]).abs().max() > 1e-2


def test_flops_count_the_prefix():
    config = GPTConfig(**{**FIELDS, "n_layer": 1, "n_kv_head": 4, "prefix": 3})
    pairs = int(visible_mask(48, 48, 9, prefix=3).sum())
    without = dataclasses.replace(config, prefix=0)
    more = (pairs - visible_pairs(48, 48, 9)) * 4 * 3 * 4 * 8 / 48  # heads, fwd and bwd, 4 D a pair, a token
    assert flops_per_token(config) - flops_per_token(without) == pytest.approx(more)


def test_directories_keep_the_prefix_and_older_ones_have_none(tmp_path):
    model = GPT(MIXES["prefix"])
    save_pretrained(model, tmp_path)
    assert from_pretrained(tmp_path)[0].config.prefix == 3
    values = dataclasses.asdict(MIXES["rope-window-gqa"])
    del values["prefix"]
    save_pretrained(GPT(MIXES["rope-window-gqa"]), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert from_pretrained(tmp_path)[0].config == MIXES["rope-window-gqa"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GPTConfig(**FIELDS, prefix=-1), "prefix=-1 is not a whole number of at least 0"),
        (lambda: GPTConfig(**FIELDS, prefix=1.5), "prefix=1.5 is not a whole number"),
        (lambda: GPTConfig(**FIELDS, prefix=49), "prefix=49 is more than the context_length of 48"),
        (lambda: GPT(MIXES["rope"]).set_window(5, prefix=-2), "prefix=-2 is not"),
        (lambda: GPT(MIXES["prefix"]).split_sequences(object()), "prefix=3, but split sequences have none"),
        (
            lambda: config_to_theirs(MIXES["prefix"]),
            "Starcoder2.* is the nearest, and cannot have prefix 3; set_window",
        ),
    ],
)
def test_a_wrong_prefix_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
