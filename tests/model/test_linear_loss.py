"""The loss in pieces is the plain loss, with its gradients, and makes no logits of a whole batch."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import library

from model import GPT, GPTConfig, linear_loss
from model.linear_loss import rows_of_piece

V, C = 37, 8


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Pieces of 5 tokens: of 23, the last is not full."""
    monkeypatch.setattr(linear_loss, "LEAST_ROWS", 5)
    monkeypatch.setattr(linear_loss, "PIECE", 5 * V)


def problem(dtype=torch.float64, ignored=True):
    x, weight = torch.randn(23, C, dtype=dtype), torch.randn(V, C, dtype=dtype)
    targets = torch.randint(V, (23,))
    if ignored:
        targets[[0, 3, 4, 22]] = -1
    return x.requires_grad_(), weight.requires_grad_(), targets


def plain(x, weight, targets, softcap=None):
    logits = F.linear(x, weight)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, ignore_index=-1)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("ignored", [False, True])
def test_loss_and_gradients_are_those_of_all_logits(softcap, ignored):
    x, weight, targets = problem(ignored=ignored)
    expected = plain(x, weight, targets, softcap)
    loss = linear_loss.linear_loss(x, weight, targets, softcap)
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(3 * one, (x, weight)) for one in (loss, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck():
    x, weight, targets = problem()
    assert torch.autograd.gradcheck(lambda *leaves: linear_loss.linear_loss(*leaves, targets, 3.0), (x, weight))


def test_in_bf16_autocast_it_is_as_exact_as_all_logits():
    x, weight, targets = problem(torch.float32)
    right = plain(x.double(), weight.double(), targets)
    exact = torch.autograd.grad(right, (x, weight))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = linear_loss.linear_loss(x, weight, targets), plain(x, weight, targets)
    assert ours.dtype == torch.float32
    assert abs(ours - right) <= 2 * abs(theirs - right) + 1e-6
    found = [torch.autograd.grad(loss, (x, weight)) for loss in (ours, theirs)]
    for a, b, c in zip(*found, exact, strict=True):
        assert a.dtype == torch.float32
        assert (a - c).abs().max() <= 2 * (b - c).abs().max() + 1e-6


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(frozen):
    leaves = [*problem()]
    targets = leaves.pop()
    leaves[frozen].requires_grad_(False)
    (ours,) = torch.autograd.grad(linear_loss.linear_loss(*leaves, targets), leaves[1 - frozen])
    torch.testing.assert_close(ours, torch.autograd.grad(plain(*leaves, targets), leaves[1 - frozen])[0])


def test_no_target_gives_nan_and_no_gradient():
    x, weight, targets = problem()
    loss = linear_loss.linear_loss(x, weight, torch.full_like(targets, -1))
    assert loss.isnan()
    assert all(grad.abs().max() == 0 for grad in torch.autograd.grad(loss, (x, weight)))


def test_the_operator_passes_opcheck():
    x, weight, targets = (tensor.detach() for tensor in problem(torch.float32))
    for softcap, wanted in ((None, (True, True)), (2.0, (False, False))):
        library.opcheck(torch.ops.sliding_gqa.linear_loss, (x, weight, targets, softcap, torch.float32, *wanted))


SHAPE = dict(context_length=12, window=5, n_layer=1, n_head=2, d_model=C)


@pytest.mark.parametrize("tie_weights", [True, False])
def test_a_model_trains_the_same_without_its_logits(tie_weights):
    gpt = GPT(GPTConfig(vocab_size=V, tie_weights=tie_weights, **SHAPE), seed=0)
    same = copy.deepcopy(gpt)
    tokens = torch.randint(V, (2, 13))
    targets = tokens[:, 1:].clone()
    targets[0, :3], targets[1, 5] = -100, -1
    logits, loss = gpt(tokens[:, :-1], targets)
    nothing, in_pieces = same(tokens[:, :-1], targets, with_logits=False)
    assert logits.shape == (2, 12, V) and nothing is None
    torch.testing.assert_close(in_pieces, loss)
    loss.backward(), in_pieces.backward()
    for a, b in zip(gpt.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(gpt(tokens[:, :-1], targets, with_logits=False)[1], loss.detach())
    assert gpt(tokens, with_logits=False) == (None, None)


def test_a_compiled_model_needs_no_second_graph():
    torch._dynamo.reset()
    gpt = GPT(GPTConfig(vocab_size=V, **SHAPE), seed=0)
    tokens = torch.randint(V, (2, 13))
    compiled = torch.compile(gpt, fullgraph=True, backend="aot_eager")
    _, loss = compiled(tokens[:, :-1], tokens[:, 1:], with_logits=False)
    _, expected = gpt(tokens[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(loss, expected)
    (ours,) = torch.autograd.grad(loss, gpt.wte.weight)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, gpt.wte.weight)[0])
    torch._dynamo.reset()


def test_a_batch_of_one_piece_has_its_logits_made_as_ever(monkeypatch):
    """The same bits, and every derivative."""
    monkeypatch.setattr(linear_loss, "PIECE", 24 * V)
    assert rows_of_piece(V) == 24 and rows_of_piece(V + 1) == 23
    gpt = GPT(GPTConfig(vocab_size=V, **SHAPE), seed=0)
    tokens = torch.randint(V, (2, 13))
    (_, loss), (_, same) = (gpt(tokens[:, :-1], tokens[:, 1:], with_logits=wanted) for wanted in (True, False))
    assert torch.equal(loss, same)
    assert "NllLoss" in type(same.grad_fn).__name__


PEAK = """
import re, sys, torch
from model import GPT, GPTConfig
torch.set_num_threads(1)
gpt = GPT(GPTConfig(vocab_size=50257, context_length=512, n_layer=1, n_head=1, d_model=16), seed=0)
x = torch.randint(50257, (2, 513))
def peak():
    # not getrusage: its peak includes that of the process which started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) >> 10
gpt(x[:, :8], x[:, 1:9])[1].backward()
before = peak()
gpt(x[:, :-1], x[:, 1:], with_logits=sys.argv[1] == "True")[1].backward()
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_that_of_some_pieces():
    """In MB; all logits of 1,024 tokens are 196 MB, a piece of them 64."""
    found = [
        int(subprocess.check_output([sys.executable, "-c", PEAK, str(with_logits)])) for with_logits in (True, False)
    ]
    assert found[0] > 2 * 196 and found[1] < found[0] / 2
