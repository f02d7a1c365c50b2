"""The steps of the sampler, on a CPU and as a CUDA graph, compute what the model does, and run only where they do."""

import dataclasses
import itertools

import pytest
import torch
from mixes import MIXES, lively
from torch import nn
from torch.profiler import ProfilerActivity, profile

from model import GPT, KVCache, generate
from model.decoding import CPUStep, CUDAGraphStep, Decoder, why_not_cpu_step, why_not_cuda_graph

BATCHES = {"one row": [0], "rows of one length": [0, 0, 0], "ragged rows": [0, 3, 11]}  # padding of each row


def make(name="rope-window-gqa", **options):
    return lively(GPT(MIXES[name], **options)).eval()


def cache_after(model, prompt, padding, max_length=48):
    """A cache that has read the prompt, poisoned before it, ready for single tokens."""
    cache = KVCache(
        model.config, len(prompt), max_new_tokens_per_call=prompt.shape[1], max_length=max_length, padding=padding
    )
    for x in (*cache.k, *cache.v):
        x.fill_(float("nan"))
    model(prompt, cache=cache)
    cache.fit()
    return cache


@pytest.mark.parametrize("padding", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("name", MIXES)
def test_logits_of_the_cpu_step_are_the_models(name, padding):
    model = make(name)
    for prompt_length in (12, 30):  # some rows have not filled the window of 9 yet; all have
        tokens = torch.randint(41, (len(padding), 48))
        step = CPUStep(model, cache_after(model, tokens[:, :prompt_length], padding))
        cache = cache_after(model, tokens[:, :prompt_length], padding)
        for column in range(prompt_length, 48):
            new = tokens[:, column]
            torch.testing.assert_close(step(new), model(new[:, None], cache=cache)[0][:, -1], atol=1e-5, rtol=1e-5)
        assert torch.equal(step.cache.lengths, cache.lengths) and step.cache.columns == cache.columns


@pytest.mark.parametrize("chunk", [1, 7, 100])
@pytest.mark.parametrize("name", MIXES)
def test_a_prompt_that_is_read_by_the_step_gives_the_logits_of_the_model(name, chunk):
    """Chunks are shorter and longer than the window of 9, and pass the end of the ring."""
    model, tokens = make(name), torch.randint(41, (1, 40))
    decoder = Decoder(model, tokens[:, :30], torch.zeros(1, dtype=torch.int32), 10, chunk)
    found = [decoder.prefill(), *(decoder.decode(tokens[:, column]) for column in range(30, 40))]
    torch.testing.assert_close(torch.cat(found), model(tokens)[0][0, 29:], atol=1e-4, rtol=1e-4)


def test_a_prompt_of_one_row_is_read_by_the_step_where_that_is_the_model():
    for name, taken in (("rope-window-gqa", True), ("pattern", True), ("original", True), ("prefix", False)):
        decoder = Decoder(make(name), torch.randint(41, (1, 30)), torch.zeros(1, dtype=torch.int32), 10, 16)
        chunks = decoder.prefill_chunks()
        next(chunks)
        assert isinstance(decoder.step, CPUStep) == taken


def test_a_step_at_position_4000_takes_the_memory_of_one_at_position_100():
    model, found = make(), []
    for length in (100, 4000):
        cache = KVCache(model.config, 1, max_new_tokens_per_call=100)
        for part in torch.randint(41, (1, length)).split(100, dim=1):
            model(part, cache=cache)
        cache.fit()
        step, new = CPUStep(model, cache), torch.tensor([1])
        addresses = [x.data_ptr() for x in (*cache.k, *cache.v)]
        step(new)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            step(new)
        events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
        found.append(sum(event.nbytes() for event in events if event.nbytes() > 0))
        assert addresses == [x.data_ptr() for x in (*cache.k, *cache.v)]
    assert found[0] == found[1] > 0
    rope = model.blocks[0].attn.rope
    size = len(rope.tables[new.device][0])
    for _ in range(size - 4000 + 1):
        step(new)
    assert len(rope.tables[new.device][0]) == size < cache.columns  # no table grows with the text


def test_the_sampler_takes_the_cpu_step_and_still_does_after_the_cache_has_grown():
    decoder = Decoder(make("pattern"), torch.randint(41, (2, 5)), torch.zeros(2, dtype=torch.int32), 200, 128)
    new, taken = decoder.prefill().argmax(-1), set()
    for _ in range(150):  # the layer that sees everything starts with room for 64
        new = decoder.decode(new).argmax(-1)
        taken.add(type(decoder.step))
    assert taken == {CPUStep}


def changed(how):
    model = make()
    if how == "a subclass":
        model.blocks[1].attn.proj.__class__ = type("LoRA", (nn.Linear,), {})
    elif how == "a hook":
        model.blocks[1].register_forward_hook(lambda module, arguments, out: None)
    elif how == "a replaced forward":
        model.blocks[0].mlp.forward = model.blocks[0].mlp.forward
    elif how == "bfloat16":
        model.to(torch.bfloat16)
    elif how == "reference":
        model = make(backend="reference")
    elif how == "plain":
        model = make(fused_kernels=False)
    return model


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("a subclass", "blocks.1.attn.proj is a LoRA"),
        ("a hook", "blocks.1 has a hook"),
        ("a replaced forward", "blocks.0.mlp has a hook"),
        ("bfloat16", "16 bits"),
        ("reference", "the backend has no such step"),
        ("plain", "the backend has no such step"),
        ("nothing", None),
    ],
)
def test_a_model_that_does_more_than_its_weights_say_gets_no_cpu_step(how, reason):
    model = changed(how)
    found = why_not_cpu_step(model, KVCache(model.config, 1))
    assert found is reason is None or reason in found


