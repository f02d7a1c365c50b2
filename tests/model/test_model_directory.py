import json
import os

import pytest
import torch
from mixes import FIELDS, MIXES, every_mix, lively
from safetensors.torch import load_file, save_file

import model.checkpoint
from model import GPT, CharTokenizer, CheckpointError, GPTConfig, from_pretrained, generate, save_pretrained
from model.checkpoint import checksums, resolve_checkpoint

TOKENIZER = CharTokenizer("".join(map(chr, range(40, 81))))


@pytest.fixture
def directory(tmp_path):
    save_pretrained(lively(GPT(MIXES["rope-window-gqa"])), tmp_path / "saved", TOKENIZER)
    return tmp_path / "saved"


@every_mix
def test_a_loaded_model_is_the_saved_one_bit_for_bit(config, tmp_path):
    saved = lively(GPT(config)).eval()
    save_pretrained(saved, tmp_path, TOKENIZER)
    loaded, tokenizer = from_pretrained(tmp_path)
    assert loaded.config == config
    assert tokenizer.itos == TOKENIZER.itos
    assert not loaded.training
    tokens = torch.randint(41, (2, 40))
    assert torch.equal(loaded(tokens)[0], saved(tokens)[0])
    loaded(tokens, tokens)[1].backward()  # and it can be trained


def test_the_methods_write_and_read_the_model_with_its_tokenizer(tmp_path, directory):
    model = GPT.from_pretrained(directory, fused_kernels=False)
    assert model.tokenizer.itos == TOKENIZER.itos and not model.fused_kernels
    text = model.tokenizer.decode(torch.cat(list(generate(model, "AB", 20, seed=1))))
    model.save_pretrained(tmp_path / "run" / "best")
    again = GPT.from_pretrained(tmp_path / "run")  # a run, of which it reads the best
    assert again.tokenizer.decode(torch.cat(list(generate(again, "AB", 20, seed=1)))) == text
    GPT(model.config).save_pretrained(tmp_path / "other", CharTokenizer("AB"))
    assert from_pretrained(tmp_path / "other")[1].vocab_size == 2
    torch.compile(again).save_pretrained(tmp_path / "compiled")
    assert from_pretrained(tmp_path / "compiled")[1].itos == TOKENIZER.itos


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_directory_with_checksums_is_verified_and_a_new_save_renews_them(directory, name):
    sums = directory / "SHA256SUMS"
    sums.write_text(checksums({path.name: path for path in sorted(directory.iterdir())}))
    from_pretrained(directory)
    content = (directory / name).read_bytes()
    (directory / name).write_bytes(content[:-3] + b"x" + content[-2:])
    with pytest.raises(CheckpointError, match=f"saved/{name} is not what was written") as error:
        from_pretrained(directory)
    assert "\n" not in str(error.value)
    save_pretrained(GPT(MIXES["original"]), directory, TOKENIZER)
    assert from_pretrained(directory)[0].config == MIXES["original"]
    sums.write_text(sums.read_text()[:-20])
    with pytest.raises(CheckpointError, match="saved/SHA256SUMS is damaged"):
        from_pretrained(directory)


def test_every_field_of_the_config_survives(tmp_path):
    config = GPTConfig(**{**FIELDS, "rope_scaling": ("llama3", {"factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64}), "rotary_dim": 4, "rope_theta": 5e5,
        "dropout": 0.1, "tie_weights": False, "norm_epsilon": 1e-6, "window_pattern": "SL",
        "mlp_width": 50})  # fmt: skip
    save_pretrained(GPT(config), tmp_path)
    loaded, tokenizer = from_pretrained(tmp_path, fused_kernels=False)
    assert loaded.config == config
    assert tokenizer is None
    assert not loaded.fused_kernels


def test_a_config_file_without_a_field_gets_its_default(directory):
    """As directories that older versions wrote."""
    config = json.loads((directory / "config.json").read_text())
    del config["mlp_width"]
    (directory / "config.json").write_text(json.dumps(config))
    weights = load_file(directory / "model.safetensors")
    save_file(weights, directory / "model.safetensors", metadata={"config": json.dumps(config)})
    assert from_pretrained(directory)[0].config == MIXES["rope-window-gqa"]


def test_the_directory_holds_three_plain_files_and_the_tied_weights_once(directory):
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    names = load_file(directory / "model.safetensors")
    assert "wte.weight" in names and "lm_head.weight" not in names


def test_the_dtype_is_kept_and_torchs_random_state_left_alone(tmp_path):
    save_pretrained(GPT(MIXES["original"]).to(torch.bfloat16), tmp_path)
    state = torch.get_rng_state()
    loaded, _ = from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_a_compiled_model_is_saved_under_its_own_names(tmp_path):
    model = GPT(MIXES["rope"])
    save_pretrained(torch.compile(model), tmp_path)
    loaded, _ = from_pretrained(tmp_path)
    assert torch.equal(loaded.wte.weight, model.wte.weight)


def test_saving_again_replaces_the_files_and_leaves_others_alone(directory):
    (directory / "metrics.jsonl").write_text("{}")
    model = GPT(MIXES["original"])
    save_pretrained(model, directory, TOKENIZER)
    loaded, _ = from_pretrained(directory)
    assert loaded.config == MIXES["original"]
    assert len(list(directory.iterdir())) == 4


@pytest.mark.parametrize("failing", ["write", "sync"])
def test_a_save_that_fails_leaves_the_old_model_and_nothing_else(directory, monkeypatch, failing):
    before = {path.name: path.read_bytes() for path in directory.iterdir()}

    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    if failing == "write":
        monkeypatch.setattr(model.checkpoint, "save_file", no_space)
    else:
        monkeypatch.setattr(model.checkpoint.os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(GPT(MIXES["original"]), directory, TOKENIZER)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_a_truncated_weights_file_is_never_loaded(directory):
    path = directory / "model.safetensors"
    content = path.read_bytes()
    for length in (0, 4, 8, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"model.safetensors is truncated, damaged or no safetensors file"):
            from_pretrained(directory)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(directory, name):
    os.remove(directory / name)
    with pytest.raises(CheckpointError, match=f"saved has no {name}"):
        from_pretrained(directory)


def test_a_missing_directory_is_named(directory):
    with pytest.raises(CheckpointError, match="nowhere is not a directory"):
        from_pretrained(directory / "nowhere")
    with pytest.raises(CheckpointError, match=r"config.json is not a directory"):
        from_pretrained(directory / "config.json")


def edit(directory, **change):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **change}))


