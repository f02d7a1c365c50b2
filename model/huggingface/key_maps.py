"""Their weights under our names and back, by the tables of families.py.

Weights are only renamed, concatenated and transposed: a round trip gives the same bits.
"""

import re

import torch
from einops import rearrange

_ROWS_OF_TOKENS = ("wte.weight", "embed_tokens.weight", "lm_head.weight")
_UNPADDED = "vocab_size_without_pad"  # a field of config.json that transformers keeps


def weights_to_theirs(family, config, weights) -> dict:
    """Their {name: tensor} of our state dict. Neither has a tied head."""
    theirs = {}
    for name, tensor in weights.items():
        names, transposed = _their_names(family, name)
        for their_name, part in zip(names, tensor.split(_rows(config, names, tensor)), strict=True):
            theirs[their_name] = (
                rearrange(part, "outputs inputs -> inputs outputs").contiguous() if transposed else part
            )
    return theirs


def weights_from_theirs(family, weights, names) -> dict:
    """Our state dict, with these `names`, of their {name: tensor}, which `normalized` made complete."""
    ours = {}
    for name in names:
        their_names, transposed = _their_names(family, name)
        parts = [weights[their_name] for their_name in their_names]
        parts = [rearrange(part, "inputs outputs -> outputs inputs") for part in parts] if transposed else parts
        ours[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return ours


def normalized(family, config, weights) -> dict:
    """Their {name: tensor} with full names, weights only, and without a tied head.

    Raises ValueError for a tied head that differs from the embedding.
    """
    weights = {name: tensor for name, tensor in weights.items() if not re.search(family.ignored, name)}
    if not any(name.startswith(family.prefix) for name in weights):
        weights = {name if name.startswith("lm_head") else family.prefix + name: weights[name] for name in weights}
    if config.tie_weights and "lm_head.weight" in weights:
        head = weights.pop("lm_head.weight")
        if not torch.equal(head, weights.get(family.modules["wte"] + ".weight", head)):
            raise ValueError("lm_head.weight is not the embedding, but tie_word_embeddings is true: make it false")
    return weights


def with_pad_row(values, weights) -> tuple[dict, dict]:
    """Their config.json and weights, with one token more: the embedding, and the head, repeat their last row."""
    rows = values["vocab_size"]
    more = {name: torch.cat([x, x[-1:]]) for name, x in weights.items() if name.endswith(_ROWS_OF_TOKENS)}
    return {**values, "vocab_size": rows + 1, _UNPADDED: rows}, {**weights, **more}


def without_pad_row(values, weights) -> tuple[dict, dict]:
    """What was given to `with_pad_row`; anything else is returned as it is."""
    rows = values.get(_UNPADDED)
    if rows is None or values.get("vocab_size") != rows + 1:
        return values, weights
    fewer = {name: x[:rows].clone() for name, x in weights.items() if name.endswith(_ROWS_OF_TOKENS)}
    return {**values, "vocab_size": rows}, {**weights, **fewer}


def _their_names(family, name):
    """([their names], whether their matrix is transposed) of one of our parameters."""
    module, kind = name.rsplit(".", 1)
    layer = re.search(r"\.(\d+)\.", module)
    module = module if layer is None else module.replace(layer[0], ".{}.")
    theirs = family.modules[module]
    theirs = (theirs,) if isinstance(theirs, str) else theirs
    number = None if layer is None else layer[1]
    return [f"{their.format(number)}.{kind}" for their in theirs], kind == "weight" and module in family.transposed


def _rows(config, names, tensor):
    """How many rows of our tensor each of their names has: all, those of q, k and v, or of the gate and the rest."""
    if len(names) == 3:
        return [heads * config.head_dim for heads in (config.n_head, config.n_kv_head, config.n_kv_head)]
    return [len(tensor) // len(names)] * len(names)
