"""The kernels as compiled to PTX, run on the emulator of each architecture: results within their budget against fp64.

Every pass in bf16, fp16 and fp32, through the public functions. The cases of a target run in a process of its own,
since Triton's interpreter, which other tests use, is chosen for a whole process: `python tests/kernels/test_emulated.py
sm_90` prints a line of JSON a case. A ratio is an error over its budget (budget.py): more than 1 is too far off.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from budget import excess, run
from packed import starts_of

from kernels import append_to_cache, apply_rope, flash_attn, rope_tables, sliding_gqa_attention, sliding_gqa_decode
from kernels.int8 import dequantized, quantized

ROOT = Path(__file__).parents[2]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ALL = {"sinks": True, "softcap": 5.0}
BOTH = {"right": 60}
ATTENTION = {  # dtype, T, S, Hq, Hkv, D, window, rotated elements, options
    "bf16, rope, sinks, cap, 3 heads on one": (BF16, 53, 60, 6, 2, 64, 40, 64, ALL),
    "bf16, heads of 128, several key tiles": (BF16, 161, 190, 4, 1, 128, 150, 0, {}),
    "fp16, heads of 72, half rotated, no window": (FP16, 65, 65, 2, 1, 72, None, 32, {}),
    "fp32, rope, sinks, cap, a window of 1": (FP32, 53, 60, 3, 1, 16, 1, 16, ALL),
    "fp32, heads of 64": (FP32, 70, 75, 4, 1, 64, 50, 0, {}),
    "bf16, documents, rope, sinks, cap": (BF16, 61, 150, 6, 2, 64, 50, 64, {**ALL, "documents": [[1, 90, 59], [150]]}),
    "bf16, long documents, heads of 128": (BF16, 200, 200, 4, 1, 128, None, 0, {"documents": [[130, 2, 68]]}),
    "bf16, both sides, rope, sinks, cap": (BF16, 150, 150, 6, 2, 64, 30, 64, {**ALL, **BOTH}),
    "fp16, no bound on either side, heads of 128": (FP16, 75, 75, 4, 1, 128, None, 0, {"right": None}),
    "bf16, both sides, documents": (BF16, 150, 150, 4, 2, 64, 100, 0, {**BOTH, "documents": [[1, 120, 29], [150]]}),
    "fp32, documents": (FP32, 60, 70, 2, 1, 32, 40, 0, {"documents": [[33, 1, 1, 35]]}),
}
DECODING = {  # dtype, Hq, Hkv, D, slots, window, new tokens, lengths, rotated elements, options
    "bf16, heads of 128, split keys": (BF16, 4, 1, 128, 300, 290, 1, (450, 31), 0, {}),
    "bf16, rope, sinks, cap, three tokens": (BF16, 6, 2, 64, 90, 70, 3, (130, 2), 64, ALL),
    "fp16, heads of 64": (FP16, 8, 2, 64, 150, 100, 1, (149, 150), 0, {}),
    "fp32, rope, no window": (FP32, 4, 2, 32, 70, None, 2, (66, 0), 32, {}),
    "bf16, int8, heads of 128, split keys": (BF16, 4, 1, 128, 300, 290, 1, (450, 31), 0, {"int8": True}),
    "bf16, int8, rope, sinks, cap, three tokens": (BF16, 6, 2, 64, 90, 70, 3, (130, 2), 64, {**ALL, "int8": True}),
    "fp16, int8, heads of 72": (FP16, 4, 2, 72, 70, 60, 1, (69, 70), 0, {"int8": True}),
    "fp32, int8, rope": (FP32, 4, 2, 32, 70, 40, 2, (66, 0), 32, {"int8": True}),
}
ROTATION = {  # dtype, D, rotated elements, interleaved
    "bf16": (BF16, 64, 64, False),
    "bf16, interleaved": (BF16, 64, 64, True),
    "fp16, part of the head": (FP16, 72, 48, False),
    "fp32, interleaved": (FP32, 32, 32, True),
}
NORM_ROTATION = {  # dtype, D, rotated elements, interleaved
    "bf16": (BF16, 128, 128, False),
    "fp32, interleaved, part of the head": (FP32, 72, 48, True),
}
# Triton 3.7.0 and 3.7.1 leave a proxy fence out of loops on sm_100 (triton-lang/triton#10537), also in dq
UNFENCED = {"sm_100"}


def projected(length, heads, head_dim, dtype, batch=1):
    """(batch, heads, length, head_dim) as a view of what a projection makes, with gaps between its rows."""
    fused = torch.randn(batch, length, heads + 1, head_dim).to(dtype)
    return fused[:, :, :heads].transpose(1, 2)


def over_budget(ours, same, exact):
    """The largest of |ours - exact| over twice what the same maths in the same dtype is off, and one rounding."""
    ratios = []
    for a, b, c in zip(ours, same, exact, strict=True):
        rounding = torch.finfo(a.dtype).eps * c.abs().max()
        error = float((a - c).abs().max())
        ratios.append(error and error / float(2 * ((b - c).abs().max() + rounding)))  # all zeros are right, too
    return max(ratio if ratio == ratio else float("inf") for ratio in ratios)


def tables(positions, rotated, dtype=FP32):
    cos, sin = rope_tables(positions, rotated, theta=100.0)
    wide = torch.promote_types(dtype, FP32)
    return cos.to(wide), sin.to(wide)


def attention(emulator, dtype, T, S, Hq, Hkv, D, window, rotated, options):
    documents = options.get("documents")
    B = len(documents) if documents else 1
    inputs = [projected(length, heads, D, dtype, B) for length, heads in ((T, Hq), (S, Hkv), (S, Hkv))]
    if "sinks" in options:
        inputs.append(torch.randn(Hq).to(dtype) + 1)
    grads = torch.randn(B, Hq, T, D), torch.randn(B, Hq, T)
    options = {"softcap": options.get("softcap"), "right": options.get("right", 0)}
    options |= {"scale": 0.5, "rope": tables(S, rotated) if rotated else None}
    options |= {"starts": starts_of(documents) if documents else None}

    def attend(*leaves, right=0, **options):
        *leaves, window = leaves
        sides = None if window is None else window - 1, right
        return sliding_gqa_attention(*leaves, sides, return_lse=True, backend="triton", **options)

    with emulator:
        ours = run(attend, inputs, grads, window, **options)
    return excess(ours, inputs, grads, window, **options)


def decoding(emulator, dtype, Hq, Hkv, D, slots, window, new, lengths, rotated, options):
    batch = len(lengths)
    q, k, v = (projected(new, heads, D, dtype, batch) for heads in (Hq, Hkv, Hkv))
    caches, scales = torch.randn(2, batch, Hkv, slots, D).to(dtype), None
    if options.get("int8"):
        caches, scales = quantized(caches)
    for row, length in enumerate(lengths):
        (caches if scales is None else scales)[:, row, :, length:] = float("nan")  # never written, so never read
    lengths = torch.tensor(lengths, dtype=torch.int32)
    sinks = torch.randn(Hq).to(dtype) if options.get("sinks") else None

    def results(backend, dtype):
        rope = tables(int(lengths.max()), rotated, dtype) if rotated else None
        rings, ring = caches.to(dtype, copy=True), {"rope": rope, "backend": backend}
        if scales is not None:
            rings, of_rings = caches.clone(), scales.clone()
            ring |= {"k_scales": of_rings[0], "v_scales": of_rings[1]}
        append_to_cache(k.to(dtype), v.to(dtype), *rings, lengths, **ring)
        out = sliding_gqa_decode(
            q.to(dtype), *rings, lengths, window, sinks=None if sinks is None else sinks.to(dtype), scale=0.5,
            softcap=options.get("softcap"), **ring,
        )  # fmt: skip
        stored = rings if scales is None else dequantized(rings, of_rings, dtype)
        return [out, *stored.nan_to_num(7.0)]

    with emulator:
        ours = results("triton", dtype)
    return {"out and caches": over_budget(ours, results("reference", dtype), results("reference", torch.float64))}


def rotation(emulator, dtype, D, rotated, interleaved):
    q, k = projected(37, 6, D, dtype, 2), projected(37, 2, D, dtype, 2)
    options = {"positions": torch.randint(64, (2, 37)), "interleaved": interleaved}

    def results(backend, dtype):
        return apply_rope(q.to(dtype), k.to(dtype), *tables(64, rotated, dtype), backend=backend, **options)

    with emulator:
        ours = results("triton", dtype)
    return {"q and k": over_budget(ours, results("reference", dtype), results("reference", torch.float64))}


def norm_rotation(emulator, dtype, D, rotated, interleaved):
    """With a norm, and the gradients of q, k and the weights."""
    leaves = [projected(21, 6, D, dtype, 2), projected(21, 2, D, dtype, 2), *(torch.randn(2, D).to(dtype) + 1)]
    grads = [projected(21, heads, D, dtype, 2) for heads in (6, 2)]
    options = {"positions": torch.randint(64, (2, 21)), "interleaved": interleaved}

    def results(backend, dtype):
        q, k, *weights = wide = [x.detach().to(dtype).requires_grad_() for x in leaves]
        norm = (*weights, 1e-2)
        out = apply_rope(q, k, *tables(64, rotated, dtype), norm=norm, backend=backend, **options)
        gradients = torch.autograd.grad(out, wide, [grad.to(dtype) for grad in grads])
        return [*(x.detach() for x in out), *gradients]

    with emulator:
        ours = results("triton", dtype)
    return {"results": over_budget(ours, results("reference", dtype), results("reference", torch.float64))}


def bytes_of_norm_rotation(target):
    """Of each tensor of q's size, forward and backward, every element is read or written once, no more."""
    from kernels.backends.triton import norm_rotate, norm_rotate_backward
    from kernels.compiled import emulated
    from kernels.compiled.counts import Counter

    heads = {"q": projected(16, 8, 128, BF16), "k": projected(16, 4, 128, BF16)}
    norm = (*torch.ones(2, 128).to(BF16), 1e-6)
    counter = Counter()
    with emulated(target, counter=counter):
        norm_rotate(*heads.values(), norm, *tables(16, 128))
        norm_rotate_backward(*(x.clone() for x in heads.values()), *heads.values(), norm, *tables(16, 128))
    forward, backward = counter.kernels["norm_rope"], counter.kernels["norm_rope_backward"]
    ratios = {}
    for name, x in heads.items():
        moved = forward.bytes_read[f"{name}_ptr"], forward.bytes_written[f"{name}_out_ptr"]
        moved += backward.bytes_read[f"{name}_ptr"], backward.bytes_read[f"{name}_grad_ptr"]
        moved += (backward.bytes_written[f"d{name}_ptr"],)
        assert min(moved) == x.numel() * x.itemsize, moved
        ratios[name] = max(moved) / (x.numel() * x.itemsize)
    return ratios


