"""Hugging Face's models as ours, and ours as theirs, where families.py has them; others of theirs on our attention.

    gpt = from_huggingface(model_or_directory)
    model = to_huggingface(gpt)
    register_attention()

Directories are local and hold safetensors. Only to_huggingface and register_attention need transformers. `python -m
model.huggingface` converts directories.
"""

import json
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..checkpoint import (
    CONFIG,
    WEIGHTS,
    CheckpointError,
    check_weights,
    read_json,
    read_tokenizer,
    replacing,
    write_weights,
)
from ..gpt import GPT
from ..tokenizer import FILE as TOKENIZER
from ..tokenizer import PAD, with_pad_token
from .attention import register_attention
from .fields import config_from_theirs, config_to_theirs, family_from_theirs, family_of
from .key_maps import (
    normalized,
    weights_from_theirs,
    weights_to_theirs,
    with_pad_row,
    without_pad_row,
)

__all__ = ["export_pretrained", "from_huggingface", "import_pretrained", "register_attention", "to_huggingface"]

INDEX = "model.safetensors.index.json"
TOKENIZER_CONFIG, GENERATION_CONFIG = "tokenizer_config.json", "generation_config.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def from_huggingface(source, *, fused_kernels=True, backend="auto") -> GPT:
    """The GPT that computes what a model of transformers does; source is that model or a directory.

    The weights are copied, with their dtype and device. The GPT is in evaluation mode. Raises CheckpointError for
    a model that families.py does not have, with the field, for missing or extra weights, and for files that are not
    safetensors.
    """
    if isinstance(source, str | Path):
        values, weights = _read_directory(Path(source))
    else:
        source = getattr(source, "_orig_mod", source)
        if not hasattr(source, "state_dict") or not hasattr(source, "config"):
            raise CheckpointError(f"{type(source).__name__} is neither a model of transformers nor a directory")
        values, weights, source = source.config.to_dict(), source.state_dict(), type(source).__name__
    try:
        values, weights = without_pad_row(values, weights)
        family, config = family_from_theirs(values), config_from_theirs(values)
        weights = normalized(family, config, weights)
        with torch.device("meta"):  # shapes only: random weights would be replaced at once
            model = GPT(config, fused_kernels=fused_kernels, backend=backend)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise CheckpointError(f"{source} cannot become a GPT: {error}") from None
    expected = model.state_dict()
    check_weights(source, weights, weights_to_theirs(family, config, expected))
    if len(dtypes := {tensor.dtype for tensor in weights.values()}) > 1:
        raise CheckpointError(
            f"{source} has weights of several dtypes ({', '.join(map(str, dtypes))}): convert it to one"
        )
    weights = weights_from_theirs(family, weights, expected)
    model.to(weights["wte.weight"].dtype).to_empty(device=weights["wte.weight"].device)
    model.load_state_dict(weights)
    return model.eval()


def to_huggingface(gpt):
    """The same model as one of transformers, with its dtype, device and mode: of the first family that can say it.

    The weights are copied. Raises ValueError for a GPT that no family can be, with the fields that the nearest lacks.
    """
    gpt = getattr(gpt, "_orig_mod", gpt)
    try:
        import transformers
    except ImportError:
        raise ImportError("to_huggingface needs transformers: pip install 'transformers>=5.4'") from None
    family = family_of(gpt.config)[1]
    model_class = getattr(transformers, family.model_class)
    config = model_class.config_class(**_their_config(gpt.config, gpt.wte.weight.dtype))
    with torch.random.fork_rng(devices=[]):  # it draws random weights, which are replaced at once
        model = model_class(config).to(gpt.wte.weight)
    weights = weights_to_theirs(family, gpt.config, gpt.state_dict())
    if gpt.config.tie_weights:
        weights["lm_head.weight"] = weights[family.modules["wte"] + ".weight"]
    model.load_state_dict(weights)
    return model.train(gpt.training)


def import_pretrained(directory, **options):
    """(GPT, tokenizer) of a directory of transformers; options are those of `from_huggingface`. The tokenizer is
    model.tokenizer too."""
    model = from_huggingface(directory, **options)
    model.tokenizer = read_tokenizer(Path(directory), model.config)
    return model, model.tokenizer


