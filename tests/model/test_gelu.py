import pytest
import torch
import torch.nn.functional as F

from model import gelu as module
from model.gelu import gelu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def values(dtype):
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(2, module.LARGE, generator=generator)
    x[0, :9] = torch.tensor([0.0, -0.0, 1e-8, -1e-8, 30.0, -30.0, 1e4, -1e4, 6.0])
    return x.to(dtype), torch.randn(x.shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_gradient_are_within_the_budget(dtype):
    x, grad = values(dtype)
    x.requires_grad_()
    ours = gelu(x)
    gradient = torch.autograd.grad(ours, x, grad)[0]
    assert ours.grad_fn.name() == "_GELUBackward"
    wide = x.detach().double().requires_grad_()
    exact = F.gelu(wide, approximate="tanh")
    exact_gradient = torch.autograd.grad(exact, wide, grad.double())[0]
    eager = F.gelu(x, approximate="tanh")
    eager_gradient = torch.autograd.grad(eager, x, grad)[0]
    for got, wanted, plain in ((ours, exact, eager), (gradient, exact_gradient, eager_gradient)):
        assert got.dtype == dtype and got.isfinite().all()
        # element by element, near the largest ones: one rounding, and twice what PyTorch's own is off
        error, allowed = (
            (got - wanted).abs(),
            2 * ((plain - wanted).abs().max() + torch.finfo(dtype).eps * wanted.abs()),
        )
        assert (error <= allowed + 1e-30).all()
    with torch.no_grad():
        assert torch.equal(gelu(x), ours)


def test_small_fp64_and_compiled_inputs_take_pytorchs_own():
    for x in (torch.randn(10), torch.randn(module.LARGE, dtype=torch.float64)):
        assert torch.equal(gelu(x), F.gelu(x, approximate="tanh"))
    x = torch.randn(module.LARGE, requires_grad=True)
    compiled = torch.compile(gelu, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), F.gelu(x, approximate="tanh"))


def test_a_nan_stays_one_and_nothing_is_kept_twice():
    x = torch.full((module.LARGE,), float("nan"), requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        out = gelu(x)
    assert out.isnan().all() and kept == [x.nbytes]
