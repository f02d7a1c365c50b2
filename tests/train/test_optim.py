"""Learning rate schedules, weight decay, Muon, and the moving average of the weights."""

import copy
import io
import os

import pytest
import torch
import torch.distributed.fsdp
from test_metrics import trainer as make_trainer
from test_metrics import weights

import train.optim
from model import GPT, GPTConfig, from_pretrained
from train.optim import POLYNOMIALS, AverageWeights, Muon, hidden_matrices, learning_rate_at, make_optimizer, orthogonal

SCHEDULE = {"peak": 1.0, "warmup_tokens": 100, "final_tokens": 1100}


def test_the_learning_rate_rises_in_a_line_then_falls_along_a_cosine_to_a_tenth():
    rates = [learning_rate_at(tokens, **SCHEDULE) for tokens in (1, 50, 100, 350, 600, 1100, 5000)]
    quarter = 0.1 + 0.9 * (1 + 2**-0.5) / 2
    assert rates == pytest.approx([0.01, 0.5, 1.0, quarter, 0.55, 0.1, 0.1])


def test_linear_falls_in_a_line_and_wsd_in_the_last_fifth_only():
    tokens = (50, 100, 600, 900, 1000, 1100, 5000)
    linear = [learning_rate_at(t, **SCHEDULE, schedule="linear", final_fraction=0.0) for t in tokens]
    assert linear == pytest.approx([0.5, 1.0, 0.5, 0.2, 0.1, 0.0, 0.0])
    wsd = [learning_rate_at(t, **SCHEDULE, schedule="wsd", final_fraction=0.2) for t in tokens]
    assert wsd == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.6, 0.2, 0.2])


def test_without_decay_the_peak_stays():
    assert [learning_rate_at(t, **SCHEDULE, decay=False) for t in (50, 100, 600, 5000)] == [0.5, 1.0, 1.0, 1.0]


def test_a_run_without_warm_up_begins_at_the_peak():
    assert learning_rate_at(0, peak=2.0, warmup_tokens=0, final_tokens=10) == 2.0
    assert learning_rate_at(6, peak=2.0, warmup_tokens=5, final_tokens=5) == pytest.approx(0.2)


CONFIG = {"vocab_size": 11, "context_length": 8, "n_layer": 2, "n_head": 2, "d_model": 16}
SETTINGS = {"learning_rate": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.99)}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("tie_weights", [True, False])
def test_only_matrices_are_decayed_and_every_parameter_is_held_once(optimizer, tie_weights):
    model = GPT(GPTConfig(**CONFIG, positions="learned", tie_weights=tie_weights))
    made = make_optimizer(model, optimizer=optimizer, **SETTINGS)
    decayed = {id(p) for group in made.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for name, p in model.named_parameters() if p.dim() == 2}
    held = [p for group in made.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(model.parameters()))
    assert {name for name, p in model.named_parameters() if id(p) not in decayed} >= {"ln_f.weight", "ln_f.bias"}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_decay_shrinks_a_matrix_that_has_no_gradient_and_leaves_a_bias(optimizer):
    model = torch.nn.Linear(3, 3)
    torch.nn.init.ones_(model.weight)
    torch.nn.init.ones_(model.bias)
    made = make_optimizer(model, optimizer=optimizer, learning_rate=0.5, weight_decay=0.1, betas=(0.9, 0.99))
    (0 * model(torch.zeros(1, 3)).sum()).backward()
    made.step()
    assert torch.equal(model.weight, torch.full((3, 3), 0.95)) and torch.equal(model.bias, torch.ones(3))


@pytest.mark.parametrize("tie_weights", [True, False])
def test_muon_takes_the_matrices_between_the_embeddings_and_the_output(tie_weights):
    model = GPT(GPTConfig(**CONFIG, positions="learned", tie_weights=tie_weights))
    names = {name for name, p in model.named_parameters() if p in hidden_matrices(model)}
    assert names == {
        f"blocks.{i}.{part}.weight" for i in (0, 1) for part in ("attn.qkv", "attn.proj", "mlp.fc", "mlp.proj")
    }
    assert not hidden_matrices(model.requires_grad_(False))


def test_the_polynomials_bring_singular_values_from_a_hundredth_up_near_one():
    values = torch.linspace(0.01, 1, 10001, dtype=torch.float64)
    for a, b, c in POLYNOMIALS:
        values = a * values + b * values**3 + c * values**5
    assert values.min().item() == pytest.approx(0.7306, abs=2e-4) and values.max().item() < 1.2695


@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (24, 7), (7, 24), (3, 1)])
def test_orthogonal_keeps_the_directions_and_evens_out_the_lengths(shape):
    u, _, vt = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    lengths = torch.linspace(1, 0.05, min(shape), dtype=torch.float64)
    found = u.T @ orthogonal(u * lengths @ vt, torch.float64) @ vt.T
    assert found.diagonal().min() > 0.73 and found.diagonal().max() < 1.27
    assert (found - torch.diag(found.diagonal())).abs().max() < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonal_takes_a_batch_leaves_zero_alone_and_returns_the_dtype_it_got(dtype):
    batch = torch.randn(3, 6, 20)
    batch[1] = 0
    found = orthogonal(batch, dtype)
    assert found.dtype == torch.float32 and not found[1].any()
    exact = torch.stack([orthogonal(matrix, torch.float64) for matrix in batch.double()])
    torch.testing.assert_close(found.double(), exact, atol=1e-5 if dtype == torch.float32 else 0.05, rtol=0)


