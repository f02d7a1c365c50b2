"""Exported directories in transformers: the same logits, the same text, and the way back."""

import dataclasses

import pytest
import torch
from hugging import CHARACTERS, TEXT
from mixes import MIXES, lively

from model import GPT, ByteTokenizer, CharTokenizer, SubwordTokenizer, generate
from model.huggingface import export_pretrained, from_huggingface, import_pretrained
from model.sampling import sample

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")


def their_logits(directory, tokens):
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(directory)(tokens).logits


def our_logits(gpt, tokens):
    with torch.no_grad():
        return gpt.eval()(tokens)[0]


@pytest.mark.parametrize("name", ["original", "rope", "rope-window-gqa", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exported_directory_loads_in_transformers(name, dtype, tmp_path):
    gpt = lively(GPT(MIXES[name])).to(dtype)
    tokenizer = CharTokenizer("\n" + "".join(map(chr, range(40, 80))))
    export_pretrained(gpt, tmp_path, tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == dtype
    tokens = torch.randint(41, (2, 40))
    if dtype == torch.float32:
        logits = their_logits(tmp_path, tokens)[..., :41]  # the pad token has one more
        torch.testing.assert_close(logits, our_logits(gpt, tokens), atol=1e-4, rtol=0)
    back, read = import_pretrained(tmp_path)
    assert back.config == gpt.config and read.stoi == tokenizer.stoi
    assert all(torch.equal(back.state_dict()[key], value) for key, value in gpt.state_dict().items())


@pytest.mark.parametrize("name", ["original", "rope-window-gqa"])
def test_autotokenizer_reads_every_character_of_an_exported_vocabulary(name, tmp_path):
    """Without tokenizer_config.json it would take the architecture's usual class, which drops spaces."""
    export_pretrained(GPT(MIXES[name]), tmp_path, CHARACTERS)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXT)["input_ids"] == CHARACTERS.encode(TEXT)
    assert theirs.decode(CHARACTERS.encode(TEXT)) == TEXT
    assert theirs.eos_token is None
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.bos_token_id is None and config.eos_token_id is None  # else `generate` would stop at some character


def test_transformers_generates_our_tokens_from_an_exported_directory(tmp_path):
    gpt = lively(GPT(MIXES["rope-window-gqa"])).eval()
    export_pretrained(gpt, tmp_path)
    prompt = torch.randint(41, (1, 4))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    written = theirs.generate(prompt, max_new_tokens=80, do_sample=False)  # past the window, and the context
    assert torch.equal(written, sample(gpt, prompt, 80))


@pytest.mark.parametrize("kind", ["original", "rope-window-gqa", "untied", "spare tokens", "bytes"])
def test_a_batched_pipeline_writes_what_we_write(kind, tmp_path):
    """With prompts of different lengths, and characters that a pad token must not take away."""
    tokenizer = ByteTokenizer() if kind == "bytes" else CharTokenizer("\n" + "".join(map(chr, range(40, 80))))
    size = {"spare tokens": 48}.get(kind, tokenizer.vocab_size)
    gpt = lively(GPT(dataclasses.replace(MIXES.get(kind, MIXES["rope-window-gqa"]), vocab_size=size))).eval()
    export_pretrained(gpt, tmp_path, tokenizer)
    prompts = ["ABC", "O\nNM(", "L"]
    pipeline = transformers.pipeline("text-generation", model=str(tmp_path))
    written = pipeline(prompts, batch_size=3, max_new_tokens=30, do_sample=False)
    for prompt, [text] in zip(prompts, written, strict=True):
        tokens = torch.stack(list(generate(gpt, prompt, 30, greedy=True, tokenizer=tokenizer)))[:, 0].tolist()
        tokens = tokens[: tokens.index(255)] if 255 in tokens else tokens  # <|endoftext|> ends their text
        assert text["generated_text"] == prompt + tokenizer.decode(tokens)
    back, read = import_pretrained(tmp_path)
    assert back.config == gpt.config and read.to_json() == tokenizer.to_json()
    assert all(torch.equal(back.state_dict()[key], value) for key, value in gpt.state_dict().items())
    resaved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert from_huggingface(resaved).config == gpt.config


def test_subwords_without_an_end_of_text_get_a_pad_token_and_lose_it_again(tmp_path):
    library = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    tokenizer = SubwordTokenizer(library.to_str())
    export_pretrained(GPT(dataclasses.replace(MIXES["rope"], vocab_size=3)), tmp_path, tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(["ab", "aabb"], padding=True)["input_ids"] == [[3, 3, 2], [0, 2, 1]]
    gpt, back = import_pretrained(tmp_path)
    assert (gpt.config.vocab_size, back.vocab_size, back.encode("aabb")) == (3, 3, [0, 2, 1])
