"""Padded and packed batches of Hugging Face's models run on the kernels, without a mask of all pairs."""

import pytest
import torch
from hugging import (
    BACKENDS,
    LENGTH,
    WINDOW,
    LargestTensor,
    equal,
    every_family,
    family,
    generated,
    padding,
    refused,
    results,
    same,
    tokens,
)

from model.huggingface import attention as ours
from model.huggingface import register_attention

transformers = pytest.importorskip("transformers")

DOCUMENTS = (10, 1, 3, 11)
POSITIONS = torch.cat([torch.arange(length) for length in DOCUMENTS])[None]
LENGTHS = torch.tensor([0, *DOCUMENTS]).cumsum(0).to(torch.int32)
FORMS = {
    "positions": {"position_ids": POSITIONS},
    "lengths": {"cu_seq_lens_q": LENGTHS, "cu_seq_lens_k": LENGTHS},
    "both": {"position_ids": POSITIONS, "cu_seq_lens_q": LENGTHS},
    "with a cache": {"position_ids": POSITIONS, "use_cache": True},
    "with a mask": {"position_ids": POSITIONS, "attention_mask": torch.ones(1, LENGTH, dtype=torch.long)},
}


@pytest.fixture(autouse=True, params=BACKENDS)
def registered(request):
    register_attention(backend=request.param)


# for slow tests: the backend that trains
fused_only = pytest.mark.parametrize("registered", ["auto"], indirect=True)


def apart(model, packed, documents=DOCUMENTS):
    """(logits, gradients) of eager, one document at a time."""
    parts = [results(model, "eager", document) for document in packed.split(documents, dim=1)]
    return torch.cat([logits for logits, _ in parts], dim=1), {
        name: sum(gradients[name] for _, gradients in parts) for name in parts[0][1]
    }


@every_family
def test_padding_on_either_side_is_never_seen(name, calls):
    model = family(name)
    for mask in (padding(left=6), padding(right=6), padding(left=WINDOW + 9), padding(left=5, right=4)):
        same(model, tokens(), counts=mask.bool(), attention_mask=mask)
    assert set(calls) == {"sliding_gqa_attention"}


@every_family
def test_packed_documents_are_documents_by_themselves(name, calls):
    model, packed = family(name), tokens(rows=1)
    expected = apart(model, packed)
    for options in FORMS.values():
        equal(results(model, "sliding_gqa", packed, **options), expected)
    assert set(calls) == {"sliding_gqa_attention"}


def test_each_row_of_a_batch_has_its_own_documents_and_padding():
    """With a mask, transformers does not look at the positions."""
    model, inputs, mask = family("gemma2"), tokens(), padding(left=4)
    second = torch.cat([torch.zeros(4).long(), torch.arange(3, 15), torch.arange(3, 12)])  # need not begin at 0
    positions = torch.cat([POSITIONS, second[None]])
    model.set_attn_implementation("sliding_gqa")
    found = model(inputs, position_ids=positions, attention_mask=mask).logits
    torch.testing.assert_close(found[:1], apart(model, inputs[:1])[0], atol=2e-4, rtol=0)
    torch.testing.assert_close(found[1:, 4:], apart(model, inputs[1:, 4:], (12, 9))[0], atol=2e-4, rtol=0)
    model.set_attn_implementation("sliding_gqa")
    same(model, inputs, position_ids=positions)


def test_documents_may_begin_after_those_of_a_cache():
    model, packed = family("gpt_oss"), tokens(rows=1)
    expected, _ = apart(model, packed)
    model.set_attn_implementation("sliding_gqa")
    cache = transformers.DynamicCache(config=model.config)
    chunks = zip(packed.split((6, 19), dim=1), POSITIONS.split((6, 19), dim=1), strict=True)
    found = [model(chunk, position_ids=positions, past_key_values=cache).logits for chunk, positions in chunks]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=2e-4, rtol=0)


