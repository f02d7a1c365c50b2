"""Hugging Face's encoders, whose queries see later keys too, give on our attention what they give on their `eager`."""

import pytest
import torch
from hugging import BACKENDS, LENGTH, WINDOW, LargestTensor, equal, padding, tokens
from mixes import lively

from model.huggingface import register_attention

transformers = pytest.importorskip("transformers")

SLIDING, FULL = "sliding_attention", "full_attention"
SIZES = dict(
    vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=6,
    max_position_embeddings=400, bos_token_id=1, eos_token_id=1, pad_token_id=0, attn_implementation="eager",
)  # fmt: skip
GEMMA = dict(num_key_value_heads=2, head_dim=8)
LAYERS = {"layer_types": [SLIDING, FULL, SLIDING]}
T5GEMMA = dict(query_pre_attn_scalar=5, attn_logit_softcapping=2.0, sliding_window=WINDOW)


def modernbert(**changes):
    options = {"local_attention": 2 * WINDOW, "cls_token_id": 1, "sep_token_id": 1, **changes}
    return transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**SIZES, **options))


def embedding_gemma(**changes):
    options = {"query_pre_attn_scalar": 5, "sliding_window": 2 * WINDOW, "use_cache": False, **changes}
    config = transformers.Gemma3TextConfig(use_bidirectional_attention=True, **SIZES, **GEMMA, **LAYERS, **options)
    return transformers.Gemma3TextModel(config)


def t5gemma(model_class, **changes):
    parts = [transformers.T5GemmaModuleConfig(**SIZES, **GEMMA, **LAYERS, **{**T5GEMMA, **changes}) for _ in range(2)]
    whole = model_class is transformers.T5GemmaForConditionalGeneration
    options = {"is_encoder_decoder": whole, "vocab_size": 97, "attn_implementation": "eager"}
    return model_class(transformers.T5GemmaConfig(encoder=parts[0], decoder=parts[1], **options))


def t5gemma_encoder(**changes):
    return t5gemma(transformers.T5GemmaEncoderModel, **changes)


def embedding_gemma2(**changes):
    module = pytest.importorskip("transformers.models.embedding_gemma2.modeling_embedding_gemma2")
    options = {"layer_types": [FULL, SLIDING, FULL], "sliding_window": WINDOW, "global_head_dim": 16, **changes}
    options |= {"hidden_size_per_layer_input": 8, "embedding_dim": 8}
    config = module.EmbeddingGemma2TextConfig(**SIZES, **GEMMA, **options)
    return module.EmbeddingGemma2TextModel(config)


ENCODERS = {
    "ModernBERT": modernbert,
    "EmbeddingGemma": embedding_gemma,
    "T5Gemma's encoder": t5gemma_encoder,
    "EmbeddingGemma 2": embedding_gemma2,
}
every_encoder = pytest.mark.parametrize("name", ENCODERS)

DOCUMENTS = (10, 1, 3, 11)
POSITIONS = torch.cat([torch.arange(length) for length in DOCUMENTS])[None]
ENDS = torch.tensor([0, *DOCUMENTS]).cumsum(0).to(torch.int32)


@pytest.fixture(autouse=True, params=BACKENDS)
def registered(request):
    register_attention(backend=request.param)


def encoder(name, **changes):
    return lively(ENCODERS[name](**changes), scale=0.1).eval()


