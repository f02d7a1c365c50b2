"""Tiny random models of Hugging Face's classes, for the tests that compare with them."""

from mixes import lively

WINDOW = 7
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
}


def family(name, options=None, **changes):
    """A model of FAMILIES, or of (its class, its config's class), in evaluation mode, with attention "eager"."""
    if isinstance(name, str):
        import transformers

        classes, options = FAMILIES[name]
        config_name = classes + ("TextConfig" if classes == "Gemma3" else "Config")
        name = getattr(transformers, f"{classes}ForCausalLM"), getattr(transformers, config_name)
    model_class, config_class = name
    model = model_class(config_class(**{**SIZES, **options, "attn_implementation": "eager", **changes}))
    return lively(model, scale=0.1).eval()