def test_positions_that_were_written_to_are_read_again():
    model, packed, positions = family("gpt_oss"), tokens(rows=1), torch.arange(LENGTH)[None]
    results(model, "sliding_gqa", packed, position_ids=positions)
    positions.copy_(POSITIONS)
    equal(results(model, "sliding_gqa", packed, position_ids=positions), apart(model, packed))


@pytest.mark.parametrize("name", ["mistral", "gpt_oss"])
def test_gradient_checkpointing_gives_the_same(name):
    model, packed = family(name), tokens(rows=1)
    expected = apart(model, packed)
    model.train().gradient_checkpointing_enable()
    equal(results(model, "sliding_gqa", packed, position_ids=POSITIONS), expected)


@fused_only
@every_family
def test_trainer_has_the_losses_of_eager(name, tmp_path):
    """On packed rows, ours; on the same documents padded on the right, eager's: it mixes packed ones in gpt-oss."""
    pytest.importorskip("accelerate")
    documents = [torch.randint(2, 97, (length,)) for length in (5, 12, 3, 9, 14, 7, 1, 20, 4, 16, 8, 11)]
    weights = family(name).state_dict()

    def losses(implementation, collator):
        model = family(name)
        model.load_state_dict(weights)
        model.set_attn_implementation(implementation)
        options = transformers.TrainingArguments(
            output_dir=tmp_path, max_steps=6, per_device_train_batch_size=4, logging_steps=1, learning_rate=1e-3,
            lr_scheduler_type="constant", report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        examples = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in documents]
        trainer = transformers.Trainer(model, options, train_dataset=examples, data_collator=collator)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    def padded(examples):
        rows = [torch.tensor(example["input_ids"]) for example in examples]
        # nothing predicts a document's first token: left out here too, it is not counted in any version of transformers
        labels = [torch.cat([torch.tensor([-100]), row[1:]]) for row in rows]
        together = {"batch_first": True, "padding_side": "right"}
        return {
            "input_ids": torch.nn.utils.rnn.pad_sequence(rows, **together),
            "labels": torch.nn.utils.rnn.pad_sequence(labels, padding_value=-100, **together),
            "attention_mask": torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], **together),
        }

    expected = losses("eager", padded)
    assert len(expected) == 6 and expected[-1] < expected[0]
    packed = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    for collator in (packed, transformers.DataCollatorWithFlattening(), padded):
        assert losses("sliding_gqa", collator) == pytest.approx(expected, rel=2e-3)


@fused_only
@every_family
def test_no_tensor_holds_all_pairs(name):
    length = 300
    model, inputs = family(name, max_position_embeddings=400), tokens(length=length)
    mask = torch.ones_like(inputs)
    mask[1, :50] = 0
    positions = torch.arange(length).remainder(70)[None]
    batches = {
        "plain": {},
        "padded": {"attention_mask": mask},
        "packed": {"position_ids": positions},
        "packed, with a cache": {"position_ids": positions, "use_cache": True},
        "into a static cache": {
            "attention_mask": mask,
            "past_key_values": transformers.StaticCache(model.config, max_cache_len=length + 5),
        },
    }
    model.set_attn_implementation("sliding_gqa")
    for batch, options in batches.items():
        with torch.no_grad(), LargestTensor() as largest:
            model(inputs, **{"use_cache": False, **options})
        assert inputs.numel() < largest.elements < length**2, batch


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_oss"])
def test_starts_are_made_once_a_forward_pass(name, monkeypatch):
    model, made = family(name), []
    make = ours.document_starts
    monkeypatch.setattr(ours, "document_starts", lambda **given: made.append(given) or make(**given))
    results(model, "sliding_gqa", tokens(), attention_mask=padding(left=3))
    kinds = len(set(getattr(model.config, "layer_types", ["all"])))
    assert len(made) == kinds
    made.clear()
    results(model, "sliding_gqa", tokens(rows=1), position_ids=POSITIONS, use_cache=True)
    assert len(made) == 1


