"""Ways to generate text with a model, one token after the other: ours, and others with the same weights.

A decoder starts with prompts (B, P) and then makes tokens, always the likeliest. `tokens` holds prompts and new tokens.
"""

import time
from abc import ABC, abstractmethod
from functools import lru_cache

import harness
import torch
import torch.nn.functional as F

from kernels import rope_tables
from kernels.band import visible_mask
from model import GPT, generate
from model.huggingface import to_huggingface
from model.sdpa import rotate

PREFILL_CHUNK = 256


class Decoder(ABC):
    longest_exact = None  # up to this many tokens it computes what the model computes; None: any number

    def __init__(self, model, prompt, room):
        """model: a `GPT` in evaluation mode; prompt (B, P); room: the most tokens that `take` makes in all."""
        self.model, self.tokens, self.room = model, prompt, room

    @abstractmethod
    def take(self, count):
        """Make `count` more tokens."""

    def seconds_a_token(self, count):
        """Make `count` more tokens; the mean time of one."""
        _synchronize(self.tokens.device)
        started = time.perf_counter()
        self.take(count)
        _synchronize(self.tokens.device)
        return (time.perf_counter() - started) / count


class Ours(Decoder):
    """model.generate: a ring of `window` slots a layer."""

    batch_invariant = False

    def __init__(self, model, prompt, room):
        super().__init__(model, prompt, room)
        options = {"prefill_chunk": PREFILL_CHUNK, "batch_invariant": self.batch_invariant}
        self.new = generate(model, prompt, room, temperature=0, **options)

    def take(self, count):
        made = [next(self.new) for _ in range(count)]
        self.tokens = torch.cat([self.tokens, torch.stack(made, dim=1)], dim=1)


class OursBatchInvariant(Ours):
    """The same, each row of the batch by itself: at batch 1 there is no difference."""

    batch_invariant = True


class Recompute(Decoder):
    """No cache: every token reads the last `window` tokens again, as minGPT's sampler does with its block.

    This loses what the layers carry over from before the window. An exact one would read n_layer times as many tokens.
    """

    def __init__(self, model, prompt, room):
        super().__init__(model, prompt, room)
        self.longest_exact = model.config.window or model.config.context_length

    @torch.no_grad()
    def take(self, count):
        for _ in range(count):
            logits, _ = self.model(self.tokens[:, -self.longest_exact :])
            self.tokens = torch.cat([self.tokens, logits[:, -1].argmax(dim=-1, keepdim=True)], dim=1)


class GrowingCache(Decoder):
    """Keys and values of every token, concatenated; attention is SDPA over the last `window` of them."""

    sliced = True  # keys before the window are cut off; False: they are masked

    def __init__(self, model, prompt, room):
        super().__init__(model, prompt, room)
        self.keys, self.values = [None] * model.config.n_layer, [None] * model.config.n_layer
        self.tables = rope_tables(
            prompt.shape[1] + room, model.config.rotated, theta=model.config.rope_theta, device=prompt.device
        )
        for chunk in prompt.split(PREFILL_CHUNK, dim=1):
            self.logits = self._read(chunk)

    def take(self, count):
        for _ in range(count):
            new = self.logits[:, -1].argmax(dim=-1, keepdim=True)
            self.tokens = torch.cat([self.tokens, new], dim=1)
            self.logits = self._read(new)

    @torch.no_grad()
    def _read(self, new):
        """Put new (B, T) into the cache; the logits after them."""
        model = self.model
        x = model.wte(new)
        for layer, block in enumerate(model.blocks):
            x = x + block.attn.proj(self._attend(layer, block.attn, block.ln_1(x)))
            x = x + block.mlp(block.ln_2(x))
        x = model.ln_f(x[:, -1:])
        return F.linear(x, model.wte.weight if model.config.tie_weights else model.lm_head.weight)

    def _attend(self, layer, attention, x):
        B, T, C = x.shape
        config = self.model.config
        kv_size = config.n_kv_head * config.head_dim
        q, k, v = (
            part.view(B, T, -1, config.head_dim).transpose(1, 2)
            for part in attention.qkv(x).split([C, kv_size, kv_size], dim=-1)
        )
        before = 0 if self.keys[layer] is None else self.keys[layer].shape[2]
        cos, sin = (table[before : before + T] for table in self.tables)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if before:
            k, v = torch.cat([self.keys[layer], k], dim=2), torch.cat([self.values[layer], v], dim=2)
        self.keys[layer], self.values[layer] = k, v
        window = config.layer_window(layer) or before + T
        if self.sliced or T > 1:  # both read prompts in the cheaper way
            k, v = k[:, :, -(window + T - 1) :], v[:, :, -(window + T - 1) :]
        S = k.shape[2]
        mask = visible_mask(T, S, window, x.device) if T > 1 or S > window else None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=k.shape[1] < q.shape[1])
        return out.transpose(1, 2).reshape(B, T, C)