def export_pretrained(gpt, directory, tokenizer=None, pad_token=True):
    """Write a directory that AutoModelForCausalLM loads, and AutoTokenizer if there is a tokenizer (None: the GPT's).

    Batches of texts need a pad token. <|endoftext|> is one; a vocabulary without it gets <|pad|>, with the next number.
    If the GPT has no row for that number, the exported model has one row more, a copy of the last. `import_pretrained`
    drops it again. pad_token=False leaves vocabulary and weights as they are.
    """
    gpt, directory = getattr(gpt, "_orig_mod", gpt), Path(directory)
    tokenizer = gpt.tokenizer if tokenizer is None else tokenizer
    values = _their_config(gpt.config, gpt.wte.weight.dtype, tokenizer)
    family = family_of(gpt.config)[1]
    weights = weights_to_theirs(family, gpt.config, gpt.state_dict())
    weights = {name: x.detach().contiguous() for name, x in weights.items()}
    texts = {}
    if tokenizer is not None:
        if family.tokenizer:
            warnings.warn(
                f"AutoTokenizer reads every {values['model_type']} directory as a {family.tokenizer}: if the tokenizer "
                "is another, read it with PreTrainedTokenizerFast.from_pretrained",
                stacklevel=2,
            )
        # without this file AutoTokenizer takes the architecture's usual tokenizer class, which drops spaces
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        settings["padding_side"] = "left"  # to generate, a row must end with its text
        text, end = tokenizer.to_json(), values["eos_token_id"]
        if end is not None:
            name = tokenizer.decode([end])
            settings |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), name)
        if pad_token:
            settings["pad_token"] = PAD if end is None else name
            if end is None:
                text = with_pad_token(text, tokenizer.vocab_size)
                if tokenizer.vocab_size == gpt.config.vocab_size:
                    values, weights = with_pad_row(values, weights)
        generation = {name: values[name] for name in ("bos_token_id", "eos_token_id")}
        # what the tokenizer does not decode must not be drawn
        generation["suppress_tokens"] = [*range(tokenizer.vocab_size, values["vocab_size"])] or None
        texts |= {TOKENIZER: text, TOKENIZER_CONFIG: _json(settings), GENERATION_CONFIG: _json(generation)}
    texts[CONFIG] = _json(values)
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(*(directory / name for name in (*texts, WEIGHTS))) as temporary:
        for file, text in zip(temporary, texts.values(), strict=False):
            file.write_text(text, encoding="utf-8")
        write_weights(weights, temporary[-1], {"format": "pt"})


def _json(values):
    return json.dumps(values, indent=2) + "\n"


def _their_config(config, dtype, tokenizer=None):
    """Their whole config.json: the architecture, and the fields that `generate` and the loader read."""
    end, dtype = getattr(tokenizer, "end_of_text", None), str(dtype).removeprefix("torch.")
    tokens = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": None}
    return config_to_theirs(config) | tokens | {"dtype": dtype, "torch_dtype": dtype}  # transformers 5 and 4


def _read_directory(directory):
    """(parsed config.json, {name: tensor}) of a directory of transformers, its weights in one file or several."""
    values = read_json(directory / CONFIG)
    if "model_type" not in values and "n_kv_head" in values:
        raise CheckpointError(f"{directory} is a model directory of this package already: from_pretrained reads it")
    weights = {}
    for name in _weight_files(directory):
        try:
            with safe_open(directory / name, framework="pt") as file:
                weights |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise CheckpointError(f"{directory} has no {name}, which {INDEX} names") from None
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{directory / name} is truncated, damaged or no safetensors file ({error})"
            ) from None
    return values, weights


def _weight_files(directory):
    """The names of the safetensors files. Raises CheckpointError if there are none, or only pickles."""
    if (directory / WEIGHTS).exists():
        return [WEIGHTS]
    if (directory / INDEX).exists():
        files = read_json(directory / INDEX).get("weight_map")
        if not isinstance(files, dict) or any(Path(str(name)).name != name for name in files.values()):
            raise CheckpointError(f"{directory / INDEX} does not map weights to files of its directory")
        return sorted(set(files.values()))
    pickles = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{directory} has its weights in {pickles[0]}, a pickle, which can run any code when it is read: if you "
            "trust it, AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW) of transformers makes safetensors"
        )
    raise CheckpointError(f"{directory} has neither {WEIGHTS} nor {INDEX}")
