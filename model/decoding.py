"""The logits of the next token, step by step: `Decoder` reads the prompt into a cache, then takes one token a row.

A step is a CUDA graph on a GPU (`CUDAGraphStep`) and a sequence of torch calls on a CPU (`CPUStep`), where these
compute exactly what the model does; elsewhere it is the model's own forward.
"""

from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.nn.functional import embedding, gelu

from kernels.backend import backend_module, resolve_backend

from . import gpt
from .kv_cache import KVCache

STANDARD_MODULES = {gpt.GPT, gpt.Block, gpt.Attention, gpt.MLP, nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding}
STANDARD_MODULES |= {nn.ModuleList}
# Multiply-adds up to which one thread takes a token, and a prompt. Several threads wait for each other in each of some
# hundred short calls; beside a busy process they wait up to a hundred times as long. docs/sampling.md has the figures.
ONE_THREAD_TOKEN, ONE_THREAD_PROMPT = 2**23, 2**27
WARM_UPS = 3  # forwards before a capture: Triton compiles its kernels, cuBLAS allocates its workspace


class Decoder:
    """Computes the logits (B, V) of the next token: first `prefill()`, then `decode(tokens)` for each new token.

    tokens          (B, T) prompts, left-padded; padding (B,) is the number of padding columns of each row.
    prefill_chunk   prompt columns that one forward reads.
    compile         compile the step with torch.compile, unless it is a CUDA graph.

    Past the end of learned positions a new token shifts all others, so that a cache is useless: the last
    context_length tokens are then read again for every token, without a cache.
    """

    def __init__(self, model, tokens, padding, max_new_tokens, prefill_chunk, compile=False):
        self.model, self.padding, self.prefill_chunk, self.compile = model, padding, prefill_chunk, compile
        self.rows, self.columns = tokens.shape
        self.cache = self.step = None
        self.on_cpu, self.row_work = tokens.device.type == "cpu", self.rows * model.num_parameters()
        self.is_standard = why_not_standard(model) is None
        self.longest_padding = int(padding.max()) if self.rows else 0
        self.max_columns = self.columns + max_new_tokens
        # the prompt; learned positions keep the tokens of one context, to read them again past its end
        self.tokens = tokens
        self.context_length = model.config.context_length if model.config.positions == "learned" else None

    @torch.no_grad()
    def prefill(self):
        """The logits after self.tokens, read into a new cache. Learned positions read the last context_length."""
        dropped = 0 if self.context_length is None else max(0, self.columns - self.context_length)
        self.tokens = self.tokens[:, -self.context_length :] if self.context_length else self.tokens
        if self.context_length is not None and self.columns >= self.context_length and self.longest_padding <= dropped:
            self.cache = None  # no step will read it
            with _evaluating(self.model):
                if self.is_standard:
                    return self.model.last_logits(self.tokens)
                return self.model(self.tokens)[0][:, -1]
        device = self.tokens.device
        autocast = torch.is_autocast_enabled(device.type)
        self.cache = KVCache(
            self.model.config,
            self.rows,
            max_new_tokens_per_call=min(self.tokens.shape[1], self.prefill_chunk),
            max_length=self.context_length or min(self.max_columns, self.columns + 64),  # grows with the text
            device=device,
            dtype=torch.get_autocast_dtype(device.type) if autocast else self.model.wte.weight.dtype,
            padding=(self.padding - dropped).clamp(min=0),
        )
        with _evaluating(self.model):
            for chunk in self.tokens.split(self.prefill_chunk, dim=1):
                logits = self.model(chunk, cache=self.cache)[0][:, -1]
        self.cache.fit_single_tokens()
        self.step = None
        self.tokens = self.tokens if self.context_length else None
        return logits

    def decode(self, new):
        """The logits after one more token of each row, new (B,)."""
        self.columns += 1
        if self.context_length is not None:
            self.tokens = torch.cat([self.tokens, new[:, None]], dim=1)
            if self.columns > self.context_length:
                return self.prefill()
        if self.cache.bounded and self.cache.columns == self.cache.max_length:
            self.cache.extend(min(self.max_columns, 2 * self.cache.max_length))
            self.step = None
        if self.step is None:
            self.step = self._make_step()
        with _evaluating(self.model):
            return self.step(new)

    @contextmanager
    def threads(self):
        """Inside, PyTorch has the threads that the next token or prompt is worth; afterwards the caller's number."""
        before = torch.get_num_threads()
        columns, limit = (self.tokens.shape[1], ONE_THREAD_PROMPT) if self.cache is None else (1, ONE_THREAD_TOKEN)
        if self.on_cpu and columns * self.row_work <= limit:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def _make_step(self):
        if why_not_cuda_graph(self.model, self.cache) is None:
            return CUDAGraphStep(self.model, self.cache)
        if why_not_cpu_step(self.model, self.cache) is None:
            return CPUStep(self.model, self.cache, self.compile)
        model = torch.compile(self.model) if self.compile else self.model

        @torch.no_grad()
        def step(new):
            return model(new[:, None], cache=self.cache)[0][:, -1]

        return step


