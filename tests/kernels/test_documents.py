"""Where documents begin, from each of the ways in which people have it, and attention that stays inside them."""

import pytest
import torch

from kernels import document_starts, sliding_gqa_attention

STARTS = torch.tensor([[0, 0, 0, 3, 3, 5, 5, 5]], dtype=torch.int32)


@pytest.mark.parametrize(
    "arguments",
    [
        {"cu_seqlens": [0, 3, 5, 8]},
        {"cu_seqlens": [0, 3, 3, 5, 8, 8]},  # empty documents
        {"position_ids": [0, 1, 2, 0, 1, 0, 1, 2]},
        {"position_ids": [[7, 8, 9, 3, 4, 1, 2, 3]]},
        {"document_ids": [4, 4, 4, 1, 1, 4, 4, 4]},
        {"document_ids": [0, 0, 0, 1, 1, 1, 1, 1], "position_ids": [0, 1, 2, 3, 4, 0, 1, 2]},
    ],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_every_form_gives_the_same_starts(arguments, dtype):
    arguments = {name: torch.tensor(values, dtype=dtype) for name, values in arguments.items()}
    starts = document_starts(**arguments)
    assert starts.dtype == torch.int32 and starts.is_contiguous()
    assert torch.equal(starts, STARTS)


def test_a_length_leaves_the_rest_of_the_row_to_one_more_document():
    assert torch.equal(document_starts(cu_seqlens=torch.tensor([0, 3, 5]), length=8), STARTS)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_each_position_of_padding_is_a_document(dtype):
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=dtype)
    expected = [[0, 1, 2, 2, 2], [0, 0, 0, 3, 4], [0, 1, 2, 3, 4], [0, 0, 0, 0, 0]]
    assert document_starts(attention_mask=mask).tolist() == expected


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_empty_batches_have_empty_starts(shape):
    zeros = torch.zeros(shape, dtype=torch.int64)
    for name in ("position_ids", "attention_mask", "document_ids"):
        assert document_starts(**{name: zeros}).shape == shape


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "needs cu_seqlens, position_ids, attention_mask or document_ids"),
        ({"position_ids": [0, 1]}, "position_ids is a list, expected a tensor of integers"),
        ({"position_ids": torch.zeros(2, 3)}, "position_ids is torch.float32 \\(2, 3\\), expected integers in 2"),
        ({"cu_seqlens": torch.zeros(2, 3).long()}, "cu_seqlens is torch.int64 \\(2, 3\\), expected integers in 1"),
        (
            {"cu_seqlens": torch.tensor([1, 4])},
            "cu_seqlens is \\[1, 4\\], expected 0 and then the end of each document",
        ),
        ({"cu_seqlens": torch.tensor([0, 4, 2])}, "expected 0 and then the end of each document, none smaller"),
        ({"cu_seqlens": torch.tensor([]).long()}, "cu_seqlens is empty, expected at least \\[0\\]"),
        ({"document_ids": torch.tensor([1]), "length": 1}, "length is for cu_seqlens only"),
        ({"attention_mask": torch.tensor([[1, 1], [1, 0]]).repeat(1, 2)}, "has zeros between ones in row 1"),
        (
            {"document_ids": torch.tensor([1, 2]), "position_ids": torch.tensor([0, 1, 2])},
            "the arguments are of shapes \\(1, 3\\) and \\(1, 2\\), expected one",
        ),
    ],
)
def test_what_gives_no_starts_is_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        document_starts(**arguments)
    assert "\n" not in str(error.value)


def test_starts_are_made_inside_a_full_graph():
    make = torch.compile(lambda ids: document_starts(position_ids=ids), fullgraph=True, backend="eager")
    assert torch.equal(make(torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]])), STARTS)


@pytest.mark.parametrize("window", [None, 1, 2, 50, (2, 1), (None, None), (-1, 2), (0, None)])
def test_a_packed_row_is_its_documents_one_by_one(window):
    q, k, v = (torch.randn(1, H, 8, 16, dtype=torch.float64) for H in (4, 2, 2))
    out, lse = sliding_gqa_attention(q, k, v, window, starts=STARTS, return_lse=True, backend="reference")
    for part in (slice(0, 3), slice(3, 5), slice(5, 8)):
        alone = sliding_gqa_attention(*(x[:, :, part] for x in (q, k, v)), window, return_lse=True, backend="reference")
        torch.testing.assert_close((out[:, :, part], lse[:, :, part]), alone)


@pytest.mark.parametrize(
    "starts, message",
    [
        ([[0] * 8], "starts is a list, expected a tensor \\(batch, length\\): see document_starts"),
        (STARTS.long(), "starts is torch.int64 \\(1, 8\\), expected torch.int32 \\(1, 8\\)"),
        (STARTS[:, 1:], "starts is torch.int32 \\(1, 7\\), expected torch.int32 \\(1, 8\\)"),
        (STARTS.to("meta"), "starts is on meta, q is on cpu: move it"),
        (STARTS - STARTS.flip(1), "starts\\[0, 0\\] is -5, expected 0, a document's begin"),
        (STARTS.flip(1), "starts\\[0, 0\\] is 5, expected 0"),
        (STARTS + STARTS, "starts\\[0, 3\\] is 6, expected 3, a document's begin or 0, its neighbour's"),
    ],
)
def test_wrong_starts_are_refused_in_one_line(starts, message):
    q, k, v = (torch.randn(1, H, 8, 16) for H in (4, 2, 2))
    with pytest.raises(ValueError, match=message) as error:
        sliding_gqa_attention(q, k, v, 3, starts=starts)
    assert "\n" not in str(error.value)
