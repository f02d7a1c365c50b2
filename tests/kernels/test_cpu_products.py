"""Which library multiplies on a CPU, and in which dtype: the switch is restored, and no result loses accuracy."""

import functools
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from budget import excess, run
from torch import library

from kernels import cpu, rope_tables, sliding_gqa_attention
from kernels.backends.banded import attention as banded
from kernels.backends.banded import keeping as banded_keeping
from kernels.backends.banded import plan as banded_plan

ROOT = Path(__file__).parent.parent.parent
CASES = {  # T, window, head size, options
    "one step": (100, 24, 16, {}),
    "many blocks": (300, 64, 24, {"rope": 24}),
    "part of a head rotated": (200, 40, 32, {"rope": 16, "sinks": True}),
    "softcap": (200, 40, 32, {"softcap": 2.0}),
    "all earlier keys": (300, None, 64, {"scale": 0.2}),
}


def precision():
    return torch.backends.mkldnn.matmul.fp32_precision


@pytest.fixture
def exact_onednn(monkeypatch):
    """As on a CPU where oneDNN is exact."""
    monkeypatch.setattr(cpu, "onednn_is_exact", lambda: True)
    before = precision()
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    yield
    torch.backends.mkldnn.matmul.fp32_precision = before


@pytest.mark.parametrize("shape", [(16, 128, 64, 288), (1, 512, 2048, 512), (64, 32, 24, 80), (3, 7, 5, 3)])
def test_fp32_products_by_onednn_are_fp32(shape):
    """The probe against fp64: where it says exact, no factor is rounded to bf16, which would be far off."""
    if not cpu.onednn_is_exact():
        pytest.skip("not on this CPU")
    n, rows, inner, columns = shape
    a, b = torch.randn(n, rows, inner), torch.randn(n, inner, columns)
    for left, right in ((a, b), (a, b.mT.contiguous().mT), (a.mT.contiguous().mT, b)):
        error = (cpu.through_onednn(torch.bmm)(left, right) - left.double() @ right.double()).abs()
        assert (error <= 8 * torch.finfo(torch.float32).eps * (left.abs() @ right.abs())).all()


def test_the_probe_refuses_what_it_does_not_know(monkeypatch):
    probe = cpu.onednn_is_exact.__wrapped__
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert not probe()  # AMX would round to bf16
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert probe() == torch.backends.mkldnn.is_available()
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    assert not probe()
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert not probe()


def test_the_switch_is_set_inside_only(exact_onednn):
    seen = []
    cpu.through_onednn(lambda: seen.append(precision()))()
    assert seen == ["bf16"] and precision() == "none"
    with pytest.raises(ZeroDivisionError):
        cpu.through_onednn(lambda: 1 / 0)()
    assert precision() == "none"


@pytest.mark.parametrize("backward", [False, True])
def test_attention_switches_and_restores(backward, exact_onednn, monkeypatch):
    """Where products are made: inside the operators, and not for short sequences."""
    seen, baddbmm = [], torch.baddbmm
    monkeypatch.setattr(torch, "baddbmm", lambda *a, **k: seen.append(precision()) or baddbmm(*a, **k))
    q = torch.randn(1, 2, 80, 16, requires_grad=True)
    out = sliding_gqa_attention(q, q, q, 8, backend="banded")
    assert set(seen) == {"bf16"} and precision() == "none"
    seen.clear()
    if backward:
        out.sum().backward()
        assert set(seen) == {"bf16"} and precision() == "none"


def test_a_process_that_uses_onednn_keeps_mkl_for_small_products(exact_onednn):
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    seen = []
    cpu.through_mkl(lambda: seen.append(precision()))()
    cpu.through_onednn(lambda: seen.append(precision()))()
    assert seen == ["none", "bf16"] and precision() == "bf16"


@pytest.mark.parametrize("setting", ["ieee", "tf32"])
def test_a_precision_that_the_process_chose_stays(setting, exact_onednn):
    torch.backends.mkldnn.matmul.fp32_precision = setting
    seen = []
    cpu.through_onednn(lambda: cpu.through_mkl(lambda: seen.append(precision()))())()
    assert seen == [setting] and precision() == setting


@pytest.mark.parametrize("process", ["none", "bf16"])
def test_threads_that_overlap_restore_the_setting_of_the_process(process, exact_onednn):
    """The first to enter leaves first, so that the last one must restore what the first one found."""
    torch.backends.mkldnn.matmul.fp32_precision = process
    inside, leave = [threading.Event() for _ in range(4)], [threading.Event() for _ in range(4)]

    def wait(i):
        inside[i].set()
        assert leave[i].wait(10)

    wrappers = [cpu.through_onednn, cpu.through_mkl, cpu.through_onednn, cpu.through_mkl]
    threads = [threading.Thread(target=wrap(wait), args=(i,)) for i, wrap in enumerate(wrappers)]
    for i, thread in enumerate(threads):
        thread.start()
        assert inside[i].wait(10)
    for i, thread in enumerate(threads):
        leave[i].set()
        thread.join()
    assert precision() == process


