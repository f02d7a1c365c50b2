"""Their config.json as a GPTConfig, and a GPTConfig as the config.json of the first family that can say it."""

import itertools
import math
import warnings

from ..config import GPTConfig
from .families import FAMILIES, Family

SLIDES, FULL = "sliding_attention", "full_attention"  # of layer_types and rope_parameters
HINTS = {
    "window_pattern": "set_window(window, 'S') gives all layers one window: train on with it",
    "prefix": "set_window(window, prefix=0) takes the prefix away: train on with it",
}


def config_from_theirs(values) -> GPTConfig:
    """The GPTConfig of a parsed config.json. Raises ValueError, with the field, for a model that we do not have."""
    family = family_from_theirs(values)
    if values.get("quantization_config"):
        raise ValueError("its weights are quantized: convert a version in fp32, fp16 or bf16")
    for name, meanings in family.fixed.items():
        if values.get(name, meanings[0]) not in meanings:
            raise ValueError(f"{name} is {values[name]!r}, and only {meanings[0]!r} can be converted")
    theirs = {**family.defaults, **values}
    if missing := [name for name in _names(family) if name not in theirs]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    ours = {name: _one_value(theirs, names) for name, names in family.fields.items()} | family.blocks
    ours["dropout"] = _one_dropout({name: values.get(name, usual) for name, usual in family.dropouts.items()})
    if (scalar := ours.get("attention_scale")) is not None:
        ours["attention_scale"] = None if scalar == ours["head_dim"] else scalar**-0.5
    if family.scaled_embedding:
        ours["embedding_scale"] = ours["d_model"] ** 0.5
    letters = _letters_from_theirs(family, theirs)
    ours["window"] = theirs["sliding_window"] if "S" in letters else None
    ours["window_pattern"] = _shortest(letters) if set(letters) & set("SN") else "S"
    if "positions" not in family.blocks:
        ours |= _rotary_from_theirs(family, theirs, letters)
    config = GPTConfig(**ours)
    if "head_dim" not in family.fields and values.get("head_dim") not in (None, config.head_dim):
        raise ValueError(
            f"head_dim is {values['head_dim']}, and only {config.head_dim} can be converted for a width of "
            f"{config.d_model} and {config.n_head} heads"
        )
    return config


def config_to_theirs(config) -> dict:
    """The content of their config.json. Raises ValueError for a model that transformers has no class for."""
    model_type, family = family_of(config)
    said = {name: getattr(config, name) for name in family.fields}
    if "attention_scale" in said:
        said["attention_scale"] = round(_attention_scale(config) ** -2)
    for name in ("attention_softcap", "logit_softcap"):  # their check of types takes no int
        said |= {name: float(said[name])} if said.get(name) is not None else {}
    theirs = {"architectures": [family.model_class], "model_type": model_type}
    for name, names in family.fields.items():
        theirs |= dict.fromkeys(_tuple(names), said[name])
    theirs |= {name: meanings[0] for name, meanings in family.fixed.items()}
    theirs |= dict.fromkeys(family.dropouts, config.dropout)
    theirs |= _layers_to_theirs(family, config)
    return theirs | (_rotary_to_theirs(family, config) if config.positions == "rope" else {})


def family_from_theirs(values) -> Family:
    """The family of a parsed config.json. Raises ValueError for another."""
    if values.get("model_type") not in list(FAMILIES):  # by ==: a damaged file may have a list there
        *others, last = FAMILIES
        raise ValueError(
            f"model_type is {values.get('model_type')!r}, and only {', '.join(others)} and {last} can be converted "
            "(register_attention runs others on these kernels, unconverted)"
        )
    return FAMILIES[values["model_type"]]


def family_of(config) -> tuple[str, Family]:
    """(model_type, tables) of the first family that can say all fields of a GPTConfig.

    Raises ValueError if there is none, with what the nearest lacks.
    """
    lacking = {model_type: _lacks(family, config) for model_type, family in FAMILIES.items()}
    nearest = min(lacking, key=lambda model_type: len(lacking[model_type]))
    if names := lacking[nearest]:
        shown = ", ".join(f"{name} {getattr(config, name)!r}" for name in names)
        hints = "".join(f"; {HINTS[name]}" for name in names if name in HINTS)
        raise ValueError(
            f"transformers has no class for this model: {FAMILIES[nearest].model_class} is the nearest, and cannot "
            f"have {shown}{hints}"
        )
    return nearest, FAMILIES[nearest]


