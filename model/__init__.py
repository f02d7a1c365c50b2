"""GPT-2 and the modified GPT-2 (rotary positions, sliding window, grouped KV heads), in one class, and its sampler.

    model = GPT(GPTConfig(vocab_size=65, context_length=256, window=64, n_layer=4, n_head=4, n_kv_head=2, d_model=128))
    logits, loss = model(tokens, targets)
    for token in generate(model, prompt, 100, top_k=10): ...
    model.save_pretrained("models/mine", tokenizer)
    model = GPT.from_pretrained("models/mine")

`model.sample` is the command; the function `sample` is in model.sampling.
"""

import signal
import sys

# A command such as `python -m model.sample` loads torch for a second: a Ctrl-C in it ends the command without a
# traceback. The command puts Python's own handler back (model/command.py).
if (
    sys.argv[:1] == ["-m"]
    and {"model.sample", "model.huggingface"}.intersection(sys.orig_argv)
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from .batching import generate_batch
from .checkpoint import CheckpointError, from_pretrained, save_pretrained
from .config import ARCHITECTURES, GPTConfig
from .gpt import GPT, attention_backend, flops_per_token
from .kv_cache import KVCache
from .sampling import generate
from .sampling_params import SamplingParams, min_p_logits, penalized_logits, top_k_logits, top_p_logits
from .tokenizer import ByteTokenizer, CharTokenizer, SubwordTokenizer, load_tokenizer

__all__ = [
    "ARCHITECTURES",
    "GPT",
    "ByteTokenizer",
    "CharTokenizer",
    "CheckpointError",
    "GPTConfig",
    "KVCache",
    "SamplingParams",
    "SubwordTokenizer",
    "attention_backend",
    "flops_per_token",
    "from_pretrained",
    "generate",
    "generate_batch",
    "load_tokenizer",
    "min_p_logits",
    "penalized_logits",
    "save_pretrained",
    "top_k_logits",
    "top_p_logits",
]