@contextmanager
def _evaluating(model):
    """Evaluation mode inside; afterwards every module has its own mode again."""
    training = [module for module in model.modules() if module.training] if model.training else []
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def why_not_standard(model):
    """Why the model's forward may do more than its config and weights say, such as a hook; None if it does not.

    `CPUStep` and `CUDAGraphStep` would leave that out.
    """
    for name, module in model.named_modules():
        if type(module) not in STANDARD_MODULES:
            return f"{name or 'the model'} is a {type(module).__name__}"
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"{name or 'the model'} has a hook"
    return None


def why_not_cpu_step(model, cache):
    """Why a `CPUStep` would not compute what the model does, in a few words; None if it would."""
    device = model.wte.weight.device
    if device.type != "cpu":
        return "the model is not on a CPU"
    if not model.fused_kernels or not hasattr(_backend(model), "token_step"):
        return "the backend has no such step"
    wide = all(weight.dtype in (torch.float32, torch.float64) for weight in model.parameters())
    if not wide or torch.is_autocast_enabled("cpu"):
        return "in 16 bits it would round differently"
    if fields := model.config.modern_fields:
        return f"it has LayerNorm, GELU and biases only, not {fields}"
    if reason := why_not_standard(model):
        return reason
    if cache.max_new_tokens_per_call > 1:
        return "the cache takes several tokens a call"
    if cache.lengths.numel() == 0 or cache.lengths.amin() < 0:
        return "a row has no token yet"
    return None


def why_not_cuda_graph(model, cache):
    """Why a `CUDAGraphStep` would not compute what the model does, in a few words; None if it would."""
    if model.wte.weight.device.type != "cuda":
        return "the model is not on a CUDA device"
    if model.fused_kernels and _backend(model).READS_LENGTHS:
        return "the backend reads lengths on the host, which a graph cannot capture"
    if torch.is_autocast_enabled("cuda"):
        return "a graph would read autocast's copies of the weights, which autocast frees at its end"
    if reason := why_not_standard(model):
        return reason
    if cache.lengths.numel() == 0:
        return "there are no rows"
    return None


def _backend(model):
    """The kernels' backend that the model runs, as its module."""
    return backend_module(resolve_backend(model.blocks[0].attn.backend, model.wte.weight.device)[0])