def _lacks(family, config):
    """The fields of the config that a model of the family cannot have."""
    usual = {
        "positions": "rope",
        "norm": "layer",
        "norm_position": "before",
        "mlp": "gelu",
        "qk_norm": False,
        "bias": True,
        "qkv_bias": config.bias,
        "n_kv_head": config.n_head,
        "head_dim": config.d_model // config.n_head,
        "embedding_scale": config.d_model**0.5 if family.scaled_embedding else 1.0,
        "attention_scale": config.head_dim**-0.5,
        "attention_softcap": None,
        "logit_softcap": None,
    }
    have = {name: getattr(config, name) for name in usual} | {"attention_scale": _attention_scale(config)}
    usual |= family.blocks
    if "attention_scale" in family.fields:  # as a whole number
        usual["attention_scale"] = max(1, round(have["attention_scale"] ** -2)) ** -0.5
    said = family.fields.keys() - {"attention_scale"}
    lacking = [name for name in usual if name not in said and not _same(have[name], usual[name])]
    if family.equal_heads and config.d_model % config.n_head:
        lacking.append("n_head")
    letters = set(_letters(config))
    if "S" in letters and "S" not in family.letters:
        lacking.append("window")
    if ("N" in letters and "N" not in family.letters) or (family.letters == "S" and len(letters) > 1):
        lacking.append("window_pattern")
    if any(map(config.layer_prefix, range(config.n_layer))):
        lacking.append("prefix")
    if config.positions == "rope":
        lacking += ["rotary_dim"] if config.rotated < config.head_dim else []
        lacking += ["local_rope_theta"] if not _can_rotate(family, config) else []
    return lacking


def _same(value, other):
    numbers = all(isinstance(x, float | int) and not isinstance(x, bool) for x in (value, other))
    return math.isclose(value, other, rel_tol=1e-9) if numbers else value == other


def _attention_scale(config):
    return config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale


def _letters(config):
    """One letter a layer, of what it does: S only where a window slides, N only where others rotate."""
    slides = ["S" if config.layer_window(layer) is not None else "L" for layer in range(config.n_layer)]
    return "".join(
        "N" if config.positions == "rope" and config.layer_kind(layer) == "N" else letter
        for layer, letter in enumerate(slides)
    )


def _angles(config):
    """[(theta, scaling)] of the layers that rotate: of those that slide, of the others. No pair is there twice."""
    pairs = {SLIDES: [], FULL: []}
    for layer, letter in enumerate(_letters(config)):
        kind, pair = SLIDES if letter == "S" else FULL, config.layer_rope(layer)
        if pair is not None and pair not in pairs[kind]:
            pairs[kind].append(pair)
    return pairs[SLIDES], pairs[FULL]


def _can_rotate(family, config):
    sliding, full = _angles(config)
    if family.local_rope is None:
        full = full + [pair for pair in sliding if pair not in full]
    return len(full) <= 1


def _names(family):
    """The names in their config.json of our fields, those that may not be missing if they have no default."""
    return list(itertools.chain.from_iterable(map(_tuple, family.fields.values())))


def _tuple(names):
    return (names,) if isinstance(names, str) else names


def _one_value(theirs, names):
    """The value of a field that may have several names."""
    first, *others = _tuple(names)
    for other in others:
        if theirs[other] != theirs[first]:
            raise ValueError(
                f"{first} is {theirs[first]!r} and {other} {theirs[other]!r}, and only equal ones can be converted"
            )
    return theirs[first]


def _one_dropout(dropouts):
    if len(set(dropouts.values())) > 1:
        shown = ", ".join(f"{name} {value}" for name, value in dropouts.items())
        warnings.warn(f"a GPT has one dropout, and takes the largest of {shown}", stacklevel=4)
    elif len(dropouts) == 1 and any(dropouts.values()):
        [(name, value)] = dropouts.items()
        warnings.warn(f"a GPT has one dropout: {name} {value} becomes that of embeddings and branches", stacklevel=4)
    return float(max(dropouts.values()))


def _letters_from_theirs(family, theirs):
    """The letter of each layer."""
    n, window = theirs["num_hidden_layers"] if family.letters != "L" else 0, theirs.get("sliding_window")
    if "use_sliding_window" in family.defaults and not theirs["use_sliding_window"]:
        window = None
    if family.letters in ("L", "S"):
        return "L" * n if window is None else "S" * n
    rotates = _rotating_layers(theirs, n) if "N" in family.letters else [True] * n
    types = theirs.get("layer_types")
    if types is None:
        types = _usual_layer_types(family, theirs, window, rotates)
    if len(types) != n or set(types) - {SLIDES, FULL}:
        raise ValueError(f"layer_types is {types}, and only {n} of {SLIDES} and {FULL} can be converted")
    if SLIDES in types and window is None:
        raise ValueError(f"layer_types has {SLIDES}, but there is no sliding_window")
    if (SLIDES, False) in (pairs := list(zip(types, rotates, strict=True))):
        raise ValueError(
            f"no_rope_layers: layer {pairs.index((SLIDES, False))} has a window and no rotation, and only "
            f"{FULL} without rotation can be converted"
        )
    return "".join("S" if kind == SLIDES else "L" if rotated else "N" for kind, rotated in pairs)


def _usual_layer_types(family, theirs, window, rotates):
    """layer_types of a config.json without it, as transformers makes them."""
    n = len(rotates)
    if "N" in family.letters:
        slides = [window is not None and not rotated for rotated in rotates]
    elif "use_sliding_window" in family.defaults:
        slides = [window is not None and layer >= theirs.get("max_window_layers", 28) for layer in range(n)]
    else:
        size = theirs.get("sliding_window_pattern") or len(family.default_pattern)
        slides = [(layer + 1) % size != 0 for layer in range(n)]
    return [SLIDES if slide else FULL for slide in slides]


