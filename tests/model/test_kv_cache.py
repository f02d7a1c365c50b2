import dataclasses

import pytest
import torch
from mixes import FIELDS, MIXES, both_paths, lively
from torch.profiler import ProfilerActivity, profile

from model import GPT, GPTConfig, KVCache

ROPE_MIXES = {name: config for name, config in MIXES.items() if config.positions == "rope"}
every_rope_mix = pytest.mark.parametrize("config", ROPE_MIXES.values(), ids=ROPE_MIXES)


def read(model, tokens, cache, steps):
    """The logits of a forward that gets the tokens in pieces of these lengths."""
    return torch.cat([model(piece, cache=cache)[0] for piece in tokens.split(steps, dim=1)], dim=1)


def close(a, b):
    """Equal to 1e-5 of the largest logit: fp32 rounds the large ones of `lively` models by a tenth of that."""
    assert a.shape == b.shape and a.isfinite().all()
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@torch.no_grad()
@every_rope_mix
@both_paths
def test_cached_logits_equal_uncached_ones_at_every_step_past_window_and_context(config, fused_kernels):
    model = lively(GPT(config, fused_kernels=fused_kernels)).eval()
    tokens = torch.randint(config.vocab_size, (2, 120))  # window 9, context 48
    cache = KVCache(config, 2, max_length=120)
    close(read(model, tokens, cache, 1), model(tokens)[0])
    assert cache.lengths.tolist() == [120, 120]


@torch.no_grad()
@both_paths
@pytest.mark.parametrize("name", ["original", "learned window"])
def test_cached_logits_equal_uncached_ones_up_to_the_last_learned_position(name, fused_kernels):
    model = lively(GPT(MIXES[name], fused_kernels=fused_kernels)).eval()
    tokens = torch.randint(41, (2, 48))
    close(read(model, tokens, KVCache(model.config, 2), 1), model(tokens)[0])


@torch.no_grad()
@pytest.mark.parametrize("padding", [(0, 0), (0, 5, 13)], ids=["even", "ragged"])
@pytest.mark.parametrize("name", ["rope", "pattern"])  # "pattern" has layers with the window of 9, and one without
@pytest.mark.parametrize("new_tokens", range(1, 17))
def test_any_number_of_tokens_a_call_gives_the_same_logits(new_tokens, name, padding):
    model = lively(GPT(MIXES[name])).eval()
    tokens = torch.randint(41, (len(padding), 60))
    expected = [model(row[None, pad:])[0] for row, pad in zip(tokens, padding, strict=True)]
    mixed = [new_tokens, 1, 1, new_tokens] + [1] * (58 - 2 * new_tokens)
    for spare, steps in ((0, new_tokens), (5, new_tokens), (0, mixed)):
        # rings of exactly window + new_tokens - 1 slots, and larger ones
        cache = KVCache(
            model.config, len(padding), max_new_tokens_per_call=new_tokens + spare, max_length=60, padding=padding
        )
        assert cache.k[0].shape[2] == (60 if name == "rope" else 9 + new_tokens + spare - 1)
        for x in (*cache.k, *cache.v):
            x.fill_(float("nan"))
        logits = read(model, tokens, cache, steps)
        for row, pad in enumerate(padding):
            close(logits[row : row + 1, pad:], expected[row])


@torch.no_grad()
@both_paths
@pytest.mark.parametrize("name", ["rope-window-gqa", "pattern", "original", "learned window"])
def test_rows_of_different_lengths_are_each_what_they_are_alone(name, fused_kernels):
    model = lively(GPT(MIXES[name], fused_kernels=fused_kernels)).eval()
    padding = [0, 5, 17, 30]  # the second piece starts within the padding of the last row
    tokens = torch.randint(41, (4, 45))
    cache = KVCache(model.config, 4, max_new_tokens_per_call=20, max_length=48, padding=padding)
    logits = read(model, tokens, cache, [20, 20, 1, 1, 1, 1, 1])
    for row, pad in enumerate(padding):
        close(logits[row : row + 1, pad:], model(tokens[row : row + 1, pad:])[0])
    assert logits.isfinite().all()
    assert cache.lengths.tolist() == [45 - pad for pad in padding]


@torch.no_grad()
@pytest.mark.parametrize("prompt", [3, 9, 20, 41])
def test_a_shrunk_ring_continues_the_longer_one(prompt):
    model = lively(GPT(MIXES["pattern"])).eval()
    tokens = torch.randint(41, (3, 60))
    padding = [0, 2, 1]
    cache = KVCache(model.config, 3, max_new_tokens_per_call=13, max_length=60, padding=padding)
    read(model, tokens[:, :prompt], cache, 13)
    cache.fit()
    assert [k.shape[2] for k in cache.k] == [9, 9, 60]
    logits = read(model, tokens[:, prompt:], cache, 1)
    for row, pad in enumerate(padding):
        close(logits[row : row + 1], model(tokens[row : row + 1, pad:])[0][:, prompt - pad :])
    with pytest.raises(ValueError, match=r"tokens has 2 columns, more than the cache's max_new_tokens_per_call=1"):
        model(tokens[:, :2], cache=cache)


