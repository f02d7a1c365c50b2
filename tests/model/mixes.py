"""The architectures that the tests of the model go through: the named steps and mixes of their parts."""

import pytest
import torch

from model import ARCHITECTURES, GPTConfig

FIELDS = dict(vocab_size=41, context_length=48, window=9, n_layer=3, n_head=4, n_kv_head=2, d_model=32)
MIXES = {
    **{name: GPTConfig.for_architecture(name, **FIELDS) for name in ARCHITECTURES},
    "pattern": GPTConfig(**{**FIELDS, "window_pattern": "SSL"}),
    "prefix": GPTConfig(**{**FIELDS, "prefix": 3}),
    "partial rotation": GPTConfig(**{**FIELDS, "rotary_dim": 4}),
    "multi-query": GPTConfig(**{**FIELDS, "n_kv_head": 1}),
    "learned window": GPTConfig(**{**FIELDS, "positions": "learned"}),
    "wide MLP": GPTConfig(**{**FIELDS, "mlp_width": 200}),
    "untied": GPTConfig(**{**FIELDS, "tie_weights": False}),
}
every_mix = pytest.mark.parametrize("config", MIXES.values(), ids=MIXES)
both_paths = pytest.mark.parametrize("fused_kernels", [True, False], ids=["fused", "plain"])


def lively(model, scale=0.3):
    """The model with weights so large that attention picks out keys, as after training, and biases that are not 0."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return model