def test_with_torchs_polynomials_a_step_is_that_of_torchs_muon(monkeypatch):
    """torch's has the same scale under the name of match_rms_adamw, and iterates in bf16."""
    monkeypatch.setattr(train.optim, "POLYNOMIALS", ((3.4445, -4.7750, 2.0315),) * 5)
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in ((12, 5), (4, 9), (12, 5))]
    theirs_weights = copy.deepcopy(weights)
    ours = Muon([{"params": weights, "weight_decay": 0.3, "muon": True}], lr=0.02)
    theirs = torch.optim.Muon(theirs_weights, lr=0.02, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    before = copy.deepcopy(weights)
    for _ in range(3):
        for mine, other in zip(weights, theirs_weights, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        ours.step()
        theirs.step()
    for start, mine, other in zip(before, weights, theirs_weights, strict=True):
        assert (mine - other).norm() < 0.02 * (mine - start).norm()


def test_parameters_without_muon_are_updated_as_by_adamw():
    layer, same = torch.nn.LayerNorm(8), torch.nn.LayerNorm(8)
    ours = make_optimizer(layer, optimizer="muon", **SETTINGS)
    theirs = torch.optim.AdamW(same.parameters(), lr=1e-3, weight_decay=0.0, betas=(0.9, 0.99), fused=True)
    for _ in range(3):
        x = torch.randn(5, 8)
        for module, optimizer in ((layer, ours), (same, theirs)):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
    assert torch.equal(layer.weight, same.weight) and torch.equal(layer.bias, same.bias)


def test_muon_resumes_bit_for_bit_from_a_saved_state():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**CONFIG))
    batches = [torch.randint(11, (2, 2, 8)) for _ in range(4)]

    def steps(model, optimizer, batches):
        for x, y in batches:
            model(x, y)[1].backward()
            optimizer.step()
            optimizer.zero_grad()

    optimizer = make_optimizer(model, optimizer="muon", **SETTINGS)
    steps(model, optimizer, batches[:2])
    saved, half = io.BytesIO(), copy.deepcopy(model)
    torch.save(optimizer.state_dict(), saved)
    steps(model, optimizer, batches[2:])

    resumed = make_optimizer(half, optimizer="muon", **SETTINGS)
    saved.seek(0)
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    steps(half, resumed, batches[2:])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), half.parameters(), strict=True))


def test_muon_leaves_parameters_without_a_gradient_and_computes_the_loss_of_a_closure():
    used, unused = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2, 2))
    optimizer = Muon([{"params": [used, unused], "muon": True}, {"params": []}], lr=0.1)

    def closure():
        loss = used.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4
    assert torch.equal(unused, torch.ones(2, 2)) and not torch.equal(used, torch.ones(2, 2))


def test_muon_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match=r"Muon updates matrices, not a parameter of shape \(3,\)"):
        Muon([{"params": [torch.nn.Parameter(torch.ones(3))], "muon": True}], lr=0.1)


def take_steps(model):
    optimizer = make_optimizer(model, optimizer="muon", **SETTINGS)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        x, y = torch.randint(11, (2, 2, 8), generator=generator)
        model(x, y)[1].backward()
        optimizer.step()
        optimizer.zero_grad()


def compare_sharded(rank, rendezvous):
    """In one of two processes: raises unless the sharded model ends where the whole one does."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    whole, sharded = GPT(GPTConfig(**CONFIG), seed=0), GPT(GPTConfig(**CONFIG), seed=0)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))  # also where there is a GPU
    torch.distributed.fsdp.fully_shard(sharded, mesh=mesh)
    take_steps(whole)
    take_steps(sharded)
    for expected, part in zip(whole.parameters(), sharded.parameters(), strict=True):
        assert part.to_local().shape != expected.shape or len(expected) == 1
        torch.testing.assert_close(part.full_tensor(), expected, atol=1e-5, rtol=0)
    torch.distributed.destroy_process_group()
    os._exit(0)  # as train.distributed.exit_process


def test_muon_of_sharded_matrices_is_that_of_whole_ones(tmp_path):
    torch.multiprocessing.spawn(compare_sharded, (tmp_path / "rendezvous",), nprocs=2)


def test_the_average_moves_towards_the_weights_faster_at_first():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    average, expected = AverageWeights(model, 0.5), 0.0
    for step in range(1, 21):
        torch.nn.init.constant_(model.weight, float(step))
        average.update()
        expected += max(0.5, 9 / (10 + step)) * (step - expected)
        with average.in_place():
            assert model.weight.item() == pytest.approx(expected)
        assert model.weight.item() == step


def test_the_models_weights_come_back_after_an_error():
    model = torch.nn.Linear(2, 2)
    average, before = AverageWeights(model, 0.9), model.weight.detach().clone()
    torch.nn.init.zeros_(model.weight)
    with pytest.raises(KeyError), average.in_place():
        assert torch.equal(model.weight, before)
        raise KeyError
    assert not model.weight.any()


def test_a_saved_average_resumes_bit_for_bit():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 3)
    average, resumed = AverageWeights(model, 0.9), AverageWeights(model, 0.9)
    for step in range(6):
        torch.nn.init.normal_(model.weight)
        average.update()
        if step == 2:
            resumed.load_state_dict(average.state_dict())
        elif step > 2:
            resumed.update()
    with average.in_place():
        expected = weights(model)
    with resumed.in_place():
        assert torch.equal(weights(model), expected)


def test_the_average_is_evaluated_and_kept_as_best(tmp_path):
    made = make_trainer(tmp_path, ema_decay=0.9, learning_rate=0.03, max_steps=8)
    made.train()
    steps, found = made.history.series("held_out_loss")
    assert made.best_held_out_loss == found[-1] == min(found)
    assert made.held_out_loss() != found[-1]
    with made.average.in_place():
        assert made.held_out_loss() == found[-1]
        assert torch.equal(weights(from_pretrained(tmp_path / "best")[0]), weights(made.model))
    assert torch.equal(weights(from_pretrained(tmp_path / "last")[0]), weights(made.model))