@torch.no_grad()
@pytest.mark.parametrize("before, after", [(1, 8), (4, 2)], ids=["longer", "shorter"])
def test_a_ring_of_another_length_takes_back_what_it_still_holds_and_no_more(before, after):
    model, tokens, held = lively(GPT(GPTConfig(**FIELDS))).eval(), torch.randint(41, (1, 40)), min(before, after)
    cache = KVCache(model.config, 1, max_new_tokens_per_call=before)
    read(model, tokens, cache, before)
    cache.fit(after)
    with pytest.raises(ValueError, match="a ring keeps"):
        cache.rollback(held + 1)
    cache.rollback(held)
    close(read(model, tokens[:, 40 - held :], cache, 1), model(tokens)[0][:, -held:])


@torch.no_grad()
@pytest.mark.parametrize("name", ["rope", "pattern"])
def test_an_extended_cache_keeps_its_content(name):
    model = lively(GPT(MIXES[name])).eval()
    tokens = torch.randint(41, (2, 90))
    cache = KVCache(model.config, 2, max_new_tokens_per_call=30, max_length=30)
    logits = [model(tokens[:, :30], cache=cache)[0]]
    for start in (30, 60):
        cache.extend(start + 30)
        logits.append(model(tokens[:, start : start + 30], cache=cache)[0])
    close(torch.cat(logits, dim=1), model(tokens)[0])


@torch.no_grad()
def test_slots_that_were_never_written_are_never_read():
    model = lively(GPT(MIXES["pattern"])).eval()
    tokens = torch.randint(41, (2, 30))
    cache = KVCache(model.config, 2, max_new_tokens_per_call=7, padding=[0, 3])
    for x in (*cache.k, *cache.v):
        x.fill_(float("nan"))
    logits = read(model, tokens[:, :7], cache, 7)
    cache.fit()
    assert logits.isfinite().all()
    assert read(model, tokens[:, 7:], cache, 1).isfinite().all()


def allocated_by(function):
    """Bytes that the operators of a call allocate, each allocation counted, the frees not."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    return sum(event.nbytes() for event in memory_events(recorded) if event.nbytes() > 0)


def memory_events(recorded):
    return [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]


@torch.no_grad()
def test_a_token_at_position_4000_takes_the_memory_of_one_at_position_100():
    model = GPT(GPTConfig(**{**FIELDS, "n_layer": 2})).eval()
    cache = KVCache(model.config, 1, max_new_tokens_per_call=50)
    tokens = torch.randint(41, (1, 4000))
    token = tokens[:, :1]
    found = []
    for part in (tokens[:, :100], tokens[:, 100:]):
        read(model, part, cache, 50)
        model(token, cache=cache)  # grows the table of angles if this is its turn
        places = [x.data_ptr() for x in (*cache.k, *cache.v)]
        found.append((cache.num_bytes, allocated_by(lambda: model(token, cache=cache))))
        assert places == [x.data_ptr() for x in (*cache.k, *cache.v)]
    assert found[0] == found[1]
    assert found[0][1] > 0
    # keys and values, 2 layers, 2 heads of 8 fp32 elements, window 9 and 50 new tokens
    assert cache.num_bytes == 2 * 2 * 2 * 8 * 4 * (9 + 50 - 1)


def test_the_cache_has_grouped_heads_and_window_slots():
    config = MIXES["rope-window-gqa"]
    cache = KVCache(config, 5, dtype=torch.bfloat16)
    assert [k.shape for k in cache.k] == [(5, 2, 9, 8)] * 3
    full = KVCache(dataclasses.replace(config, window=None, n_kv_head=4), 5, max_length=1000, dtype=torch.bfloat16)
    assert full.num_bytes == cache.num_bytes * 2 * 1000 // 9


def test_a_cache_that_does_not_fit_is_refused_and_unchanged():
    model = GPT(MIXES["pattern"])
    cache = KVCache(model.config, 1, max_new_tokens_per_call=30)
    token = torch.zeros(1, 30, dtype=torch.long)
    model(token, cache=cache)
    with pytest.raises(ValueError, match=r"holds max_length=48 positions, too few for 30 and 30 more"):
        model(token, cache=cache)
    assert (cache.columns, cache.lengths.tolist()) == (30, [30])
    model.set_window(5)
    with pytest.raises(ValueError, match=r"made for another config \(window 9 and 5\): make a new one"):
        model(token[:, :1], cache=cache)
    with pytest.raises(ValueError, match=r"max_length=49 is more than the 48 positions that the model learned"):
        KVCache(MIXES["original"], 1, max_length=49)
    with pytest.raises(ValueError, match="max_new_tokens_per_call=0 is below 1"):
        KVCache(model.config, 1, max_new_tokens_per_call=0)
