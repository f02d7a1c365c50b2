"""Model directories: config.json, model.safetensors and, if the model has one, tokenizer.json. Never a pickle.

save_pretrained(model, "runs/shakespeare/best", tokenizer)
model, tokenizer = from_pretrained("runs/shakespeare/best")
"""

import json
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .config import GPTConfig
from .files import replacing
from .gpt import GPT
from .tokenizer import FILE as TOKENIZER
from .tokenizer import load_tokenizer

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class CheckpointError(ValueError):
    """A model directory that cannot be loaded: what is wrong with it, in one line."""


def save_pretrained(model, directory, tokenizer=None, weights=None):
    """Write the model, and its tokenizer, into a directory, which is made if need be.

    Every file is written beside its final name, synced and renamed, the weights last: a save that fails leaves what
    was there. The weights carry the config as well, so that files of two models in one directory are told apart.
    Weights are saved in their own dtype, from under torch.compile. weights: {name: tensor} to save in place of the
    model's own, such as an average. Raises OSError if the directory cannot be written.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper would put its name before every parameter's
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = json.dumps(asdict(model.config), indent=2)
    weights = model.state_dict() if weights is None else weights
    weights = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
    names = [CONFIG, WEIGHTS] if tokenizer is None else [TOKENIZER, CONFIG, WEIGHTS]
    with replacing(*(directory / name for name in names)) as temporary:
        written = dict(zip(names, temporary, strict=True))
        if tokenizer is not None:
            written[TOKENIZER].write_text(tokenizer.to_json(), encoding="utf-8")
        written[CONFIG].write_text(config + "\n", encoding="utf-8")
        save_file(weights, written[WEIGHTS], metadata={"format": "pt", "config": config})


def from_pretrained(directory, *, fused_kernels=True, backend="auto", device="cpu"):
    """(model, tokenizer) of a directory that `save_pretrained` wrote; tokenizer is None if there is none.

    The model is in evaluation mode and in the dtype it was saved in. torch's random state is left alone. Raises
    CheckpointError for files that are missing, truncated, damaged or of another config than the others.
    """
    directory = Path(directory)
    config = _read_config(directory)
    tokenizer = read_tokenizer(directory, config)
    with torch.device("meta"):  # shapes only: no weights are drawn that would be thrown away
        model = GPT(config, fused_kernels=fused_kernels, backend=backend)
    weights = _read_weights(directory, config, model.state_dict())
    model.to(weights["wte.weight"].dtype).to_empty(device=device)
    model.load_state_dict(weights)
    return model.eval(), tokenizer


def resolve_checkpoint(path) -> Path:
    """The model directory that `path` means: itself, or of a run directory its `best`, else its `last`.

    Raises CheckpointError, in one line, if there is none.
    """
    path = Path(path)
    for directory in (path, path / "best", path / "last"):
        if (directory / CONFIG).is_file():
            return directory
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory: give the one that holds {CONFIG} and {WEIGHTS}, or a run's")
    raise CheckpointError(
        f"{path} has no {CONFIG}, so it is not a model directory, and no best/{CONFIG} or last/{CONFIG}, so it is not "
        "a run directory with a checkpoint"
    )


def _read_config(directory):
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory: give the one that holds {CONFIG} and {WEIGHTS}")
    path = directory / CONFIG
    try:
        return _config_from(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise CheckpointError(f"{directory} has no {CONFIG}, so it is not a model directory") from None
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from None


def _config_from(values):
    """The config of a parsed config.json. Raises ValueError for a wrong one."""
    if not isinstance(values, dict):
        raise ValueError("it does not hold the fields of a config")
    if "model_type" in values:
        raise ValueError(
            f"it describes a {values['model_type']!r} model of Hugging Face: python -m model.huggingface import makes "
            "a directory for this package of one"
        )
    known = {field.name for field in fields(GPTConfig)}
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"it has unknown fields: {', '.join(unknown)}")
    if missing := [
        name for name in ("vocab_size", "context_length", "n_layer", "n_head", "d_model") if name not in values
    ]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    return GPTConfig(**values)


def read_tokenizer(directory, config):
    """The tokenizer of a directory, None if it has none. Raises CheckpointError if it cannot be that of the config."""
    if not (directory / TOKENIZER).exists():
        return None
    try:
        tokenizer = load_tokenizer(directory)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{directory / TOKENIZER} has {tokenizer.vocab_size} tokens, more than vocab_size={config.vocab_size} of "
            f"{CONFIG}: the two are of different models"
        )
    return tokenizer


def _read_weights(directory, config, expected):
    """The tensors by name, if they are those of `expected`, and of this config where the file says of which it is."""
    path = directory / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            stored = (file.metadata() or {}).get("config")
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        stored = config if stored is None else _config_from(json.loads(stored))
    except FileNotFoundError:
        raise CheckpointError(f"{directory} has no {WEIGHTS}") from None
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is truncated, damaged or no safetensors file ({error})") from None
    if different := config.differences(stored):
        raise CheckpointError(
            f"{CONFIG} and {WEIGHTS} in {directory} are of different models: {different} "
            "(to change a model, load it, change it and save it again)"
        )
    check_weights(path, weights, expected)
    return weights


def check_weights(source, weights, expected):
    """Raise CheckpointError unless `weights` has the names and shapes of `expected`, both {name: tensor}."""
    wrong = [f"{name} is missing" for name in expected if name not in weights]
    wrong += [f"{name} is not of this model" for name in weights if name not in expected]
    wrong += [
        f"{name} is {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(f"{source} does not fit {CONFIG}: {', '.join(wrong[:3])}{more}")
