"""Rows that hold several documents: each document has the logits and gradients that it has alone."""

import pytest
import torch
from mixes import FIELDS, MIXES, every_mix, lively

from kernels import document_starts
from model import GPT, GPTConfig, KVCache

LENGTHS = [[1, 20, 9, 18], [48], [10, 10, 10, 18]]
every_path = pytest.mark.parametrize(
    "path",
    [{"backend": "auto"}, {"backend": "reference"}, {"fused_kernels": False}],
    ids=["auto", "reference", "plain"],
)


def packed(vocab_size=41):
    """tokens, targets and starts (3, 48) of the documents of LENGTHS; a document's last target does not count."""
    tokens, targets = torch.randint(vocab_size, (2, 3, 48))
    ends = [torch.tensor([0, *lengths]).cumsum(0) for lengths in LENGTHS]
    for row, end in enumerate(ends):
        targets[row, end[1:] - 1] = -1
    return tokens, targets, torch.cat([document_starts(cu_seqlens=end) for end in ends])


def documents():
    """(row, slice) of each document."""
    for row, lengths in enumerate(LENGTHS):
        end = 0
        for length in lengths:
            yield row, slice(end, end + length)
            end += length


@every_mix
@every_path
def test_a_packed_document_has_the_logits_and_gradients_that_it_has_alone(config, path):
    model = lively(GPT(config, **path)).double()
    tokens, targets, starts = packed()
    logits, loss = model(tokens, targets, starts=starts)
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    count = int((targets >= 0).sum())
    for row, part in documents():
        alone = model(tokens[row : row + 1, part])[0]
        torch.testing.assert_close(logits[row, part], alone[0], atol=1e-5, rtol=1e-5)
        wanted = targets[row, part]
        terms = -alone[0].log_softmax(-1).gather(1, wanted.clamp(min=0)[:, None])[:, 0]
        (terms[wanted >= 0].sum() / count).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", ["rope-window-gqa", "original", "pattern"])
def test_one_document_a_row_is_the_model_without_starts(name):
    for path in ({"backend": "auto"}, {"fused_kernels": False}):
        model = lively(GPT(MIXES[name], **path)).eval()
        tokens = torch.randint(41, (2, 48))
        starts = torch.zeros(2, 48, dtype=torch.int32)
        torch.testing.assert_close(model(tokens, starts=starts)[0], model(tokens)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:dropout")
def test_attention_with_dropout_stays_inside_a_document():
    model = lively(GPT(GPTConfig(**{**FIELDS, "window_pattern": "SL"}, dropout=0.3))).train()
    tokens, _, starts = packed()
    other = tokens.clone()
    other[:, 30:] = (other[:, 30:] + 1) % 41  # row 0: the last document
    results = []
    for changed in (tokens, other, tokens):
        torch.manual_seed(0)
        results.append(model(changed, starts=starts)[0])
    assert torch.equal(results[0][0, :30], results[1][0, :30]) and torch.equal(results[0], results[2])
    backwards = tokens.clone()
    backwards[0, :30] = (backwards[0, :30] + 1) % 41
    torch.manual_seed(0)
    assert torch.equal(model(backwards, starts=starts)[0][0, 30:], results[0][0, 30:])


@pytest.mark.parametrize("path", [{"backend": "auto"}, {"fused_kernels": False}], ids=["auto", "plain"])
def test_documents_work_under_torch_compile_as_one_graph(path):
    torch._dynamo.reset()  # what was compiled counts against a limit
    for name in ("rope-window-gqa", "learned window", "pattern"):
        model = lively(GPT(MIXES[name], **path))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        tokens, targets, starts = packed()
        expected = model(tokens, targets, starts=starts)[1]
        torch.testing.assert_close(compiled(tokens, targets, starts=starts)[1], expected)


@every_path
@pytest.mark.parametrize("name", ["rope", "original"])
def test_wrong_starts_are_refused_in_one_line(name, path):
    model = GPT(MIXES[name], **path)
    tokens, _, starts = packed()
    cache = KVCache(model.config, 3, max_new_tokens_per_call=48)
    for wrong, message in (
        (starts.long(), r"starts is torch.int64 \(3, 48\), expected torch.int32 \(3, 48\)"),
        (starts[:2], r"starts is torch.int32 \(2, 48\), expected"),
        (starts + 1, r"starts\[0, 0\] is 1, expected 0, a document's begin"),
        (starts.flip(1), r"starts\[0, 0\] is 30, expected 0"),
        (starts.tolist(), r"starts is a list, expected a tensor \(batch, length\)"),
    ):
        with pytest.raises(ValueError, match=f"^{message}") as raised:
            model(tokens, starts=wrong)
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match=r"^starts and a cache: "):
        model(tokens, cache=cache, starts=starts)
    assert cache.columns == 0
