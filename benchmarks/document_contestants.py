"""The contestants of attn_speed.py --documents: ways to attend inside of each document of a row.

"ours without starts" ignores the documents, which shows what they cost. A loop calls its function for each document.
"""

import torch
import torch.nn.functional as F
from attn_contestants import CONTESTANTS, Contestant

from kernels import sliding_gqa_attention
from kernels.band import visible_mask

MEAN_LENGTH, SIGMA = 300, 1.0  # tokens, and of the logarithm of a length


def document_lengths(T, mean=MEAN_LENGTH, seed=0):
    """Lengths of documents that fill T tokens, from a log-normal distribution; the last one is cut off."""
    generator, lengths = torch.Generator().manual_seed(seed), []
    middle = torch.tensor(float(mean)).log() - SIGMA**2 / 2
    while (left := T - sum(lengths)) > 0:
        length = (middle + SIGMA * torch.randn((), generator=generator)).exp()
        lengths.append(min(left, max(1, round(float(length)))))
    return tuple(lengths)


def ours_without_starts(problem):
    return lambda q, k, v: sliding_gqa_attention(q, k, v, problem.window)


def ours_in_a_loop(problem):
    return _loop(problem, lambda q, k, v: sliding_gqa_attention(q, k, v, problem.window))


def sdpa_in_a_loop(repeated):
    def prepare(problem):
        lengths = set(problem.lengths)
        masks = {n: visible_mask(n, n, problem.window, problem.device) for n in lengths if n > (problem.window or n)}

        def attend(q, k, v):
            if repeated and problem.group > 1:
                k, v = (x.repeat_interleave(problem.group, dim=1) for x in (k, v))
            mask = masks.get(q.shape[2])
            grouped = not repeated and problem.group > 1
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)

        return _loop(problem, attend)

    return prepare


def _loop(problem, attend):
    return lambda q, k, v: torch.cat([attend(*(x[:, :, place] for x in (q, k, v))) for place in problem.places], dim=2)


def nested(problem):
    offsets = torch.tensor([0, *problem.lengths], device=problem.device).cumsum(0)

    def attend(q, k, v):  # wants (all tokens, heads, D)
        k, v = (x.repeat_interleave(problem.group, dim=1) for x in (k, v))
        q, k, v = (
            torch.nested.nested_tensor_from_jagged(x[0].transpose(0, 1), offsets).transpose(1, 2) for x in (q, k, v)
        )
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).values().transpose(0, 1)[None]

    return attend


def nested_why_not(problem):
    if problem.device.type != "cuda":
        return "PyTorch has no causal attention of nested tensors on a CPU"
    if problem.B > 1:
        return "it takes one row"
    return None if problem.window is None else "it has no window"


DOCUMENT_CONTESTANTS = {
    "ours": CONTESTANTS["ours"],
    "ours without starts": Contestant({"": ours_without_starts}, in_documents=False),
    "ours in a loop": Contestant({"": ours_in_a_loop}),
    "SDPA in a loop": Contestant(
        {"grouped heads": sdpa_in_a_loop(repeated=False), "repeated heads": sdpa_in_a_loop(repeated=True)}
    ),
    "SDPA masked": CONTESTANTS["SDPA masked"],
    "nested tensors": Contestant({"": nested}, nested_why_not),
    "FlexAttention": CONTESTANTS["FlexAttention"],
}
