"""Model directories of transformers in and out: weights in one file or several, the tokenizer, and what is refused."""

import json
import resource
import shutil
import signal
import sys

import pytest
import torch
from hugging import CHARACTERS
from mixes import MIXES, lively
from safetensors.torch import load_file, save_file

import model.huggingface
from model import (
    GPT,
    from_pretrained,
    load_tokenizer,
    save_pretrained,
)
from model.checkpoint import checksums
from model.huggingface import export_pretrained, from_huggingface, import_pretrained
from model.huggingface.__main__ import main
from model.sample import main as sample_command
from model.sampling import sample

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WRITTEN = ("config.json", "model.safetensors")
SUBWORDS = [
    "the play is the thing ",
    "wherein I'll catch ",
    "the conscience of the king\n",
    "h\u00e9 \u2014 \U0001f600 ",
]


@pytest.fixture
def starcoder2(tmp_path):
    """A directory that transformers wrote, with characters for a tokenizer."""
    config = transformers.Starcoder2Config(
        vocab_size=CHARACTERS.vocab_size, hidden_size=24, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, sliding_window=5, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    lively(transformers.Starcoder2ForCausalLM(config)).save_pretrained(tmp_path / "theirs")
    CHARACTERS.save(tmp_path / "theirs")
    return tmp_path / "theirs"


@pytest.fixture(scope="module")
def subwords(tmp_path_factory):
    """tokenizer.json of a byte-level BPE such as GPT-2's."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(SUBWORDS * 3, trainer)
    path = tmp_path_factory.mktemp("subwords") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture
def gpt2(tmp_path, subwords):
    """A GPT-2 directory with subwords."""
    config = transformers.GPT2Config(
        vocab_size=300, n_positions=24, n_embd=24, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    lively(transformers.GPT2LMHeadModel(config)).save_pretrained(tmp_path / "gpt2")
    shutil.copy(subwords, tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.mark.parametrize("direction", ["import", "export"])
def test_a_full_disk_is_one_line_and_leaves_no_directory(direction, starcoder2, tmp_path, capsys):
    assert command(capsys, "import", starcoder2, tmp_path / "ours")[0] == 0
    source = {"import": starcoder2, "export": tmp_path / "ours"}[direction]
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))  # a write past it fails as on a full disk
        status, out, err = command(capsys, direction, source, tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    message = f"python -m model.huggingface: error: {tmp_path}/new cannot be written: File too large"
    assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith(message)
    assert not (tmp_path / "new").exists()


def test_a_damaged_checkpoint_is_not_exported(tmp_path, capsys):
    save_pretrained(GPT(MIXES["rope"]), tmp_path / "ours")
    (tmp_path / "ours" / "SHA256SUMS").write_text(checksums({name: tmp_path / "ours" / name for name in WRITTEN}))
    assert command(capsys, "export", tmp_path / "ours", tmp_path / "back")[0] == 0
    weights = bytearray((tmp_path / "ours" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "ours" / "model.safetensors").write_bytes(weights)
    status, _, err = command(capsys, "export", tmp_path / "ours", tmp_path / "again")
    assert status == 2 and "ours/model.safetensors is not what was written" in err and not (tmp_path / "again").exists()


def test_shards_are_one_model(starcoder2, tmp_path):
    whole = from_huggingface(starcoder2)
    transformers.AutoModelForCausalLM.from_pretrained(starcoder2).save_pretrained(
        tmp_path / "shards", max_shard_size="10KB"
    )
    names = sorted(path.name for path in (tmp_path / "shards").glob("model*"))
    assert len(names) > 3 and "model.safetensors" not in names
    assert all(
        torch.equal(tensor, whole.state_dict()[name])
        for name, tensor in from_huggingface(tmp_path / "shards").state_dict().items()
    )
    (tmp_path / "shards" / names[1]).unlink()
    with pytest.raises(ValueError, match=rf"shards has no {names[1]}, which model.safetensors.index.json names$"):
        from_huggingface(tmp_path / "shards")


def test_old_files_without_the_prefix_and_with_the_causal_masks_are_read(gpt2):
    """So is GPT-2's own file on the hub."""
    expected = from_huggingface(gpt2).state_dict()
    weights = load_file(gpt2 / "model.safetensors")
    weights = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    masks = {f"h.{i}.attn.bias": torch.ones(24, 24).tril()[None, None] for i in range(2)}
    save_file({**weights, **masks, "h.0.attn.masked_bias": torch.tensor(-1e4)}, gpt2 / "model.safetensors")
    read = from_huggingface(str(gpt2)).state_dict()
    assert read.keys() == expected.keys() and all(torch.equal(read[name], expected[name]) for name in read)


def test_configs_of_transformers_4_are_read(starcoder2):
    config = json.loads((starcoder2 / "config.json").read_text())
    del config["rope_parameters"], config["tie_word_embeddings"], config["dtype"]
    for more, theta, scaling in (
        ({}, 10000.0, None),
        ({"rope_theta": 999999.4}, 999999.4, None),
        ({"rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 4.0}}, 5e4, ("linear", 4.0)),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, 1e4,
         ("yarn", {"factor": 2.0, "original_max_position_embeddings": 32})),
    ):  # fmt: skip
        (starcoder2 / "config.json").write_text(json.dumps({**config, **more}))
        read = from_huggingface(starcoder2).config
        assert (read.rope_theta, read.rope_scaling, read.tie_weights) == (theta, scaling, True)


def command(capsys, *arguments):
    """(exit status, standard output, standard error)."""
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as stopped:
        status = stopped.code
    return status, *capsys.readouterr()


@pytest.fixture
def neither_is_installed(monkeypatch):
    """`import transformers` and `import tokenizers` fail."""
    for name in ("transformers", "tokenizers"):
        monkeypatch.setitem(sys.modules, name, None)


def test_the_commands_there_and_back_need_no_transformers(starcoder2, tmp_path, capsys, neither_is_installed):
    status, out, err = command(capsys, "import", starcoder2, tmp_path / "ours")
    assert (status, err) == (0, "")
    gpt, tokenizer = from_pretrained(tmp_path / "ours")
    assert tokenizer.stoi == CHARACTERS.stoi
    assert f"{tmp_path}/ours: rope-window-gqa, {gpt.num_parameters():,} parameters, 40 tokens" in out
    assert f"python -m model.sample --checkpoint {tmp_path}/ours" in out
    assert f"python -m train --fused-kernels --init-from {tmp_path}/ours" in out
    status, out, err = command(capsys, "export", "--no-pad-token", tmp_path / "ours", tmp_path / "back")
    assert (status, err) == (0, "") and "AutoTokenizer.from_pretrained" in out
    there, back = (load_file(path / "model.safetensors") for path in (starcoder2, tmp_path / "back"))
    assert there.keys() == back.keys() and all(torch.equal(there[name], back[name]) for name in there)
    assert (tmp_path / "back" / "tokenizer.json").read_text() == (starcoder2 / "tokenizer.json").read_text()


def test_a_run_directory_exports_its_best_checkpoint(tmp_path, capsys):
    gpt = GPT(MIXES["rope"])
    save_pretrained(gpt, tmp_path / "run" / "best")
    save_pretrained(GPT(MIXES["original"]), tmp_path / "run" / "last")
    assert command(capsys, "export", tmp_path / "run", tmp_path / "theirs")[0] == 0
    assert from_huggingface(tmp_path / "theirs").config == gpt.config


def test_a_missing_package_is_named(gpt2, neither_is_installed):
    with pytest.raises(ValueError, match=r"tokenizer.json cannot be read: .* pip install tokenizers"):
        import_pretrained(gpt2)
    with pytest.raises(ImportError, match=r"to_huggingface needs transformers: pip install 'transformers"):
        model.huggingface.to_huggingface(GPT(MIXES["rope"]))
    with pytest.raises(ImportError, match=r"register_attention needs transformers: pip install 'transformers"):
        model.huggingface.register_attention()


def test_an_imported_model_generates_with_subwords(gpt2, tmp_path, capsys):
    assert command(capsys, "import", gpt2, tmp_path / "ours")[0] == 0
    prompt = "the king \u2014 "
    flags = ["--checkpoint", str(tmp_path / "ours"), "--prompt", prompt, "--max-new-tokens", "60", "--greedy"]
    assert sample_command(flags) == 0
    gpt, tokenizer = from_pretrained(tmp_path / "ours")
    written = sample(gpt, torch.tensor([tokenizer.encode(prompt)]), 60)[0].tolist()
    whole = tokenizer.decode(written)
    assert "\ufffd" in whole  # a random model does not write whole characters
    shown = capsys.readouterr().out.removesuffix("\n")
    assert shown.startswith(prompt) and whole.startswith(shown.rstrip("\ufffd"))
    assert len(whole) - len(shown) <= 4  # what is missing is a character that is not yet whole


def test_streamed_subwords_become_characters_as_soon_as_they_are_complete(subwords):
    tokenizer = load_tokenizer(subwords.parent)
    text = "the \U0001f600 of the k\u00e9\n\u2014<|endoftext|>the"
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text and tokenizer.end_of_text == 0 in tokens
    assert tokenizer.decode(torch.tensor(tokens)) == text
    pieces = list(tokenizer.stream(iter(tokens[3:]), tokens[:3]))
    assert len(pieces) == len(tokens) - 3 and "" in pieces  # one token is no character yet
    assert tokenizer.decode(tokens[:3]) + "".join(pieces) == text
    assert tokenizer.vocab_size == 300


def test_the_space_between_prompt_and_continuation_is_kept(tmp_path):
    """Unigram vocabularies mark spaces, and drop the first one of a text."""
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.Unigram([("<unk>", 0.0), ("\u2581to", -1.0), ("\u2581be", -1.0)], 0)
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    read = load_tokenizer(tmp_path)
    prompt = read.encode("to be")
    assert "".join(read.stream(iter(prompt), prompt)) == " to be"


def test_import_and_export_keep_the_tokenizer_and_its_end_of_text(gpt2, subwords, tmp_path):
    gpt, tokenizer = import_pretrained(gpt2)
    save_pretrained(gpt, tmp_path / "ours", tokenizer)
    export_pretrained(*from_pretrained(tmp_path / "ours")[:1], tmp_path / "back", load_tokenizer(tmp_path / "ours"))
    for place in ("ours", "back"):
        assert (tmp_path / place / "tokenizer.json").read_text() == subwords.read_text()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    text = "".join(SUBWORDS)
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text and theirs.eos_token_id == 0
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").generation_config.eos_token_id == 0


def test_a_model_without_tokenizer_is_converted_with_a_warning(starcoder2, tmp_path, capsys):
    (starcoder2 / "tokenizer.json").unlink()
    status, out, err = command(capsys, "import", starcoder2, tmp_path / "ours")
    assert status == 0 and "no tokenizer" in out and "theirs has no tokenizer.json" in err
    assert from_pretrained(tmp_path / "ours")[1] is None


def refused(capsys, message, source, tmp_path):
    """The import fails with one line and leaves nothing behind."""
    status, out, err = command(capsys, "import", source, tmp_path / "ours")
    assert (status, out) == (2, "") and err.count("\n") == 1, err
    assert err.startswith("python -m model.huggingface: error: ") and message in err, err
    assert not (tmp_path / "ours").exists()


def test_a_pickle_is_refused_with_the_way_to_convert_it(starcoder2, tmp_path, capsys):
    (starcoder2 / "model.safetensors").rename(tmp_path / "weights")
    for name in ("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.pth"):
        (starcoder2 / name).write_bytes(b"\x80\x02cos\nsystem\n")
        message = f"its weights in {name}, a pickle, which can run any code when it is read"
        refused(capsys, message, starcoder2, tmp_path)
        refused(capsys, "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)", starcoder2, tmp_path)
        (starcoder2 / name).unlink()
    refused(capsys, "has neither model.safetensors nor model.safetensors.index.json", starcoder2, tmp_path)


def test_missing_and_extra_weights_are_listed(starcoder2, tmp_path, capsys):
    weights = load_file(starcoder2 / "model.safetensors")
    gone = weights.pop("model.layers.1.self_attn.k_proj.bias")
    other = {"model.layers.1.self_attn.k_proj_bias": gone, "model.norm.bias": torch.zeros(7)}
    save_file({**weights, **other}, starcoder2 / "model.safetensors")
    message = (
        "theirs does not fit config.json: model.layers.1.self_attn.k_proj.bias is missing, "
        "model.layers.1.self_attn.k_proj_bias is not of this model, model.norm.bias is (7,) instead of (24,)"
    )
    refused(capsys, message, starcoder2, tmp_path)


def test_a_tied_head_that_differs_from_the_embedding_is_refused(starcoder2, tmp_path, capsys):
    weights = load_file(starcoder2 / "model.safetensors")
    head = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file({**weights, **head}, starcoder2 / "model.safetensors")
    assert from_huggingface(starcoder2).config.tie_weights  # a copy of the embedding is not in the way
    head["lm_head.weight"][0] += 1
    save_file({**weights, **head}, starcoder2 / "model.safetensors")
    refused(capsys, "lm_head.weight is not the embedding, but tie_word_embeddings is true", starcoder2, tmp_path)


def test_weights_of_two_dtypes_are_refused(starcoder2, tmp_path, capsys):
    weights = load_file(starcoder2 / "model.safetensors")
    weights["model.norm.bias"] = weights["model.norm.bias"].half()
    save_file(weights, starcoder2 / "model.safetensors")
    refused(capsys, "has weights of several dtypes", starcoder2, tmp_path)


def test_damaged_files_are_named(starcoder2, tmp_path, capsys):
    content = (starcoder2 / "model.safetensors").read_bytes()
    for length in (0, 7, 100, len(content) - 1):
        (starcoder2 / "model.safetensors").write_bytes(content[:length])
        refused(capsys, "model.safetensors is truncated, damaged or no safetensors file", starcoder2, tmp_path)
    (starcoder2 / "model.safetensors").unlink()
    for index in ("{", "[]", "{}", '{"weight_map": {"a": "../weights.safetensors"}}', '{"weight_map": {"a": 1}}'):
        (starcoder2 / "model.safetensors.index.json").write_text(index)
        refused(capsys, "model.safetensors.index.json", starcoder2, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bloom"}, "model_type is 'bloom', and only gpt2, starcoder2, llama, mistral, qwen2, qwen3"),
        ({"model_type": "llama"}, "hidden_act is 'gelu_pytorch_tanh', and only 'silu' can be converted"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_size": 25}, "n_head=4 does not divide d_model=25"),
        ({"sliding_window": 0}, "window=0 is not a whole number of at least 1"),
        ({"quantization_config": {"quant_method": "gptq"}}, "its weights are quantized"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not 1"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_type is 'linear', but its factor is missing"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "scaling 'llama3' lacks"),
    ],
)
def test_an_unsupported_config_is_refused(starcoder2, tmp_path, capsys, change, message):
    config = json.loads((starcoder2 / "config.json").read_text())
    (starcoder2 / "config.json").write_text(json.dumps({**config, **change}))
    refused(capsys, message, starcoder2, tmp_path)


def test_a_config_that_lacks_sizes_is_refused(starcoder2, tmp_path, capsys):
    (starcoder2 / "config.json").write_text('{"model_type": "starcoder2", "vocab_size": 40, "hidden_size": 24}')
    message = "it lacks max_position_embeddings, num_hidden_layers, num_attention_heads, num_key_value_heads"
    refused(capsys, message, starcoder2, tmp_path)


def test_missing_and_wrong_directories_are_refused(starcoder2, tmp_path, capsys):
    refused(capsys, "nowhere is not a directory", tmp_path / "nowhere", tmp_path)
    (tmp_path / "empty").mkdir()
    refused(capsys, "empty has no config.json, so it is not a model directory", tmp_path / "empty", tmp_path)
    save_pretrained(GPT(MIXES["rope"]), tmp_path / "saved")
    refused(capsys, "saved is a model directory of this package already", tmp_path / "saved", tmp_path)
    status, _, err = command(capsys, "export", starcoder2, tmp_path / "back")
    assert status == 2 and "theirs is a directory of transformers already" in err
    status, _, err = command(capsys, "impart", starcoder2, tmp_path / "back")
    assert status == 2 and err.count("\n") == 1 and "invalid choice: 'impart'" in err


def test_an_existing_directory_is_not_overwritten(starcoder2, tmp_path, capsys):
    before = sorted(path.name for path in starcoder2.iterdir())
    status, _, err = command(capsys, "import", starcoder2, starcoder2)
    assert status == 2 and "theirs is not empty: choose another directory, or remove it" in err
    assert sorted(path.name for path in starcoder2.iterdir()) == before


def test_a_tokenizer_of_another_model_is_refused(starcoder2, subwords, tmp_path, capsys):
    shutil.copy(subwords, starcoder2)
    refused(capsys, "tokenizer.json has 300 tokens, more than vocab_size=40", starcoder2, tmp_path)


def test_a_pattern_of_windows_is_not_exported(tmp_path, capsys):
    save_pretrained(GPT(MIXES["pattern"]), tmp_path / "ours")
    status, _, err = command(capsys, "export", tmp_path / "ours", tmp_path / "back")
    assert status == 2 and "Starcoder2ForCausalLM is the nearest, and cannot have window_pattern 'SSL'" in err
    assert not (tmp_path / "back").exists()