@pytest.mark.parametrize("scaling", [None, ("yarn", {"factor": 4.0, "original_max_position_embeddings": 48})], ids=str)
def test_angles_of_a_position_are_a_row_of_the_tables(scaling):
    config = dataclasses.replace(MIXES["partial rotation"], rope_scaling=scaling)
    rope, device = GPT(config).blocks[0].attn.rope, torch.device("cpu")
    tables, positions = rope(5000, device), torch.tensor([0, 7, 4999])
    for found, table in zip(rope.at(positions, device), tables, strict=True):
        torch.testing.assert_close(found, table[positions], atol=1e-6, rtol=0)
    for found, table in zip(rope.at(4999, device), tables, strict=True):
        torch.testing.assert_close(found, table[4999], atol=1e-6, rtol=0)


def test_weights_changed_in_place_count_at_the_next_token():
    model = make()
    prompt = torch.randint(41, (1, 5))
    iterator = generate(model, prompt, 20, greedy=True)
    list(itertools.islice(iterator, 5))
    with torch.no_grad():
        model.wte.weight.zero_()
        model.wte.weight[7] = 100.0
        model.ln_f.weight.zero_()
        model.ln_f.bias.fill_(1.0)
    next(iterator)  # chosen from logits that were there before
    assert next(iterator).tolist() == [7]


def test_generated_tokens_can_be_used_in_training():
    """They come out of inference mode: a tensor made within it could not be saved for a backward pass."""
    model = GPT(MIXES["rope-window-gqa"])
    new = torch.stack(list(generate(model, torch.randint(41, (2, 3)), 20, seed=0)), dim=1)
    new += 0
    model(new[:, :-1], new[:, 1:])[1].backward()
    assert model.wte.weight.grad.abs().sum() > 0


def test_compile_compiles_the_forward_of_a_model_without_a_step(monkeypatch):
    compiled = []

    def compile_eagerly(function):
        compiled.append(function)
        return torch_compile(function, backend="eager")

    torch_compile = torch.compile
    model, prompt = changed("a hook"), torch.randint(41, (1, 5))
    expected = list(generate(model, prompt, 12, greedy=True))
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", compile_eagerly)
    assert list(generate(model, prompt, 12, greedy=True, compile=True)) == expected
    assert compiled == [model]


def test_without_a_cuda_device_there_is_no_graph():
    model = GPT(MIXES["rope"])
    assert why_not_cuda_graph(model, KVCache(model.config, 1)) == "the model is not on a CUDA device"


@pytest.mark.gpu
@pytest.mark.parametrize("padding", [[0], [0, 3, 11]], ids=["one row", "ragged rows"])
@pytest.mark.parametrize("name", ["rope-window-gqa", "pattern", "learned window"])
@torch.no_grad()
def test_a_replayed_graph_gives_the_logits_of_the_model(name, padding):
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
        for x in (*cache.k, *cache.v):
            x.fill_(float("nan"))  # what stays unwritten must not look like a number
        model(tokens[:, :12], cache=cache)
        cache.fit()
    assert why_not_cuda_graph(model, caches[0]) is None
    step, graphs = CUDAGraphStep(model, caches[0]), []
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
def test_the_sampler_takes_the_graph_and_gives_the_tokens_of_a_model_with_a_hook():
    model = lively(GPT(MIXES["rope-window-gqa"])).eval().cuda()
    prompt = torch.randint(41, (2, 20), device="cuda")
    decoder = Decoder(model, prompt, torch.zeros(2, dtype=torch.int32, device="cuda"), 5, 128)
    decoder.decode(decoder.prefill().argmax(-1))
    assert isinstance(decoder.step, CUDAGraphStep)
    captured = torch.stack(list(generate(model, prompt, 100, greedy=True)), dim=1)
    model.register_forward_hook(lambda module, arguments, out: None)
    assert torch.equal(torch.stack(list(generate(model, prompt, 100, greedy=True)), dim=1), captured)


@pytest.mark.parametrize("large", [False, True])
def test_a_small_models_token_takes_one_thread_and_the_caller_keeps_his(large, monkeypatch):
    monkeypatch.setattr("model.decoding.ONE_THREAD_TOKEN", 0 if large else 2**23)
    monkeypatch.setattr("model.decoding.ONE_THREAD_PROMPT", 0)
    model, seen = make(), []
    model.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    torch.set_num_threads(2)
    try:
        for _ in generate(model, torch.randint(41, (1, 5)), 4, seed=1):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert seen == [2] + [2 if large else 1] * 3
