"""`document_starts`: where the documents of packed rows and the padding of padded rows begin, as one tensor."""

import torch

from .checks import kind_of, whole_number


def document_starts(*, cu_seqlens=None, position_ids=None, attention_mask=None, document_ids=None, length=None):
    """(B, S) int32: for each position the first position of its document, as `sliding_gqa_attention` takes it.

    From one of these, or from several of one shape; then a document begins where any of them begins one.

    cu_seqlens      (N + 1,) integers: document n of one row is at cu_seqlens[n] .. cu_seqlens[n + 1] - 1 (flash-attn).
    position_ids    (B, S) or (S,) integers: a document begins wherever a position is not the one before, plus 1.
    attention_mask  (B, S) of 0 and 1 or of bools, 1 on tokens: each row has one run of ones, its document. A position
                    of padding is a document of its own: it sees itself, and no other sees it.
    document_ids    (B, S) or (S,) integers: neighbours with one number are one document.
    length          S for cu_seqlens. None reads cu_seqlens[-1], which waits for a GPU. Positions from cu_seqlens[-1] on
                    are one more document.

        position_ids    0 1 2 0 1 0 1 2        cu_seqlens  0 3 5 8
        starts          0 0 0 3 3 5 5 5

    The result lies on the device of what it is made from, and but for the length nothing waits for it. Raises
    ValueError for shapes and dtypes that do not fit. On a CPU also for cu_seqlens that do not begin at 0 or that
    decrease, and for a mask with zeros between ones; on a GPU, where values are not read, each run of ones is a
    document then.
    """
    starts = []
    if cu_seqlens is not None:
        starts.append(_of_cu_seqlens(cu_seqlens, length))
    elif length is not None:
        raise ValueError("length is for cu_seqlens only: the other arguments have one")
    if position_ids is not None:
        x = _rows("position_ids", position_ids)
        starts.append(_last_begin(x[:, 1:] != x[:, :-1] + 1, x))
    if document_ids is not None:
        x = _rows("document_ids", document_ids)
        starts.append(_last_begin(x[:, 1:] != x[:, :-1], x))
    if attention_mask is not None:
        starts.append(_of_mask(_rows("attention_mask", attention_mask)))
    if not starts:
        raise ValueError("document_starts needs cu_seqlens, position_ids, attention_mask or document_ids")
    result = starts[0]
    for other in starts[1:]:
        if other.shape[1] != result.shape[1] or (
            other.shape[0] != result.shape[0] and 1 not in (len(other), len(result))
        ):
            raise ValueError(
                f"the arguments are of shapes {tuple(result.shape)} and {tuple(other.shape)}, expected one"
            )
        result = torch.maximum(result, other)
    return result.contiguous()


def _integers(name, x, dimensions):
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{name} is {kind_of(x)}, expected a tensor of integers")
    if x.dim() != dimensions or x.is_floating_point() or x.is_complex():
        raise ValueError(f"{name} is {x.dtype} {tuple(x.shape)}, expected integers in {dimensions} dimensions")
    return x


def _rows(name, x):
    if isinstance(x, torch.Tensor) and x.dim() == 1:
        x = x[None]
    x = _integers(name, x, 2)
    return x.to(torch.uint8) if x.dtype == torch.bool else x


def _last_begin(begins, like):
    """The last position at or before each at which a document begins; begins (B, S - 1) says it of 1 .. S - 1."""
    B, S = like.shape
    position = torch.arange(S, dtype=torch.int32, device=like.device)
    starts = torch.zeros(B, S, dtype=torch.int32, device=like.device)
    starts[:, 1:] = position[1:] * begins
    return starts.cummax(1).values if S else starts


def _of_mask(mask):
    is_token = mask != 0
    if is_token.is_cpu and not torch.compiler.is_compiling():
        runs = is_token[:, :1].sum(1) + (is_token[:, 1:] & ~is_token[:, :-1]).sum(1)
        if (runs > 1).any():
            raise ValueError(f"attention_mask has zeros between ones in row {int((runs > 1).nonzero()[0])}")
    return _last_begin(~(is_token[:, 1:] & is_token[:, :-1]), mask)


def check_cu_seqlens(ends):
    """Raise ValueError unless ends are integers (N + 1,); on a CPU also unless they begin at 0 and do not decrease."""
    _integers("cu_seqlens", ends, 1)
    if len(ends) == 0:
        raise ValueError("cu_seqlens is empty, expected at least [0]")
    if ends.is_cpu and not torch.compiler.is_compiling() and (ends[0] != 0 or (ends[1:] < ends[:-1]).any()):
        raise ValueError(
            f"cu_seqlens is {ends.tolist()[:8]}, expected 0 and then the end of each document, none smaller"
        )


def _of_cu_seqlens(ends, length):
    check_cu_seqlens(ends)
    length = int(ends[-1]) if length is None else whole_number("length", length)
    position = torch.arange(length, dtype=ends.dtype, device=ends.device)
    document = torch.searchsorted(ends.contiguous(), position, right=True) - 1
    begin = ends[document.clamp(min=0)] * (document >= 0)
    return begin.to(torch.int32)[None]