def model(emulator):
    """A GPT trains two steps and writes twelve tokens: losses to 1e-4, tokens the same as in plain PyTorch."""
    from model import GPT, GPTConfig, generate

    shape = dict(n_layer=2, n_head=4, n_kv_head=2, d_model=64, window=10, window_pattern="SL")
    config = GPTConfig(vocab_size=31, context_length=24, **shape)
    tokens, found = torch.randint(31, (2, 25)), []
    for options, context in (({"backend": "triton"}, emulator), ({"fused_kernels": False}, contextlib.nullcontext())):
        gpt = GPT(config, seed=1, **options)
        optimizer = torch.optim.SGD(gpt.parameters(), lr=0.5)
        losses = []
        with context:
            for _ in range(2):
                _, loss = gpt(tokens[:, :-1], tokens[:, 1:])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            written = [token.tolist() for token in generate(gpt, tokens[:, :9], 12, seed=1)]
        found.append((losses, written))
    difference = max(abs(a - b) for a, b in zip(found[0][0], found[1][0], strict=True))
    return {"losses": difference / 1e-4, "tokens": 0.0 if found[0][1] == found[1][1] else float("inf")}


def shared_memory_and_instructions(emulator):
    """The forward on sm_90, heads of 64: at most 20 PTX instructions a score, no bank conflict, no sector too many."""
    from kernels.compiled.counts import count

    kernels, visible = count("sm_90", head_dim=64, dtype=BF16, window=256, length=512, backward=False)
    forward = kernels["attention_forward"]
    wasted = forward.conflicts.total() + forward.sectors - forward.least_sectors
    return {"instructions": forward.instructions / visible / 20, "wasted": float(wasted)}


