"""One token a row on a GPU: the model's step captured as a CUDA graph, then replayed.

A step of decoding is dozens of short kernels, which a host launches more slowly than a GPU runs them. Nothing in the
step depends on the host (positions are read from the cache's `lengths`), so one graph serves every token: the host
writes the tokens into its input and launches the whole. It is captured anew when a tensor that it reads is replaced:
the tables of angles, which double as the text grows.

    step = GraphStep(model, cache)        # where why_not(model, cache) is None
    logits = step(tokens)                 # (B,) -> (B, V), overwritten by the next step
"""

import torch

from kernels import resolve_backend

from .token_step import what_else

WARM_UPS = 3  # runs before the capture: Triton compiles its kernels, cuBLAS allocates its workspace


def why_not(model, cache):
    """Why a graph would not do what the model does, in a few words; None if it would."""
    if model.wte.weight.device.type != "cuda":
        return "the model is not on a CUDA device"
    if model.fused_kernels and resolve_backend(model.blocks[0].attn.backend, "cuda")[0] == "reference":
        return "the reference reads lengths on the host"
    if torch.is_autocast_enabled("cuda"):
        return "under autocast a graph would read copies of the weights that autocast gives back at its end"
    if reason := what_else(model):
        return reason
    if cache.lengths.numel() == 0:
        return "there are no rows"
    return None


class GraphStep:
    """Steps of a model in evaluation mode, with the weights that it has now; changes in place are seen."""

    def __init__(self, model, cache):
        self.model, self.cache = model, cache
        self.rope = model.blocks[0].attn.rope
        self.tokens = torch.zeros(len(cache.lengths), 1, dtype=torch.long, device=cache.lengths.device)
        self.graph = self.tables = None

    @torch.no_grad()
    def __call__(self, tokens):
        """The logits (B, V) after one more token of each row, tokens (B,)."""
        cache = self.cache
        cache.check_room(1, self.model.config)
        tables = None if self.rope is None else self.rope(cache.columns + 1, cache.lengths.device)
        self.tokens.copy_(tokens[:, None])
        if self.graph is None or tables is not self.tables:
            self._capture()
            self.tables = tables
        self.graph.replay()
        cache.columns += 1  # lengths, on the device, are counted by the graph
        return self.logits

    def _capture(self):
        """Record the step. What the warm-ups write is the step's own token, into the slots where it belongs."""
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
        cache.columns = columns  # a capture runs nothing, so lengths are as they were
        self.graph = graph

    def _forward(self):
        return self.model(self.tokens, cache=self.cache)[0][:, -1]
