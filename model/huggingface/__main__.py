"""Convert models between transformers and this package, without transformers.

python -m model.huggingface import DOWNLOADED OURS     # model.sample, train.evaluate and train --init-from read both
python -m model.huggingface export runs/mine THEIRS    # AutoModelForCausalLM and AutoTokenizer load it
"""

import argparse
import shlex
import sys
import warnings
from pathlib import Path

from ..checkpoint import CONFIG, from_pretrained, read_json, resolve_checkpoint, save_pretrained
from ..command import Parser, command_output
from ..tokenizer import FILE as TOKENIZER
from . import export_pretrained, import_pretrained


def main(arguments=None) -> int:
    """Run the command and return its exit status: 0, 2 for wrong input, 1 if what it says cannot be written."""
    parser = Parser(
        prog="python -m model.huggingface",
        description="Convert models between transformers and this package; local directories.",
    )
    parser.add_argument(
        "direction", choices=("import", "export"), help="import: theirs to ours; export: ours to theirs"
    )
    parser.add_argument("source", metavar="SRC", help="directory to read; export also takes a run: best, else last")
    parser.add_argument("destination", metavar="DST", help="directory to write; it must not exist, or be empty")
    parser.add_argument(
        "--pad-token",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="export: give a vocabulary without <|endoftext|> a token to pad batches with (the default)",
    )
    with command_output(parser.prog, ends=True):
        options = parser.parse_args(arguments)
        try:
            lines = _convert(options.direction, Path(options.source), Path(options.destination), options.pad_token)
        except (ValueError, OSError) as error:
            parser.error(str(error))
        print("\n".join(lines))
    return 0


def _convert(direction, source, destination, pad_token):
    """Convert; returns lines about the result and how to use it."""
    if destination.is_dir() and any(destination.iterdir()):
        raise FileExistsError(f"{destination} is not empty: choose another directory, or remove it")
    if direction == "import":
        model, tokenizer = import_pretrained(source)
        _write(destination, save_pretrained, model, destination, tokenizer)
        path = shlex.quote(str(destination))
        uses = [f"python -m model.sample --checkpoint {path}", f"python -m train --fused-kernels --init-from {path}"]
    else:
        source = resolve_checkpoint(source)
        if "model_type" in read_json(source / CONFIG):
            raise ValueError(f"{source} is a directory of transformers already")
        model, tokenizer = from_pretrained(source)
        _write(destination, export_pretrained, model, destination, tokenizer, pad_token)
        uses = [f"AutoModelForCausalLM.from_pretrained({str(destination)!r})"]
        uses += [] if tokenizer is None else [f"AutoTokenizer.from_pretrained({str(destination)!r})"]
    if tokenizer is None:
        warnings.warn(f"{source} has no {TOKENIZER}: {destination} has none either", stacklevel=2)
    about = "no tokenizer" if tokenizer is None else f"{tokenizer.vocab_size:,} tokens"
    return [f"{destination}: {model.config.architecture}, {model.num_parameters():,} parameters, {about}", *uses]


def _write(destination, write, *arguments):
    """Write the directory, or nothing: one that was made for it is removed if that fails, or is stopped by Ctrl-C."""
    existed = destination.exists()
    try:
        write(*arguments)
    except BaseException as error:
        if not existed and destination.exists():
            destination.rmdir()  # the files are removed already
        if isinstance(error, OSError):
            raise OSError(f"{destination} cannot be written: {error.strerror or error}") from None
        raise


if __name__ == "__main__":
    sys.exit(main())