class GrowingCacheMasked(GrowingCache):
    """The same with a mask, as in a model that passes the window to SDPA."""

    sliced = False


class HuggingFace(Decoder):
    """transformers' generate on the same weights in its StarCoder2, with its own sliding cache."""

    def __init__(self, model, prompt, room):
        super().__init__(model, prompt, room)
        from transformers import DynamicCache

        self.theirs = _starcoder2_of(model)
        self.cache = DynamicCache(config=self.theirs.config)
        with torch.no_grad():  # in chunks: the whole prompt would need a mask of P x P
            for chunk in prompt[:, :-1].split(PREFILL_CHUNK, dim=1):
                if chunk.shape[1]:
                    self.theirs(chunk, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.stamps = []

    def put(self, value):
        """`generate` calls this with the prompt and with every new token."""
        self.stamps.append(time.perf_counter())

    def end(self):
        """`generate` calls this at the end."""

    def take(self, count):
        self.stamps.clear()
        self.tokens = self.theirs.generate(
            self.tokens,
            attention_mask=torch.ones_like(self.tokens),
            max_new_tokens=count,
            do_sample=False,
            past_key_values=self.cache,
            pad_token_id=0,
            streamer=self if len(self.tokens) == 1 else None,  # generate streams single rows only
        )

    def seconds_a_token(self, count):
        """For a single row, without the time that generate takes before its first token."""
        seconds = super().seconds_a_token(count)
        first, last = self.stamps[1:2], self.stamps[-1:]
        return (last[0] - first[0]) / (count - 1) if count > 1 and first else seconds


@lru_cache(maxsize=1)
def _starcoder2_of(model):
    """The model in Hugging Face's class: one for all positions."""
    theirs = to_huggingface(model)
    theirs.config.max_position_embeddings = 10**6  # rotary positions do not end; a smaller number makes it warn
    return theirs


def _synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


DECODERS = {
    "ours": Ours,
    "ours, batch-invariant": OursBatchInvariant,
    "recompute": Recompute,
    "growing cache, cut": GrowingCache,
    "growing cache, mask": GrowingCacheMasked,
    "Hugging Face": HuggingFace,
}


def why_not(name, config):
    """Why the decoder of this name cannot run a model of this config, in a few words; None if it can."""
    return why_not_starcoder2(config) if name == "Hugging Face" else None


def why_not_starcoder2(config):
    """Why Hugging Face's StarCoder2 cannot be this config, in a few words; None if it can."""
    if missing := harness.not_installed("transformers"):
        return missing
    windows = {config.layer_window(layer) for layer in range(config.n_layer)}
    if config.positions != "rope" or len(windows) > 1 or config.rotated != config.head_dim or config.rope_scaling:
        return "StarCoder2 has rotary positions over the whole head, and one window for all layers"
    return None


@torch.no_grad()
def objection(decoder_class, model, batch_size, tolerance, count=12):
    """What the plain model without a cache finds wrong in a decoder's tokens, in a few words; None for nothing.

    Every token must be the likeliest after those before it, up to `tolerance` of its logit: rounding may break a tie.
    The prompt is longer than the window, unless the decoder is not exact for such prompts.
    """
    config, device = model.config, model.wte.weight.device
    window = config.window or config.context_length
    length = window + 37
    generator = torch.Generator(device).manual_seed(1)
    prompt = torch.randint(config.vocab_size, (batch_size, length), generator=generator, device=device)
    exact = decoder_class(model, prompt[:, :1], 1).longest_exact
    if exact is not None:
        count = max(1, min(count, exact // 2))
        prompt = prompt[:, : max(1, exact - count)]
    decoder = decoder_class(model, prompt, count)
    decoder.take(count)
    tokens = decoder.tokens
    if tokens.shape != (batch_size, prompt.shape[1] + count) or not torch.equal(tokens[:, : prompt.shape[1]], prompt):
        return f"made tokens of shape {tuple(tokens.shape)} from {tuple(prompt.shape)}, or changed the prompt"
    plain = GPT(config, fused_kernels=False).to(model.wte.weight)
    plain.load_state_dict(model.state_dict())
    logits = plain.eval()(tokens)[0][:, prompt.shape[1] - 1 : -1].float()
    taken = logits.gather(2, tokens[:, prompt.shape[1] :, None]).squeeze(2)
    short = (logits.max(dim=-1).values - taken).max().item()
    return None if short <= tolerance else f"chose a token whose logit is {short:.2g} below the largest"