class CPUStep:
    """One token a row on a CPU: the arithmetic of `GPT.forward` without its modules, checks and operators.

    A token of a small model is a fraction of a millisecond of arithmetic; modules and operators cost several times
    that. The step uses the weights that the model has now and sees changes in place, such as an optimizer's.

    compile: compile the arithmetic with torch.compile, which takes a minute at the first tokens.
    """

    def __init__(self, model, cache, compile=False):
        self.model, self.config, self.cache = model, model.config, cache
        self.kernels = _backend(model).token_step
        self.forward = torch.compile(self._forward) if compile else self._forward
        rope = model.blocks[0].attn.rope
        self.angles = None if rope is None else partial(rope.at, device=cache.lengths.device)
        self.embedding = model.wte.weight.detach()
        self.positions = model.wpe.weight.detach() if self.config.positions == "learned" else None
        self.head = self.embedding.t() if self.config.tie_weights else model.lm_head.weight.detach().t()
        self.norm = _norm(model.ln_f)
        rotated = 0 if rope is None else self.config.rotated
        self.layers = [
            (
                _norm(block.ln_1),
                _linear(block.attn.qkv),
                self.kernels.CachedAttention(k, v, self.config.n_head, rotated, cache.lengths),
                _linear(block.attn.proj),
                _norm(block.ln_2),
                _linear(block.mlp.fc),
                _linear(block.mlp.proj),
            )
            for block, k, v in zip(model.blocks, cache.k, cache.v, strict=True)
        ]

    @torch.inference_mode()
    def __call__(self, tokens):
        """The logits (B, V) after one more token of each row: model(tokens[:, None], cache=cache)[0][:, -1]."""
        self.cache.advance(1, self.model.config)
        return self.forward(tokens, self.kernels.StepPositions(self.cache.lengths, self.config.head_dim, self.angles))

    def _forward(self, tokens, positions):
        addmm, norm = torch.addmm, torch.layer_norm
        x = embedding(tokens, self.embedding)  # (B, C)
        if self.positions is not None:
            x = x + self.positions[positions.position]
        for norm_1, (qkv, qkv_bias), attend, (proj, proj_bias), norm_2, (fc, fc_bias), (out, out_bias) in self.layers:
            x = x + addmm(proj_bias, attend(addmm(qkv_bias, norm(x, *norm_1), qkv), positions), proj)
            x = x + addmm(out_bias, gelu(addmm(fc_bias, norm(x, *norm_2), fc), approximate="tanh"), out)
        return torch.mm(norm(x, *self.norm), self.head)


def _linear(module):
    return module.weight.detach().t(), module.bias.detach()


def _norm(module):
    return module.normalized_shape, module.weight.detach(), module.bias.detach(), module.eps


class CUDAGraphStep:
    """One token a row on a GPU: the model's forward, captured as a CUDA graph and replayed.

    A step is dozens of short kernels, which the host launches more slowly than the GPU runs them. No kernel of a step
    depends on the host (positions come from the cache's `lengths`), so one graph serves every token. It is captured
    again when the tables of angles, which it reads, are replaced by longer ones. The step uses the weights that the
    model has now and sees changes in place.
    """

    def __init__(self, model, cache):
        self.model, self.cache = model, cache
        self.rope = model.blocks[0].attn.rope
        self.tokens = torch.zeros(len(cache.lengths), 1, dtype=torch.long, device=cache.lengths.device)
        self.graph = self.tables = None

    @torch.no_grad()
    def __call__(self, tokens):
        """The logits (B, V) after one more token of each row, tokens (B,). The next step overwrites them."""
        cache = self.cache
        cache.check_room(1, self.model.config)
        tables = None if self.rope is None else self.rope(cache.columns + 1, cache.lengths.device)
        self.tokens.copy_(tokens[:, None])
        if self.graph is None or tables is not self.tables:
            self._capture()
            self.tables = tables
        self.graph.replay()
        cache.columns += 1  # the graph counts the lengths, on the device
        return self.logits

    def _capture(self):
        """Record the step. The warm-ups write this step's token into its own slots, which does no harm."""
        cache, graph = self.cache, torch.cuda.CUDAGraph()
        columns, lengths = cache.columns, cache.lengths.clone()
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._forward()
                cache.columns = columns
                cache.lengths.copy_(lengths)
        current.wait_stream(side)
        with torch.cuda.graph(graph):
            self.logits = self._forward()
        cache.columns = columns  # a capture runs nothing, so lengths have not changed
        self.graph = graph

    def _forward(self):
        return self.model(self.tokens, cache=self.cache)[0][:, -1]