def _rotating_layers(theirs, n):
    """Whether each layer rotates, by SmolLM 3's no_rope_layers, which is 1 where one does."""
    every = theirs.get("no_rope_layer_interval") or 4
    flags = theirs.get("no_rope_layers") or [(layer + 1) % every != 0 for layer in range(n)]
    if len(flags) < n:
        raise ValueError(f"no_rope_layers has {len(flags)} entries for {n} layers")
    return list(map(bool, flags[:n]))


def _shortest(letters):
    """The shortest pattern that gives the letters when it is repeated."""
    sizes = range(1, len(letters) + 1)
    return next(letters[:n] for n in sizes if letters == (letters[:n] * len(letters))[: len(letters)])


def _layers_to_theirs(family, config):
    """Their fields of windows and of layers that rotate nothing."""
    letters = _letters(config)
    # Gemma's and OLMo 3's code makes a mask for layers that slide, also where there are none
    unused = config.context_length if family.default_pattern else None
    theirs = {"sliding_window": config.window if "S" in letters else unused} if "S" in family.letters else {}
    if "L" in family.letters and len(family.letters) > 1:
        theirs["layer_types"] = [SLIDES if letter == "S" else FULL for letter in letters]
    if "use_sliding_window" in family.defaults:
        theirs["use_sliding_window"] = "S" in letters
    if "N" in family.letters:
        theirs["no_rope_layers"] = [int(letter != "N") for letter in letters]
    elif "use_sliding_window" in family.defaults:  # programs without layer_types count the first that do not slide
        theirs["max_window_layers"] = (letters + "S").index("S")
    return theirs


def _rotary_from_theirs(family, theirs, letters):
    """rope_theta, rope_scaling and local_rope_theta.

    transformers 5 has all in rope_parameters, 4 each as a field, with rope_scaling for layers that do not slide.
    """
    parameters = theirs.get("rope_parameters") or {}
    if family.local_rope is None or not parameters.keys() & {SLIDES, FULL}:
        full = _rotation(theirs, parameters or theirs.get("rope_scaling") or {}, theirs["rope_theta"])
        local = full if family.local_rope is None else (float(theirs[family.local_rope]), None)
    else:
        full = _rotation(theirs, parameters.get(FULL) or {}, theirs["rope_theta"])
        local = _rotation(theirs, parameters.get(SLIDES) or {}, theirs[family.local_rope])
    if "S" not in letters or local == full:
        local = (None, None)
    elif set(letters) == {"S"}:
        full, local = local, (None, None)
    if local[1] is not None:
        raise ValueError(f"rope_parameters of {SLIDES} are scaled, and not as those of {FULL}")
    return {"rope_theta": full[0], "rope_scaling": full[1], "local_rope_theta": local[0]}


def _rotation(theirs, parameters, theta):
    """(rope_theta, rope_scaling) of one of their rope_parameters or rope_scaling."""
    options = {name: value for name, value in parameters.items() if value is not None}
    kind = options.pop("rope_type", None) or options.get("type") or "default"
    options.pop("type", None)
    theta = float(options.pop("rope_theta", None) or theta)
    if options.pop("partial_rotary_factor", 1.0) != 1.0 or (theirs.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError("partial_rotary_factor is not 1, and only whole heads that are rotated can be converted")
    if kind != "default" and "factor" not in options:
        raise ValueError(f"rope_type is {kind!r}, but its factor is missing")
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, ("linear", options["factor"])
    if kind in ("yarn", "llama3"):
        options.setdefault("original_max_position_embeddings", theirs.get("max_position_embeddings"))
        return theta, (kind, options)
    raise ValueError(f"rope_type is {kind!r}, and only default, linear, yarn and llama3 can be converted")


def _rotary_to_theirs(family, config):
    """Their fields of our rotation, for transformers 5 and 4."""
    sliding, full = _angles(config)
    usual = [(config.rope_theta, config.rope_scaling)]
    if family.local_rope is None:
        theta, scaling = _their_rotation(config, *(full + sliding + usual)[0])
        older, parameters = {}, {**scaling, "rope_theta": theta}
    else:
        theta, scaling = _their_rotation(config, *(full + usual)[0])
        local_theta, local_scaling = _their_rotation(config, *(sliding + usual)[0])
        older = {family.local_rope: local_theta}
        parameters = {
            SLIDES: {**local_scaling, "rope_theta": local_theta},
            FULL: {**scaling, "rope_theta": theta},
        }
    older |= {} if scaling["rope_type"] == "default" else {"rope_scaling": scaling}
    return {**older, "rope_theta": theta, "rope_parameters": parameters}


def _their_rotation(config, theta, scaling):
    """(rope_theta, the rest of rope_parameters)."""
    if scaling is None:
        return theta, {"rope_type": "default"}
    kind, value = scaling
    if kind == "ntk":  # only another base
        return theta * value ** (config.head_dim / (config.head_dim - 2)), {"rope_type": "default"}
    return theta, {"rope_type": kind, **({"factor": value} if kind == "linear" else value)}
