"""Rows of documents for the tests, from the documents' lengths."""

import torch

from kernels import document_starts


def starts_of(rows, device="cpu"):
    """`starts` (B, S) int32 of the lengths of the documents of each row."""
    ends = [torch.tensor([0, *row], device=device).cumsum(0) for row in rows]
    return torch.cat([document_starts(cu_seqlens=row) for row in ends])
