"""`generate(compile=True)` on a CPU: the step in one call computes what the model does, and its library is kept."""

import shutil

import pytest
import torch
from mixes import FIELDS, MIXES, lively

from model import GPT, GPTConfig, KVCache, generate
from model.compiled_step import CompiledStep, compiled_step
from model.decoding import CPUStep

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


def cache_after(model, columns=3, rows=1, **options):
    cache = KVCache(model.config, rows, max_new_tokens_per_call=columns, max_length=48, **options)
    for x in (*cache.k, *cache.v):
        x.fill_(float("nan"))
    model(torch.arange(columns).expand(rows, -1), cache=cache)
    cache.fit()
    return cache


@needs_compiler
def test_a_compiled_step_computes_what_the_model_does_and_is_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fields = {"n_layer": 1, "qk_norm": True, "norm": "rms", "mlp": "swiglu", "mlp_width": 24, "bias": False}
    model = lively(GPT(GPTConfig(**FIELDS | fields))).eval()
    with torch.no_grad():
        step, cache = CompiledStep(model, cache_after(model)), cache_after(model)
        for token in torch.randint(41, (30, 1)):  # the ring of 9 is filled, and begins again twice
            torch.testing.assert_close(step(token), model(token[None], cache=cache)[0][0], atol=1e-4, rtol=1e-4)
        for weight in model.parameters():  # changes in place count
            weight.mul_(0.9)
        torch.testing.assert_close(step(token), model(token[None], cache=cache)[0][0], atol=1e-4, rtol=1e-4)

        def fails(*_, **__):
            raise RuntimeError("compiled again")

        monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fails)
        other = lively(GPT(model.config)).eval()  # a model of one shape takes the same library
        step, cache = CompiledStep(other, cache_after(other)), cache_after(other)
        torch.testing.assert_close(step(token), other(token[None], cache=cache)[0][0], atol=1e-4, rtol=1e-4)
    assert [path.suffix for path in (tmp_path / "sliding-gqa" / "steps").iterdir()] == [".pt2"]


def test_without_a_compiler_the_text_is_the_same_and_a_warning_says_why(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def no_compiler(*_, **__):
        raise RuntimeError("no C++ compiler was found\nmore lines")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", no_compiler)
    model, prompt = lively(GPT(GPTConfig(**FIELDS | {"n_layer": 1}))).eval(), torch.randint(41, (1, 5))
    expected = list(generate(model, prompt, 12, greedy=True))
    with pytest.warns(UserWarning, match="^the step is not compiled: no C.. compiler was found$"):
        assert list(generate(model, prompt, 12, greedy=True, compile=True)) == expected


@pytest.mark.parametrize(
    ("name", "rows", "options", "reason"),
    [
        ("rope-window-gqa", 2, {}, "one token of one row"),
        ("rope", 1, {}, "a ring grows with the text"),
        ("pattern", 1, {}, "a ring grows with the text"),
        ("prefix", 1, {}, "has a prefix"),
        ("rope-window-gqa", 1, {"padding": [1]}, "the row is padded"),
    ],
)
def test_other_caches_take_the_step_and_say_why(name, rows, options, reason):
    model = lively(GPT(MIXES[name])).eval()
    with pytest.warns(UserWarning, match=f"the step is not compiled: .*{reason}"):
        assert type(compiled_step(model, cache_after(model, rows=rows, **options))) is CPUStep