def results(model, implementation, inputs, counts=None, **options):
    """(numbers of each token that counts, {parameter: gradient of a loss over them})."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    output = model(inputs, **options)
    numbers = getattr(output, "logits", None)
    numbers = output.last_hidden_state if numbers is None else numbers
    numbers = numbers if counts is None else numbers[counts]
    numbers.square().sum().backward()
    return numbers.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(model, inputs, counts=None, **options):
    expected = results(model, "eager", inputs, counts, **options)
    equal(results(model, "sliding_gqa", inputs, counts, **options), expected)


def apart(model, documents):
    """(numbers (tokens of all documents, ...), gradients) of eager, one document (1, T) at a time."""
    parts = [results(model, "eager", document) for document in documents]
    return torch.cat([numbers[0] for numbers, _ in parts]), {
        name: sum(gradients[name] for _, gradients in parts) for name in parts[0][1]
    }


@every_encoder
def test_tokens_see_both_sides_as_in_eager(name, calls):
    model = encoder(name)
    same(model, tokens())
    assert calls == ["sliding_gqa_attention"] * 3
    same(model, tokens(length=WINDOW - 2))  # no mask is made for a sequence shorter than the window
    same(model, tokens(), attention_mask=padding())
    assert set(calls) == {"sliding_gqa_attention"}


@every_encoder
def test_padding_on_either_side_is_never_seen(name, calls):
    model = encoder(name)
    for mask in (padding(left=6), padding(right=6), padding(left=WINDOW + 9), padding(left=5, right=4)):
        inputs, counts = tokens(), mask.bool()
        rows = [row[None, is_token] for row, is_token in zip(inputs, counts, strict=True)]
        found = results(model, "sliding_gqa", inputs, counts, attention_mask=mask)
        equal(found, results(model, "eager", inputs, counts, attention_mask=mask))
        equal(found, apart(model, rows))
    assert set(calls) == {"sliding_gqa_attention"}


def test_embedding_gemma_may_fill_a_cache(calls):
    """As its configuration says by default."""
    model = encoder("EmbeddingGemma")
    same(model, tokens(), use_cache=True)
    same(model, tokens(), padding(left=6).bool(), attention_mask=padding(left=6), use_cache=True)
    assert set(calls) == {"sliding_gqa_attention"}


@every_encoder
def test_packed_documents_are_documents_by_themselves(name, calls):
    model, packed, whole = encoder(name), tokens(rows=1), torch.ones(1, LENGTH, dtype=torch.bool)
    expected = apart(model, packed.split(DOCUMENTS, dim=1))
    lengths = {"cu_seq_lens_q": ENDS, "cu_seq_lens_k": ENDS}
    forms = [{"position_ids": POSITIONS, **lengths}, lengths]  # rotary positions are relative
    if name in ("EmbeddingGemma", "T5Gemma's encoder"):  # the others do not tell their layers the positions
        forms.append({"position_ids": POSITIONS})
    for options in forms:
        equal(results(model, "sliding_gqa", packed, whole, **options), expected)
    assert set(calls) == {"sliding_gqa_attention"}


@every_encoder
def test_these_comparisons_detect_a_window_that_is_off_by_one(name, monkeypatch):
    from model.huggingface import attention

    model, inputs = encoder(name), tokens()
    expected = results(model, "eager", inputs)[0]
    fewer = dict(attention.ENCODERS)
    for change in (-1, 1):
        monkeypatch.setattr(attention, "ENCODERS", {kind: fewer[kind] + change for kind in fewer})
        assert (results(model, "sliding_gqa", inputs)[0] - expected).abs().max() > 2e-3


@every_encoder
def test_no_tensor_holds_all_pairs(name):
    length = 300
    model, inputs = encoder(name), tokens(length=length)
    mask = torch.ones_like(inputs)
    mask[1, :50] = 0
    ends = torch.tensor([0, 70, 140, length], dtype=torch.int32)
    model.set_attn_implementation("sliding_gqa")
    for rows, options in ((2, {}), (2, {"attention_mask": mask}), (1, {"cu_seq_lens_q": ends})):
        with torch.no_grad(), LargestTensor() as largest:
            model(inputs[:rows], **options)
        assert inputs.numel() < largest.elements < length**2


@every_encoder
def test_nothing_waits_for_values_on_a_device(name):
    """The meta device has none: reading one is an error."""
    model = encoder(name).to("meta")
    model.set_attn_implementation("sliding_gqa")
    inputs, mask, positions = tokens().to("meta"), padding(left=3).to("meta"), POSITIONS.to("meta").expand(2, -1)
    assert model(inputs, attention_mask=mask, position_ids=positions)[0].is_meta
    assert model(inputs[:1], attention_mask=mask[:1], cu_seq_lens_q=ENDS.to("meta"))[0].is_meta


@pytest.mark.parametrize("registered", ["auto"], indirect=True)
@pytest.mark.parametrize("name", ["ModernBERT", "EmbeddingGemma"])
def test_a_compiled_encoder_gives_the_same(name):
    """While a graph is captured neither the padding nor the functions that make a mask can be looked at."""
    model, inputs, mask = encoder(name), tokens(), padding(left=6)
    model.set_attn_implementation("sliding_gqa")
    torch._dynamo.reset()  # other tests compile the same functions, and recompilations are counted
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(inputs)[0], model(inputs)[0])
        found, expected = (module(inputs, attention_mask=mask)[0] for module in (compiled, model))
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()])
    torch._dynamo.reset()


@every_encoder
def test_the_users_own_mask_is_applied_unchanged(name, calls):
    model, inputs = encoder(name), tokens()
    seen = (torch.rand(2, 1, LENGTH, LENGTH) < 0.5) | torch.eye(LENGTH, dtype=torch.bool)
    numbers = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    model.set_attn_implementation("eager")
    expected = model(inputs, attention_mask=numbers)[0]
    model.set_attn_implementation("sliding_gqa")
    for mask in (numbers, seen):
        torch.testing.assert_close(model(inputs, attention_mask=mask)[0], expected, atol=2e-4, rtol=0)
    assert set(calls) == {"_masked_attention"}


def test_attention_dropout_sees_both_sides_too(calls):
    model, inputs, mask = encoder("ModernBERT", attention_dropout=1e-9), tokens(), padding(right=6)
    expected = results(model, "eager", inputs, mask.bool(), attention_mask=mask)
    with pytest.warns(UserWarning, match="attention runs in plain PyTorch"):
        equal(results(model.train(), "sliding_gqa", inputs, mask.bool(), attention_mask=mask), expected)
    assert set(calls) == {"_masked_attention"}


@pytest.mark.parametrize("length", [LENGTH, LENGTH - 6])
def test_t5gemma_runs_whole_and_its_decoder_sees_the_encoders_padding(length, calls):
    """One length makes the attention to the encoder look like the encoder's own."""
    model = lively(t5gemma(transformers.T5GemmaForConditionalGeneration), scale=0.1).eval()
    inputs, mask = tokens(), padding(right=6)
    options = {"attention_mask": mask, "decoder_input_ids": tokens(length=length), "use_cache": False}
    same(model, inputs, **options)
    assert sorted(calls) == ["_masked_attention"] * 3 + ["sliding_gqa_attention"] * 6

    def written(implementation):
        model.set_attn_implementation(implementation)
        return model.generate(inputs, attention_mask=mask, max_new_tokens=WINDOW + 5, do_sample=False)

    assert torch.equal(written("sliding_gqa"), written("eager"))


