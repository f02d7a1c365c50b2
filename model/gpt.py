"""The model: GPT-2 and the modified GPT-2 (rotary positions, sliding window, grouped KV heads), in one class.

    model = GPT(GPTConfig(vocab_size=65, context_length=256, window=64, n_layer=4, n_head=4, n_kv_head=2, d_model=128))
    logits, loss = model(tokens, targets)          # (B, T, V) and a number

The blocks are those of blocks.py. Learned positions and no window make GPT-2 (Radford et al. 2019), rotary positions
StarCoder2 (arXiv:2402.19173), other blocks Llama, Gemma, Qwen or OLMo. Shapes: B rows of T tokens, C = d_model,
V = vocab_size.
"""

import dataclasses
import functools
import math
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from kernels import resolve_backend, sliding_gqa_attention
from kernels.backend import check_backend
from kernels.band import visible_mask, visible_pairs
from kernels.checks import check_starts, check_starts_values

from .blocks import GATED, Block, RMS1Norm, make_norm
from .linear_loss import linear_loss, rows_of_piece
from .rotary import ropes_of_layers
from .sdpa import BandMasks


def attention_backend(device, fused_kernels=True, backend="auto") -> tuple[str, str] | None:
    """(backend, why) that a GPT with these arguments runs on a device; None if it runs plain PyTorch.

    Raises ValueError, in one line, for an unknown backend, one that cannot run there, and one that is named for plain
    PyTorch, which has none.
    """
    check_backend(backend)
    if not fused_kernels and backend != "auto":
        raise ValueError(f"backend {backend!r} is one of the fused kernels: leave out either it or --no-fused-kernels")
    return resolve_backend(backend, device) if fused_kernels else None


