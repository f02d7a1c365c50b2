"""The decode step as a CUDA graph: on a GPU, and the reasons against it everywhere."""

import pytest
import torch
from mixes import MIXES, lively

from model import GPT, KVCache, generate
from model.graph_step import GraphStep, why_not
from model.steps import NextLogits


def test_without_a_cuda_device_there_is_no_graph():
    model = GPT(MIXES["rope"])
    assert why_not(model, KVCache(model.config, 1)) == "the model is not on a CUDA device"


@pytest.mark.gpu
@pytest.mark.parametrize("padding", [[0], [0, 3, 11]], ids=["one row", "ragged rows"])
@pytest.mark.parametrize("name", ["rope-window-gqa", "pattern", "learned window"])
@torch.no_grad()
def test_a_replayed_step_is_the_models_step(name, padding):
    """Past the window of 9, and with rotary positions past the table of angles, which starts with 48 and doubles."""
    config = MIXES[name]
    model = lively(GPT(config)).eval().cuda()
    last = 48 if config.positions == "learned" else 120
    tokens = torch.randint(41, (len(padding), last), device="cuda")
    caches = [
        KVCache(config, len(padding), max_new_tokens_per_call=12, max_length=last, padding=padding, device="cuda")
        for _ in range(2)
    ]
    for cache in caches:
        model(tokens[:, :12], cache=cache)
        cache.fit_single_tokens()
    assert why_not(model, caches[0]) is None
    step, graphs = GraphStep(model, caches[0]), []
    for column in range(12, last):
        expected = model(tokens[:, column : column + 1], cache=caches[1])[0][:, -1]
        torch.testing.assert_close(step(tokens[:, column]), expected, atol=1e-4, rtol=1e-4)
        if step.graph not in graphs:
            graphs.append(step.graph)
        assert torch.equal(caches[0].lengths, caches[1].lengths) and caches[0].columns == caches[1].columns
    for ours, theirs in zip(caches[0].k + caches[0].v, caches[1].k + caches[1].v, strict=True):
        written = theirs.isfinite()
        torch.testing.assert_close(ours[written], theirs[written], atol=1e-4, rtol=1e-4)
    assert len(graphs) == (1 if config.positions == "learned" else 3)  # again only when the tables have grown


@pytest.mark.gpu
def test_the_sampler_takes_the_graph_and_writes_what_a_model_with_a_hook_writes():
    model = lively(GPT(MIXES["rope-window-gqa"])).eval().cuda()
    prompt = torch.randint(41, (2, 20), device="cuda")
    steps = NextLogits(model, prompt, torch.zeros(2, dtype=torch.int32, device="cuda"), 5, 128)
    steps.after(steps.first().argmax(-1))
    assert isinstance(steps.step, GraphStep)
    captured = torch.stack(list(generate(model, prompt, 100, greedy=True)), dim=1)
    model.register_forward_hook(lambda module, arguments, out: None)
    assert torch.equal(torch.stack(list(generate(model, prompt, 100, greedy=True)), dim=1), captured)
