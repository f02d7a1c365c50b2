"""A model trains on the Triton kernels as it does in plain PyTorch."""

import pytest
import torch

from model import GPT, GPTConfig


@pytest.mark.parametrize("pattern", ["S", "SL"])
def test_three_steps_give_the_losses_of_plain_pytorch(pattern, device):
    """Rope, windows, grouped heads and weight updates through forward and backward: to 1e-4, as fp32 allows."""
    shape = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_model": 64}
    config = GPTConfig(vocab_size=31, context_length=24, window=10, window_pattern=pattern, **shape)
    tokens = torch.randint(31, (2, 25), device=device)
    losses = []
    for options in ({"backend": "triton"}, {"fused_kernels": False}):
        model = GPT(config, seed=1, **options).to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(3):
            _, loss = model(tokens[:, :-1], tokens[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[0] - losses[2] > 0.1
    assert losses[:3] == pytest.approx(losses[3:], abs=1e-4)