def test_masks_that_are_not_the_encoders_own_are_made_as_transformers_makes_them():
    from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
    from transformers.models.gemma3.modeling_gemma3 import _bidirectional_window_overlay

    embeddings, images = torch.zeros(2, LENGTH, 1), torch.arange(LENGTH)[None].expand(2, -1) // 5 % 2 - 1
    own = _bidirectional_window_overlay(WINDOW)
    longer = torch.cat([padding(left=4), padding(right=4)], dim=1)
    for make, classes, options in (
        (create_bidirectional_mask, "ModernBert", {"and_mask_function": lambda batch, head, q, kv: kv > 3}),
        (create_bidirectional_mask, "ModernBert", {"attention_mask": longer, "encoder_hidden_states": embeddings}),
        (create_causal_mask, "Gemma3Text", {}),
        (create_causal_mask, "Gemma3Text", {"or_mask_function": lambda batch, head, q, kv: kv < 3}),
        (create_causal_mask, "Gemma3Text", {"block_sequence_ids": images}),
        (create_causal_mask, "Gemma3Text", {"block_sequence_ids": images, "or_mask_function": own}),
    ):
        masks = []
        for name in ("sdpa", "sliding_gqa"):
            config = getattr(transformers, f"{classes}Config")(attn_implementation=name)
            config.use_bidirectional_attention = True
            given = dict(inputs_embeds=embeddings, attention_mask=padding(right=4), past_key_values=None)
            masks.append(make(config, **{**given, **options}))
        assert masks[0].shape[:3] == (2, 1, LENGTH) and torch.equal(*masks)


def test_what_cannot_be_done_is_refused_in_one_line():
    holes = padding()
    holes[1, 7] = 0
    bert = transformers.BertModel(transformers.BertConfig(**SIZES))
    for model, options, message in (
        (encoder("ModernBERT"), {"attention_mask": holes}, "attention_mask has zeros between ones in row 1: pad on"),
        (encoder("ModernBERT"), {"cu_seq_lens_q": ENDS}, "cu_seq_lens_q is for one row, and the batch has 2"),
        (encoder("EmbeddingGemma"), {"output_attentions": True}, "output_attentions: the weights are never computed"),
        (bert, {}, "BertSelfAttention looks at later tokens too, which this attention does for ModernBERT"),
    ):
        model.set_attn_implementation("sliding_gqa")
        with pytest.raises(ValueError, match=message) as error:
            model(tokens(), **options)
        assert "\n" not in str(error.value)
