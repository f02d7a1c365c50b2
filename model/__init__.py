"""GPT-2 and the modified GPT-2 (rotary positions, sliding window, grouped KV heads): one class, and how to sample.

    model = GPT(GPTConfig(vocab_size=65, context_length=256, window=64, n_layer=4, n_head=4, n_kv_head=2, d_model=128))
    logits, loss = model(tokens, targets)
    for token in generate(model, prompt, 100, top_k=10): ...

gpt.py is the model. kv_cache.py is what it remembers while it writes, steps.py and token_step.py bring the logits of
one token after the other, choosing.py picks it, stopping.py sees the end, sampling.py is all of it, sample.py the
command (command.py is what all commands share). flops.py counts the arithmetic.
"""

from .checkpoint import CheckpointError, from_pretrained, save_pretrained
from .choosing import Choice, min_p_logits, penalized_logits, top_k_logits, top_p_logits
from .config import ARCHITECTURES, GPTConfig
from .flops import flops_a_token
from .gpt import GPT, attention_backend
from .kv_cache import KVCache
from .sampling import generate, sample
from .tokenizer import ByteTokenizer, CharTokenizer, SubwordTokenizer, load_tokenizer

__all__ = [
    "ARCHITECTURES",
    "GPT",
    "ByteTokenizer",
    "CharTokenizer",
    "CheckpointError",
    "Choice",
    "GPTConfig",
    "KVCache",
    "SubwordTokenizer",
    "attention_backend",
    "flops_a_token",
    "from_pretrained",
    "generate",
    "load_tokenizer",
    "min_p_logits",
    "penalized_logits",
    "sample",
    "save_pretrained",
    "top_k_logits",
    "top_p_logits",
]