@every_family
def test_nothing_waits_for_values_on_a_device(name):
    """The meta device has none: reading one is an error."""
    model = family(name, experts_implementation="batched_mm").to("meta")
    model.set_attn_implementation("sliding_gqa")
    inputs, mask, positions = tokens().to("meta"), padding(left=3).to("meta"), POSITIONS.to("meta").expand(2, -1)
    assert model(inputs, attention_mask=mask, position_ids=positions, use_cache=False).logits.is_meta
    cache = transformers.DynamicCache(config=model.config)
    assert model(inputs[:, :20], position_ids=positions[:, :20], past_key_values=cache).logits.is_meta
    assert model(inputs[:, :1], attention_mask=mask[:, :21], past_key_values=cache).logits.is_meta


@pytest.mark.parametrize("left", [0, 3, 9])
def test_chunks_are_documents(left, calls):
    """Llama 4 attends inside of chunks, which begin with the first token of each row."""
    classes = transformers.Llama4ForCausalLM, transformers.Llama4TextConfig
    model = family(
        classes,
        dict(attention_chunk_size=WINDOW, num_local_experts=2, intermediate_size_mlp=64, head_dim=8,
             layer_types=["chunked_attention", "full_attention", "chunked_attention"]),
        sliding_window=None,
    )  # fmt: skip
    inputs, mask = tokens(), padding(left=left)
    same(model, inputs, counts=mask.bool(), attention_mask=mask)
    expected = generated(model, "eager", inputs, attention_mask=mask)
    assert torch.equal(generated(model, "sliding_gqa", inputs, attention_mask=mask), expected)
    assert set(calls) == {"sliding_gqa_attention"}


def test_a_model_that_computes_with_its_mask_gets_one(calls):
    model = family((transformers.DogeForCausalLM, transformers.DogeConfig), dict(keep_window_size=WINDOW))
    mask = padding(left=6)
    same(model, tokens(), counts=mask.bool(), attention_mask=mask)
    same(model, tokens(rows=1), position_ids=POSITIONS)
    assert set(calls) == {"_masked_attention"}


def test_changes_of_the_causal_mask_are_made_as_transformers_makes_them():
    from transformers.masking_utils import create_causal_mask

    embeddings, images = torch.zeros(2, LENGTH, 1), torch.arange(LENGTH)[None].expand(2, -1) // 5 % 2 - 1
    for change in (
        {"block_sequence_ids": images},
        {"or_mask_function": lambda batch, head, q, kv: kv < 3},
        {"and_mask_function": lambda batch, head, q, kv: kv > 3},
    ):
        masks = [
            create_causal_mask(
                transformers.LlamaConfig(attn_implementation=name), embeddings, padding(right=4), None, **change
            )
            for name in ("sdpa", "sliding_gqa")
        ]
        assert masks[0].shape == (2, 1, LENGTH, LENGTH) and torch.equal(*masks)


def test_a_window_that_only_the_config_knows_is_not_applied(calls):
    """Llama's layers see all earlier keys, whatever sliding_window says."""
    same(family((transformers.LlamaForCausalLM, transformers.LlamaConfig), {}), tokens())
    assert set(calls) == {"_masked_attention"}


def test_layers_of_kinds_that_are_not_known_get_the_mask_of_transformers():
    from transformers.masking_utils import create_sliding_window_causal_mask

    masks = []
    for name in ("sdpa", "sliding_gqa"):
        config = transformers.MistralConfig(sliding_window=WINDOW, attn_implementation=name)
        config.layer_types = ["compressed_sparse_attention"] * config.num_hidden_layers
        masks.append(create_sliding_window_causal_mask(config, torch.zeros(1, LENGTH, 1), None, None, POSITIONS))
    assert masks[0].shape == (1, 1, LENGTH, LENGTH) and torch.equal(*masks)


def test_what_starts_cannot_say_is_refused_in_one_line():
    holes = padding()
    holes[1, 7] = 0
    refused("attention_mask has zeros between ones in row 1: pad on one side", family("mistral"), attention_mask=holes)
    refused("cu_seq_lens_q is for one row, and the batch has 2", family("mistral"), cu_seq_lens_q=LENGTHS)