def forward_and_backward(inputs, grad, window, **options):
    """Of the launchers, which do not look at the values of starts."""
    from kernels.backends.triton import attend, attend_backward

    out, lse = attend(*inputs, window, scale=0.5, **options)
    return out, *attend_backward(grad, None, *inputs, out, lse, window, scale=0.5, **options)[:3]


def work_of_documents(target):
    """A packed row costs what its documents cost alone: keys, values, queries and products, to the last one.

    They begin at the borders of tiles. What is loaded of starts and ends is not counted, and rows of delta are not.
    """
    from kernels.compiled import emulated
    from kernels.compiled.counts import Counter

    lengths, tensors = [64, 192, 128], ("k_ptr", "v_ptr", "q_ptr", "do_ptr")
    S = sum(lengths)
    inputs = [projected(S, heads, 64, BF16) for heads in (4, 1, 1)]
    grad = projected(S, 4, 64, BF16)
    packed, alone = Counter(), Counter()
    with emulated(target, counter=packed):
        forward_and_backward(inputs, grad, 100, starts=starts_of([lengths]))
    with emulated(target, counter=alone):
        for row in torch.arange(S).split(lengths):
            cut = [x[:, :, row[0] : row[-1] + 1] for x in (*inputs, grad)]
            forward_and_backward(cut[:3], cut[3], 100)
    ratios = {}
    for name, counts in packed.kernels.items():
        expected = alone.kernels[name]
        ratios[f"{name}: products"] = counts.multiplications / expected.multiplications
        for tensor in tensors:
            if expected.bytes_read[tensor]:
                ratios[f"{name}: {tensor}"] = counts.bytes_read[tensor] / expected.bytes_read[tensor]
    assert len(ratios) == 3 + 2 + 1 + 4 + 4, ratios
    return ratios


