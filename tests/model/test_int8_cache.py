"""A `KVCache` of int8: its size, every way to fill it, and what it costs a trained model."""

import pytest
import torch
import torch.nn.functional as F
from mixes import MIXES, lively

from model import GPT, GPTConfig, KVCache, generate


def read(model, tokens, cache, steps):
    return torch.cat([model(piece, cache=cache)[0] for piece in tokens.split(steps, dim=1)], dim=1)


def off(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_a_token_takes_two_bytes_an_element_less_than_in_16_bits_but_for_two_scales():
    config = MIXES["pattern"]
    sizes = [KVCache(config, 3, dtype=dtype).num_bytes for dtype in (torch.int8, torch.bfloat16)]
    D = config.head_dim
    assert sizes[0] * 4 * D == sizes[1] * 2 * (D + 4)


@torch.no_grad()
@pytest.mark.parametrize("fused_kernels", [True, False])
@pytest.mark.parametrize("name", ["rope", "pattern", "original"])
def test_logits_are_near_those_of_floats_however_tokens_come(name, fused_kernels):
    """In one forward, one by one, and as rows of different lengths."""
    model = lively(GPT(MIXES[name], fused_kernels=fused_kernels)).eval()
    tokens, padding = torch.randint(41, (2, 48)), [0, 7]
    for steps in (1, 5, 48):
        options = {"max_new_tokens_per_call": steps, "max_length": 48, "padding": padding}
        plain = read(model, tokens, KVCache(model.config, 2, **options), steps)
        ours = read(model, tokens, KVCache(model.config, 2, dtype=torch.int8, **options), steps)
        assert 1e-4 < off(ours[0], plain[0]) < 0.05 and 1e-4 < off(ours[1, 7:], plain[1, 7:]) < 0.05


@torch.no_grad()
def test_a_cache_is_extended_fitted_rolled_back_and_copied_with_its_scales():
    """What follows is what a cache says that took the same tokens at once."""
    model = lively(GPT(MIXES["pattern"])).double().eval()  # layers with a window, and one without
    tokens = torch.randint(41, (1, 60))

    def cache(rows, **options):
        return KVCache(model.config, rows, dtype=torch.int8, **options)

    expected = read(model, tokens, cache(1, max_new_tokens_per_call=4, max_length=60), 4)
    ours = cache(1, max_new_tokens_per_call=20, max_length=40)
    read(model, tokens[:, :20], ours, 20)
    ours.fit(4)
    ours.extend(60)
    found = read(model, tokens[:, 20:40], ours, 4)
    torch.testing.assert_close(found, expected[:, 20:40], atol=1e-2, rtol=1e-2)
    model(torch.randint(41, (1, 3)), cache=ours)
    ours.rollback(3)
    torch.testing.assert_close(read(model, tokens[:, 40:48], ours, 4), expected[:, 40:48], atol=1e-2, rtol=1e-2)
    ours.fit(1)
    several = cache(3, max_length=60)
    for row in (2, 1, 0):
        several.copy_row(row, ours, 0, 48)
    several.columns = 48
    first = several.first_rows(2)
    one_by_one = [model(tokens[:, i : i + 1].expand(2, 1), cache=first)[0] for i in range(48, 60)]
    assert (
        torch.equal(several.lengths[:2], first.lengths)
        and several.k_scales[0].data_ptr() == first.k_scales[0].data_ptr()
    )
    torch.testing.assert_close(torch.cat(one_by_one, dim=1), expected[:, 48:].expand(2, -1, -1), atol=1e-2, rtol=1e-2)


def test_a_trained_model_loses_less_than_half_a_percent():
    """The loss through the cache, of a text that training did not see."""
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=16, context_length=64, window=24, n_layer=2, n_head=4, n_kv_head=2, d_model=64)
    model = GPT(config, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    following = torch.randint(16, (16, 16))  # a token follows from the two before it, or is noise

    def text(rows, length):
        tokens = torch.randint(16, (rows, length))
        noise = torch.rand(rows, length) < 0.2
        for i in range(2, length):
            known = following[tokens[:, i - 2], tokens[:, i - 1]]
            tokens[:, i] = torch.where(noise[:, i], tokens[:, i], known)
        return tokens

    for _ in range(150):
        tokens = text(16, 65)
        _, loss = model(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    held_out = text(16, 129)
    losses = []
    with torch.no_grad():
        for dtype in (torch.float32, torch.int8):
            cache = KVCache(config, 16, max_new_tokens_per_call=16, dtype=dtype)
            logits = read(model, held_out[:, :-1], cache, 16)
            losses.append(F.cross_entropy(logits.flatten(0, 1), held_out[:, 1:].flatten()).item())
    assert losses[0] < 2.0  # it has learned: log 16 is 2.77
    assert 0 < abs(losses[1] / losses[0] - 1) < 0.005


@pytest.mark.parametrize("name", ["rope", "pattern", "original"])
def test_generate_writes_through_a_cache_of_int8(name):
    """Past the window and the context; the first token is that of a prompt read as floats, as the prompt is a token."""
    model = lively(GPT(MIXES[name])).eval()
    prompts = torch.randint(41, (2, 1))
    ours, plain = ([t.tolist() for t in generate(model, prompts, 60, seed=1, cache_dtype=dtype)]
                   for dtype in (torch.int8, None))  # fmt: skip
    assert len(ours) == 60
    assert sum(a == b for a, b in zip(ours, plain, strict=True)) > 0


def test_wrong_caches_are_named():
    model = GPT(MIXES["rope"])
    tokens = torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"cache_dtype is torch\.float16, expected None or torch\.int8"):
        generate(model, tokens, 2, cache_dtype=torch.float16)
    with pytest.raises(ValueError, match="cache_dtype with draft: a cache of int8 takes no guesses"):
        generate(model, tokens, 2, cache_dtype=torch.int8, draft="ngram")