def test_a_choice_made_while_an_operator_works_is_kept(exact_onednn):
    def choose():
        torch.backends.mkldnn.matmul.fp32_precision = "ieee"

    cpu.through_onednn(choose)()
    assert precision() == "ieee"


def test_a_process_can_use_onednn_and_compile():
    """torch.compile asks for the precision, which fails after some ways to set it."""
    code = """
import torch
from kernels import cpu, sliding_gqa_attention
used = cpu.use_onednn()
assert used == cpu.onednn_is_exact() == (torch.backends.mkldnn.matmul.fp32_precision == "bf16")
q = torch.randn(1, 2, 80, 16, requires_grad=True)
sliding_gqa_attention(q, q, q, 8).sum().backward()
torch.get_float32_matmul_precision()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def inputs(case, dtype):
    T, window, D, options = CASES[case]
    options = {"scale": D**-0.5, **options}
    tensors = [torch.randn(2, T, heads, D).to(dtype).transpose(1, 2) for heads in (4, 2, 2)]
    if options.pop("sinks", False):
        tensors.append(torch.randn(4).to(dtype))
    if "rope" in options:
        options["rope"] = rope_tables(T, options["rope"])
    return tensors, [torch.randn(2, 4, T, D), torch.randn(2, 4, T)], window, options


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("products", [torch.bfloat16, torch.float32])
def test_bf16_stays_within_twice_the_error_of_eager_bf16(case, keep, products, monkeypatch):
    """Results and gradients, with and without products in bf16, whatever this CPU has."""
    monkeypatch.setattr(banded, "has_bf16_products", lambda: products == torch.bfloat16)
    monkeypatch.setattr(banded_plan, "STEP_SCORES_PER_THREAD", 2**15)
    banded_plan.plan.cache_clear()
    if not keep:
        monkeypatch.setattr(banded_keeping, "KEPT_KEYS", 0)
    tensors, grads, window, options = inputs(case, torch.bfloat16)
    attend = functools.partial(sliding_gqa_attention, return_lse=True, backend="banded")
    ratios = excess(run(attend, tensors, grads, window, **options), tensors, grads, window, **options)
    for name, ratio in ratios.items():
        assert ratio <= (2 / 3 if name[0] == "d" else 1), (name, ratios)  # `excess` gives gradients three times
    banded_plan.plan.cache_clear()


def test_bf16_sums_over_blocks_are_fp32():
    """A key that many blocks see: its gradient is not rounded after every block."""
    T = 4096
    q, k, v = (torch.zeros(1, 1, T, 8, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    sliding_gqa_attention(q, k, v, None, backend="banded").sum().backward()
    exact = (1 / torch.arange(1, T + 1, dtype=torch.float64)).sum()  # equal scores: query i gives key 0 its i-th part
    assert abs(v.grad[0, 0, 0, 0] - exact) <= 0.01 * exact


@pytest.mark.parametrize("products", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("with_lse", [False, True])
def test_the_operators_of_bf16_inputs_pass_opcheck(products, with_lse, monkeypatch):
    monkeypatch.setattr(banded, "has_bf16_products", lambda: products == torch.bfloat16)
    q, k, v = (torch.randn(2, 80, heads, 16).bfloat16().transpose(1, 2) for heads in (4, 2, 2))
    shared = (None, *rope_tables(80, 8), 6, 0, 0.25)
    forward, backward = torch.ops.sliding_gqa.banded_forward, torch.ops.sliding_gqa.banded_backward
    library.opcheck(forward, (q, k, v, *shared, with_lse, 2))
    out, lse, kept = forward(q, k, v, *shared, with_lse, 2)
    assert {x.dtype for x in kept} == {products}
    grads = torch.randn_like(out), torch.randn_like(lse) if with_lse else None
    library.opcheck(backward, (*grads, q, k, v, out, lse, kept, *shared, 2))


def gradients(T, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, h, T, 16, generator=generator).to(dtype).requires_grad_() for h in (4, 2, 2))
    out = sliding_gqa_attention(q, k, v, 24, rope=rope_tables(T, 16), backend="banded")
    return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_call_leaves_in_its_scratch_changes_no_bit_of_the_next(dtype):
    expected = gradients(200, dtype)
    gradients(333, dtype, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(gradients(200, dtype), expected, strict=True))


def test_a_call_in_inference_mode_leaves_no_scratch_that_training_cannot_use():
    def work():
        with torch.inference_mode():
            sliding_gqa_attention(*(torch.randn(1, 2, 100, 16) for _ in range(3)), 24, backend="banded")
        results.append(gradients(100))

    results = []
    thread = threading.Thread(target=work)  # scratch belongs to a thread: a new one has none yet
    thread.start()
    thread.join()
    assert all(torch.equal(a, b) for a, b in zip(results[0], gradients(100), strict=True))


def test_threads_do_not_share_scratch():
    """Four calls at once give what each gives alone."""
    torch.manual_seed(0)
    alone = [gradients(300 + i, seed=i) for i in range(4)]
    together = [None] * 4

    def work(i):
        torch.set_num_threads(1)
        for _ in range(5):
            together[i] = gradients(300 + i, seed=i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, expected in zip(together, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
