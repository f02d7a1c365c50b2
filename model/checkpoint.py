"""Model directories: config.json, model.safetensors and, if the model has one, tokenizer.json. Never a pickle.

save_pretrained(model, "runs/shakespeare/best", tokenizer)
model, tokenizer = from_pretrained("runs/shakespeare/best")
"""

import hashlib
import json
import os
import re
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .config import GPTConfig
from .gpt import GPT
from .tokenizer import FILE as TOKENIZER
from .tokenizer import load_tokenizer

CONFIG, WEIGHTS, SUMS = "config.json", "model.safetensors", "SHA256SUMS"


class CheckpointError(ValueError):
    """A model directory cannot be loaded; the message says why, in one line."""


def save_pretrained(model, directory, tokenizer=None, weights=None):
    """Write the model, and the tokenizer (None: the model's own), into a directory, which is made if it does not exist.

    A save that fails leaves the old files as they were (`replacing`, the weights last). The weights' file holds the
    config too, so that `from_pretrained` detects files of two models in one directory. A SHA256SUMS that is there is
    written again. The dtype is kept, and a compiled model is saved under its own names. weights: {name: tensor} to save
    instead of the model's own, such as an average. Raises OSError if the directory cannot be written.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper would prefix every name
    directory, tokenizer = Path(directory), model.tokenizer if tokenizer is None else tokenizer
    directory.mkdir(parents=True, exist_ok=True)
    config = json.dumps(asdict(model.config), indent=2)
    weights = model.state_dict() if weights is None else weights
    weights = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
    names = [CONFIG, WEIGHTS] if tokenizer is None else [TOKENIZER, CONFIG, WEIGHTS]
    names += [SUMS] if (directory / SUMS).exists() else []
    with replacing(*(directory / name for name in names)) as temporary:
        written = dict(zip(names, temporary, strict=True))
        if tokenizer is not None:
            written[TOKENIZER].write_text(tokenizer.to_json(), encoding="utf-8")
        written[CONFIG].write_text(config + "\n", encoding="utf-8")
        write_weights(weights, written[WEIGHTS], {"format": "pt", "config": config})
        if SUMS in written:
            files = {name: written.get(name, directory / name) for name in (CONFIG, WEIGHTS, TOKENIZER)}
            sums = checksums({name: path for name, path in files.items() if path.exists()})
            written[SUMS].write_text(sums, encoding="utf-8")


def from_pretrained(directory, *, fused_kernels=True, backend="auto", device="cpu"):
    """(model, tokenizer) of a directory that `save_pretrained` wrote, or of a run (`resolve_checkpoint`), or of a
    directory of transformers with one of the models of model/huggingface/families.py.

    The tokenizer is None if there is none; it is model.tokenizer too. The model is in evaluation mode and in the dtype
    it was saved in. torch's random state does not change. Raises CheckpointError for missing, truncated and damaged
    files, and for files of different models.
    """
    directory = resolve_checkpoint(directory)
    verify_sums(directory, f" (changed on purpose? remove {SUMS})")
    values = read_json(directory / CONFIG)
    if "model_type" in values:
        from .huggingface import import_pretrained  # here, because it imports this module

        model, tokenizer = import_pretrained(directory, fused_kernels=fused_kernels, backend=backend)
        return model.to(device), tokenizer
    try:
        config = _config_from(values)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{directory / CONFIG} cannot be used: {error}") from None
    tokenizer = read_tokenizer(directory, config)
    with torch.device("meta"):  # shapes only: random weights would be replaced at once
        model = GPT(config, fused_kernels=fused_kernels, backend=backend)
    weights = _read_weights(directory, config, model.state_dict())
    model.to(weights["wte.weight"].dtype).to_empty(device=device)
    model.load_state_dict(weights)
    model.tokenizer = tokenizer
    return model.eval(), tokenizer


def resolve_checkpoint(path) -> Path:
    """The model directory that `path` means: itself, or of a run directory its `best`, else its `last`.

    Raises CheckpointError, in one line, if there is none.
    """
    if path == "":
        raise CheckpointError("the checkpoint's path is empty: give a model directory or a run's")
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


def verify_sums(directory, advice="") -> list[str]:
    """The names of the files in SHA256SUMS; none for a directory without that file, which cannot be checked.

    advice: the end of the message for a changed file. Raises CheckpointError, in one line that names the file, unless
    every byte is as it was written, and PermissionError for a file that is not ours to read.
    """
    sums = Path(directory) / SUMS
    try:
        if not sums.exists():
            return []
        stored = sums.read_text(encoding="utf-8")
        lines = stored.split("\n")[:-1]
        names = [line[66:] for line in lines]
        # the list itself may be cut short, even between two lines
        unlisted = {name for name in (CONFIG, WEIGHTS, TOKENIZER) if (sums.parent / name).exists()}.difference(names)
        if unlisted or not re.fullmatch(r"([0-9a-f]{64}  .+\n)+", stored):
            raise CheckpointError(f"{sums} is damaged")
        for name, line in zip(names, lines, strict=True):
            path = sums.parent / name
            if checksums({name: path}) != line + "\n":
                raise CheckpointError(f"{path} is not what was written{advice}")
    except PermissionError as error:  # no damage: a resumed run must not go back to an older checkpoint, and delete it
        raise PermissionError(f"{error.filename} cannot be read: {error.strerror}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{directory} is damaged: {error}") from None
    return names


def checksums(files) -> str:
    """The content of SHA256SUMS for {name: path}: a line `SHA-256, two spaces, name` each."""
    lines = []
    for name, path in files.items():
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
        lines.append(f"{digest.hexdigest()}  {name}\n")
    return "".join(lines)


def read_json(path) -> dict:
    """The fields of a .json file in a model directory. Raises CheckpointError if there are none to read."""
    directory = path.parent
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory: give the one that holds {CONFIG} and {WEIGHTS}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{directory} has no {path.name}, so it is not a model directory") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} cannot be used: it has no fields")
    return values


def _config_from(values):
    """The GPTConfig of a parsed config.json. Raises ValueError for a wrong one."""
    if not isinstance(values, dict):
        raise ValueError("its config has no fields")
    known = {field.name for field in fields(GPTConfig)}
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"it has unknown fields: {', '.join(unknown)}")
    if missing := [
        name for name in ("vocab_size", "context_length", "n_layer", "n_head", "d_model") if name not in values
    ]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    return GPTConfig(**values)


def read_tokenizer(directory, config):
    """The tokenizer of a directory, None if it has none. Raises CheckpointError if it does not fit the config."""
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
    """{name: tensor} of the directory, checked against `expected` and, where the file holds a config, against ours."""
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


def write_weights(weights, path, metadata):
    """Write a safetensors file of {name: tensor}. Raises OSError, as other writes do, if it cannot be written."""
    try:
        save_file(weights, path, metadata=metadata)
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        raise (OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))) from None


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


@contextmanager
def replacing(*paths):
    """Temporary paths to write instead of `paths`. At the end of the block they are synced to the disk and renamed, in
    this order: a reader, and a machine that lost power, finds the old file or the new one, whole. If the block fails,
    no file is replaced.
    """
    paths = [Path(path) for path in paths]
    temporary = [path.with_name(f".{path.name}.tmp") for path in paths]
    try:
        yield temporary
        for file in temporary:
            sync(file)
        for file, path in zip(temporary, paths, strict=True):
            os.replace(file, path)
        for directory in {path.parent for path in paths}:
            sync(directory)
    finally:
        for file in temporary:
            file.unlink(missing_ok=True)


def sync(path):
    """Wait until the file, or the names in the directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
