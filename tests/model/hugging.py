"""Tiny random models of Hugging Face's classes, for the tests that compare with them."""

import pytest
import torch
from mixes import lively
from torch.utils._python_dispatch import TorchDispatchMode

from model import CharTokenizer

CHARACTERS = CharTokenizer("\n !,.'()abcdefghijklmnopqrstuvwxyz\u00e9\u2014\U0001f600ABC")
TEXT = "a b  c,\n\n 'tis (caf\u00e9) .\u2014\U0001f600 A!"
BACKENDS = ["auto", "reference"]  # of our attention, in these tests
WINDOW, LENGTH = 7, 25
SIZES = dict(
    vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=64, sliding_window=WINDOW, bos_token_id=1, eos_token_id=None,
    pad_token_id=0,
)  # fmt: skip
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
# name of their classes -> what they need beyond SIZES
FAMILIES = {
    "mistral": ("Mistral", {}),
    "gemma2": ("Gemma2", {"head_dim": 8, "query_pre_attn_scalar": 5, "attn_logit_softcapping": 2.0, **ALTERNATING}),
    "gemma3": ("Gemma3", {"head_dim": 8, "query_pre_attn_scalar": 5, **ALTERNATING}),
    "gpt_oss": ("GptOss", {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, **ALTERNATING}),
    "starcoder2": ("Starcoder2", {}),
    "phi3": ("Phi3", {}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
    "gemma4": (
        "Gemma4",
        {
            "head_dim": 8,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 97,
            "num_hidden_layers": 5,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"],
        },
    ),
    "olmo3": ("Olmo3", ALTERNATING),
    "ministral": ("Ministral", {"head_dim": 8, **ALTERNATING}),
    "qwen3": ("Qwen3", {"head_dim": 8, "use_sliding_window": True, "max_window_layers": 1}),
    "cohere2": ("Cohere2", ALTERNATING),
    "exaone4": ("Exaone4", ALTERNATING),
    "smollm3": ("SmolLM3", {"use_sliding_window": True, **ALTERNATING}),
}


def family(name, options=None, **changes):
    """A model of FAMILIES, or of (its class, its config's class), in evaluation mode, with attention "eager"."""
    if isinstance(name, str):
        import transformers

        classes, options = FAMILIES[name]
        config_name = classes + ("TextConfig" if classes in ("Gemma3", "Gemma4") else "Config")
        name = getattr(transformers, f"{classes}ForCausalLM"), getattr(transformers, config_name)
    model_class, config_class = name
    model = model_class(config_class(**{**SIZES, **options, "attn_implementation": "eager", **changes}))
    return lively(model, scale=0.1).eval()


every_family = pytest.mark.parametrize("name", FAMILIES)


def tokens(rows=2, length=LENGTH):
    return torch.randint(2, 97, (rows, length))


def padding(left=0, right=0):
    """(2, LENGTH), the second row with that much padding."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :left] = 0
    mask[1, LENGTH - right :] = 0
    return mask


def results(model, implementation, inputs, counts=None, **options):
    """(logits of what counts, {parameter: gradient of a loss over them})."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    logits = model(inputs, **{"use_cache": False, **options}).logits
    logits = logits if counts is None else logits[counts]
    logits.square().sum().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def equal(found, expected):
    """Assert that (logits, gradients) are the expected ones, to 2e-4 of the largest of each."""
    torch.testing.assert_close(found[0], expected[0], atol=2e-4, rtol=0)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, atol=2e-4 * gradient.abs().max().item(), rtol=0)


def same(model, inputs, counts=None, **options):
    """Assert that logits and gradients are eager's."""
    expected = results(model, "eager", inputs, counts, **options)
    equal(results(model, "sliding_gqa", inputs, counts, **options), expected)


def generated(model, implementation, inputs, **options):
    model.set_attn_implementation(implementation)
    return model.generate(inputs, max_new_tokens=WINDOW + 5, do_sample=False, **options)


def refused(message, model, inputs=None, **options):
    model.set_attn_implementation("sliding_gqa")
    with pytest.raises(ValueError, match=message) as error:
        model(tokens() if inputs is None else inputs, **{"use_cache": False, **options})
    assert "\n" not in str(error.value)


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any PyTorch operator gave, those inside of ours aside."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *(x.numel() for x in tensors)])
        return result


def same_weights(first, second):
    """Whether two modules have the same weights, bit for bit."""
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