def flash_attention(emulator):
    """flash-attention's packed sequences and its linear cache, in bf16, with lse."""
    q, k, v = (torch.randn(90, heads, 64).to(BF16) for heads in (4, 1, 1))
    ends = torch.tensor([0, 37, 38, 90], dtype=torch.int32)
    new = [torch.randn(2, 2, heads, 64).to(BF16) for heads in (4, 1, 1)]
    caches = torch.randn(2, 2, 70, 1, 64).to(BF16)
    before = torch.tensor([61, 3], dtype=torch.int32)

    def results(backend, dtype):
        packed = flash_attn.flash_attn_varlen_func(
            *(x.to(dtype) for x in (q, k, v)), ends, ends.clone(), 52, 52, causal=True, window_size=(30, 0),
            return_attn_probs=True, backend=backend,
        )[:2]  # fmt: skip
        cos, sin = tables(70, 64, dtype)
        k_cache, v_cache = caches.to(dtype, copy=True)
        token, k_new, v_new = (x.to(dtype) for x in new)
        decoded = flash_attn.flash_attn_with_kvcache(
            token, k_cache, v_cache, k_new, v_new, cos, sin, before, causal=True, window_size=(40, 0),
            rotary_interleaved=False, return_softmax_lse=True, backend=backend,
        )  # fmt: skip
        return [*packed, *decoded, k_cache, v_cache]

    with emulator:
        ours = results("triton", BF16)
    return {"results": over_budget(ours, results("reference", BF16), results("reference", torch.float64))}


def wrong_starts(emulator):
    """On a GPU nobody reads the values of starts first: whatever they are, no access is outside of the tensors.

    The emulator raises `Fault` for one. Rows that see no key are as likely as those that see too many.
    """
    inputs, grad = [projected(150, heads, 64, BF16) for heads in (4, 1, 1)], projected(150, 4, 64, BF16)
    most = 2**31 - 1
    anything = torch.randint(-300, 300, (1, 150), dtype=torch.int32)
    with emulator:
        for starts in (anything, anything.sort(1).values, -anything * (most // 400), torch.full_like(anything, most)):
            for window, right in ((None, 0), (40, 30)):
                results = forward_and_backward(inputs, grad, window, right=right, starts=starts.contiguous())
    return {"results": 0.0 if len(results) == 4 else float("inf")}


def report(target):
    from kernels.compiled import emulated
    from kernels.compiled.memory import MissingFence

    cases = [(attention, f"attention: {name}", case) for name, case in ATTENTION.items()]
    cases += [(decoding, f"decoding: {name}", case) for name, case in DECODING.items()]
    cases += [(rotation, f"rotation: {name}", case) for name, case in ROTATION.items()]
    cases += [(norm_rotation, f"rotation with a norm: {name}", case) for name, case in NORM_ROTATION.items()]
    cases.append((lambda _: work_of_documents(target), "documents: work", ()))
    cases.append((wrong_starts, "documents: wrong starts", ()))
    cases.append((flash_attention, "flash-attention's names", ()))
    if target == "sm_90":
        cases.append((lambda _: bytes_of_norm_rotation(target), "rotation with a norm: bytes", ()))
        cases.append((model, "a GPT trains and writes", ()))
        cases.append((shared_memory_and_instructions, "counts", ()))
    for function, name, case in cases:
        torch.manual_seed(0)
        start, ratios, error = time.perf_counter(), {}, None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                ratios = function(emulated(target), *case)
            except Exception as raised:  # must not hide the other cases
                error = f"{type(raised).__name__}: {raised}"
        unfenced = any(issubclass(warning.category, MissingFence) for warning in caught)
        line = {"case": name, "ratios": ratios, "error": error, "unfenced": unfenced}
        print(json.dumps({**line, "seconds": round(time.perf_counter() - start, 2)}), flush=True)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_every_pass_as_compiled_is_within_its_budget(target):
    pytest.importorskip("triton", minversion="3.7")  # 3.6 makes other PTX
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, target]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(cases) >= 28
    for case in cases:
        assert case["error"] is None, case
        assert case["ratios"] and all(ratio <= 1 for ratio in case["ratios"].values()), case
        assert not case["unfenced"] or target in UNFENCED, case


if __name__ == "__main__":
    report(sys.argv[1])