def test_files_of_two_models_in_one_directory_are_refused_with_the_fields_that_differ(directory):
    edit(directory, n_layer=6, window=5)
    with pytest.raises(CheckpointError, match=r"of different models: n_layer 6 and 3, window 5 and 9 \(to change"):
        from_pretrained(directory)


def test_weights_without_a_config_are_checked_by_their_shapes(directory):
    path = directory / "model.safetensors"
    weights = load_file(path)
    save_file(weights, path)  # without the config
    assert from_pretrained(directory)[0].config == MIXES["rope-window-gqa"]
    edit(directory, n_kv_head=4)
    with pytest.raises(
        CheckpointError, match=r"blocks.0.attn.qkv.weight is \(64, 32\) instead of \(96, 32\).* and 3 more"
    ):
        from_pretrained(directory)
    edit(directory, n_kv_head=2, tie_weights=False)
    with pytest.raises(CheckpointError, match=r"does not fit config.json: lm_head.weight is missing$"):
        from_pretrained(directory)
    edit(directory, tie_weights=True)
    save_file({**weights, "extra": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"extra is not of this model$"):
        from_pretrained(directory)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "config.json cannot be used: Expecting value"),
        ("[1]", "config.json cannot be used: it has no fields"),
        ("\udcff", "config.json cannot be used: 'utf-8'"),
        ('{"model_type": "t5"}', "model_type is 't5'"),
        ('{"n_layers": 3}', "it has unknown fields: n_layers"),
        ('{"n_layer": 3, "n_head": 4, "d_model": 8}', "it lacks vocab_size, context_length"),
        ('{"vocab_size": 1, "context_length": 1, "n_layer": 1, "n_head": 3, "d_model": 8}', "n_head=3 does not divide"),
        (
            '{"vocab_size": 1, "context_length": 1, "n_layer": 1, "n_head": 4, "d_model": 8, "dropout": "a"}',
            "config.json",
        ),
    ],
)
def test_a_config_that_cannot_be_used_is_named(directory, content, message):
    (directory / "config.json").write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(CheckpointError, match=message) as error:
        from_pretrained(directory)
    assert "\n" not in str(error.value)


def test_a_tokenizer_of_another_model_is_refused(directory):
    CharTokenizer("".join(map(chr, range(40, 100)))).save(directory)
    with pytest.raises(CheckpointError, match=r"tokenizer.json has 60 tokens, more than vocab_size=41"):
        from_pretrained(directory)
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer.json cannot be read: it is damaged"):
        from_pretrained(directory)


def test_a_run_directory_means_its_best_checkpoint_else_its_last(directory, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"run has no config.json, .* and no best/config.json or last/config"):
        resolve_checkpoint(run)
    directory.rename(run / "checkpoints" / "step-000005")
    (run / "last").symlink_to("checkpoints/step-000005")
    assert resolve_checkpoint(run) == run / "last"
    save_pretrained(GPT(MIXES["rope"]), run / "best")
    assert resolve_checkpoint(str(run)) == resolve_checkpoint(run / "best") == run / "best"
    with pytest.raises(CheckpointError, match="nowhere is not a directory"):
        resolve_checkpoint(tmp_path / "nowhere")