class GPT(nn.Module):
    """A language model of the given `GPTConfig`, with GPT-2's random initial weights.

    fused_kernels   run the package `kernels`; False runs plain PyTorch (sdpa.py) with the same parameters.
    backend         of the kernels: "auto" is Triton on a GPU, banded PyTorch elsewhere; a named one never falls back.
                    An unknown name raises ValueError here, one that cannot run on the model's device in the forward.
    seed            gives the same weights every time and does not change torch's random state. None draws the weights
                    from that state, which torch.manual_seed sets.

    tokenizer is None, or what `from_pretrained` read with the weights: `generate` then takes and ends at text.
    """

    def __init__(self, config, fused_kernels=True, backend="auto", seed=None):
        super().__init__()
        check_backend(backend)
        self.config = config
        self.fused_kernels = fused_kernels
        self.tokenizer = None
        masks, ropes = BandMasks(), ropes_of_layers(config)
        # modules draw random weights when they are made; a seeded model must not change the caller's random state
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            self.wte = nn.Embedding(config.vocab_size, config.d_model)  # token embedding
            if config.positions == "learned":
                self.wpe = nn.Embedding(config.context_length, config.d_model)  # position embedding
            self.blocks = nn.ModuleList(
                Block(config, layer, rope, masks, fused_kernels, backend) for layer, rope in enumerate(ropes)
            )
            self.ln_f = make_norm(config)
            if not config.tie_weights:
                self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.init_weights(seed)
        self._warned_of_dropout = False
        self.group, self.part, self.parts = None, 0, 1

    def init_weights(self, seed=None):
        """GPT-2's initialisation: N(0, 0.02), divided by sqrt(2 n_layer) for the output of a branch; biases 0.

        The residual stream sums 2 n_layer branches: the division makes its variance independent of the depth.
        """
        generator = None if seed is None else torch.Generator(self.wte.weight.device).manual_seed(seed)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if name.endswith(".proj") else 0.02
                nn.init.normal_(module.weight, std=std, generator=generator)
            elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
                nn.init.constant_(module.weight, 0.0 if isinstance(module, RMS1Norm) else 1.0)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens, targets=None, cache=None, starts=None, *, with_logits=True):
        """Logits of the next token after each, and the loss against `targets` if they are given.

        tokens    (B, T) integers. Learned positions take at most context_length of them.
        targets   (B, T) integers, the tokens that follow; -1 and -100, Hugging Face's mark, are not counted.
        cache     a `KVCache`: the tokens continue its sequence and are added to it. There is no gradient then.
        starts    (B, T) int32, for rows that hold several documents: the first position of each position's document
                  (`kernels.document_starts`). Attention stays inside a document, and learned positions count from its
                  beginning: each document has the logits that it has alone. Not with a cache.
        with_logits  False where only the loss is needed: then the logits are None, and a large vocabulary's are made in
                  pieces (model/linear_loss.py), which saves most of a step's memory. The loss can be derived once.
        Returns logits (B, T, V) and the mean cross-entropy in nats a token (None without targets). Raises ValueError
        for too many tokens, and for starts that are wrong (on a GPU their values are not read).
        """
        if cache is not None and torch.is_grad_enabled():
            with torch.no_grad():
                return self.forward(tokens, targets, cache, starts, with_logits=with_logits)
        x = self._blocks(tokens, cache, starts)
        if not with_logits:
            return None, None if targets is None else self._loss(x, targets)
        logits = self._head(x)  # (B, T, V)
        return logits, None if targets is None else self._loss(x, targets, logits)

    def _loss(self, x, targets, logits=None):
        """The mean cross-entropy of the last block's output x; logits: its `_head`, where they are made anyway."""
        targets = targets.flatten()
        targets = targets.masked_fill(targets == -100, -1)
        if logits is None and len(targets) > rows_of_piece(self.config.vocab_size):
            return linear_loss(self.ln_f(x).flatten(0, 1), self._head_weight, targets, self.config.logit_softcap)
        logits = self._head(x) if logits is None else logits
        return F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=-1)

    @torch.no_grad()
    def last_logits(self, tokens, cache=None):
        """The logits (B, V) after the last of tokens (B, T), whole sequences; others are not computed.

        cache: as in `forward`. There is no gradient.
        """
        group = self.group
        try:
            self.split_sequences(None)
            return self._head(self._blocks(tokens, cache)[:, -1])
        finally:
            self.split_sequences(group)

    def _blocks(self, tokens, cache=None, starts=None):
        """The output of the last block, (B, T, C)."""
        T = tokens.shape[1]
        if starts is not None:
            self._check_starts(tokens, cache, starts)
        if cache is not None:
            cache.advance(T, self.config)
        elif self.config.positions == "learned" and T * self.parts > self.config.context_length:
            raise ValueError(
                f"tokens has {T * self.parts} positions, but the model learned {self.config.context_length} "
                "(context_length): shorten them, or train with rotary positions"
            )
        self._warn_of_dropout()
        x = self.wte(tokens)  # (B, T, C)
        if self.config.embedding_scale != 1:
            x = x * self.config.embedding_scale
        if self.config.positions == "learned":
            x = x + self._position_vectors(T, cache, starts)
        x = F.dropout(x, self.config.dropout, self.training)
        masks = {} if starts is None else self._document_masks(T, starts)
        for block in self.blocks:
            x = block(x, cache, starts, masks.get(block.attn.window))
        return x

    def _check_starts(self, tokens, cache, starts):
        if cache is not None:
            raise ValueError("starts and a cache: the rows of a cache are one document each, leave out one of the two")
        check_starts(starts, tokens, tokens.shape[1])
        if starts.is_cpu and self.parts == 1 and not torch.compiler.is_compiling():
            check_starts_values(starts)

    def _document_masks(self, T, starts):
        """{window: mask (B, 1, T, T)} of the layers, once a forward; none for the kernels, which read `starts`."""
        if self.fused_kernels and not (self.training and self.config.dropout):
            return {}
        windows = {block.attn.window: block.attn.prefix for block in self.blocks}
        return {
            window: visible_mask(T, T, window, starts.device, starts=starts, prefix=prefix)
            for window, prefix in windows.items()
        }

    def _head(self, x):
        """The logits (..., V) of the last block's output."""
        logits, cap = F.linear(self.ln_f(x), self._head_weight), self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @property
    def _head_weight(self):
        """(V, C)."""
        return self.wte.weight if self.config.tie_weights else self.lm_head.weight

    def _position_vectors(self, T, cache, starts):
        """The learned vectors of the call's positions: (T, C), or (B, T, C) where rows differ: a cache or documents."""
        first = T * self.part
        if starts is not None:
            return self.wpe(torch.arange(first, first + T, device=starts.device) - starts)
        if cache is None:
            return self.wpe.weight[first : first + T]
        return self.wpe(cache.positions(T).clamp(min=0))  # padding has negative positions; no query sees it

    def _warn_of_dropout(self):
        if self.training and self.config.dropout and self.fused_kernels and not self._warned_of_dropout:
            self._warned_of_dropout = True
            warnings.warn(
                f"dropout={self.config.dropout} while training: attention runs in plain PyTorch, because the fused "
                "kernels have no dropout (evaluation and sampling use them; so does training with dropout=0)",
                stacklevel=3,
            )

    def split_sequences(self, group=None):
        """From now on, each process of a torch.distributed group passes its part of every sequence to `forward`.

        The parts are equal and in the order of the ranks. `forward` gives a part's logits and mean loss, its starts are
        those of the whole sequence, and all processes must call it, and backward. None: whole sequences again, as they
        always are with a cache. Raises ValueError for a model without the fused kernels, with dropout or with a prefix,
        and in a process outside the group.
        """
        attend, part, parts = sliding_gqa_attention, 0, 1
        if group is not None:
            if not self.fused_kernels or self.config.dropout:
                raise ValueError("sequences can be split in the fused kernels only, and they have no dropout")
            _refuse_prefix(self.config)
            from kernels.context_parallel import context_parallel_attention, place_in  # torch.distributed is optional

            _, part, parts = place_in(group)
            attend = functools.partial(context_parallel_attention, group=group)
        self.group, self.part, self.parts = group, part, parts
        for block in self.blocks:
            block.attn.attend, block.attn.parts = attend, self.parts

    def set_window(self, window, pattern=None, prefix=None):
        """Change the window of a trained model (None = all earlier keys), the pattern of layers that have it, and the
        prefix: the first positions, which are seen besides it. For the last two, None keeps what the model has.

        Any window works without training; one near the trained window works best. A model that was trained to see all
        earlier keys may need a prefix of some tokens besides a window (docs/sampling.md). A `KVCache` made before no
        longer fits. Raises ValueError for what `GPTConfig` does not take, and for a prefix where sequences are split.
        """
        pattern = self.config.window_pattern if pattern is None else pattern
        prefix = self.config.prefix if prefix is None else prefix
        config = dataclasses.replace(self.config, window=window, window_pattern=pattern, prefix=prefix)
        if self.group is not None:
            _refuse_prefix(config)
        self.config = config
        for layer, (block, rope) in enumerate(zip(self.blocks, ropes_of_layers(config), strict=True)):
            block.attn.window, block.attn.prefix = config.layer_window(layer), config.layer_prefix(layer)
            block.attn.prefix_distance, block.attn.rope = config.prefix_distance, rope

    def save_pretrained(self, directory, tokenizer=None):
        """Write a model directory: `model.save_pretrained`."""
        from .checkpoint import save_pretrained  # here, because checkpoint.py imports this module

        save_pretrained(self, directory, tokenizer)

    @classmethod
    def from_pretrained(cls, directory, **options):
        """The model of a model directory or of a run (its best, else its last), with its `tokenizer`.

        options are those of the function `model.from_pretrained`, which returns (model, tokenizer).
        """
        from .checkpoint import from_pretrained

        return from_pretrained(directory, **options)[0]

    def num_parameters(self) -> int:
        """Trainable parameters; tied weights count once."""
        return sum(p.numel() for p in self.parameters())


def _refuse_prefix(config):
    if any(map(config.layer_prefix, range(config.n_layer))):
        raise ValueError(
            f"prefix={config.prefix}, but split sequences have none: its keys are in the first process only"
        )


def flops_per_token(config) -> float:
    """Floating-point operations of training on one token, forward and backward; the basis of MFU (arXiv:2204.02311).

    6 for each weight of a matrix product, and the products of visible query-key pairs. Recomputed and masked products
    do not count.
    """
    C, D, T = config.d_model, config.head_dim, config.context_length
    weights = config.vocab_size * C
    if config.mlp in GATED:  # the gate is a third matrix
        weights += config.n_layer * C * config.mlp_width
    pairs = 0
    for layer in range(config.n_layer):
        weights += 2 * C * ((config.n_head + config.n_kv_head) * D + config.mlp_width)
        window, prefix = config.layer_window(layer), config.layer_prefix(layer)
        pairs += config.n_head * visible_pairs(T, T, window)
        if prefix and window < T:  # query window + i has i + 1 keys before its window
            pairs += config.n_head * visible_pairs(T - window, T - window, prefix)
    return 6 * weights + 3 * 4 * D * pairs / T
