"""Hugging Face's models on our attention: `register_attention` registers it with transformers under a name.

    from model.huggingface import register_attention
    register_attention()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sliding_gqa")

transformers takes two functions. One makes the mask of a forward pass, once for each kind of layer; the other attends,
in every layer, with that mask. Ours makes no mask if each query sees exactly the `window` newest keys, or all earlier
keys: then the kernels run. Padding, packed documents, static caches and the user's own masks need a mask, and get exact
attention in plain PyTorch, with T x S scores. No mask is ignored.
"""

import functools
import inspect
import warnings

import torch
import torch.nn.functional as F
from einops import rearrange

from kernels import sliding_gqa_attention
from kernels.backend import check_backend
from kernels.band import visible_mask

# model_type, in transformers, of models that pass each layer's window to its attention; tests check it. Others only put
# the window into the mask, which must then be made.
PASS_THEIR_WINDOW = {"mistral", "gemma2", "gemma3_text", "gpt_oss", "starcoder2", "phi3", "qwen2"}
_registered = set()


def register_attention(name="sliding_gqa", *, backend="auto"):
    """Make our attention available as attn_implementation=name in transformers; returns the name.

    backend    of the kernels, as in `sliding_gqa_attention`.

    It runs any architecture with causal attention, in training and generation, with dynamic and static caches. The
    kernels run in layers without a special mask: sliding layers of PASS_THEIR_WINDOW, and all layers of models without
    a window. The forward raises ValueError for what it cannot do: return attention weights, attend to later tokens,
    continuous batching. Raises ValueError for a name that transformers gives another meaning and for an unknown
    backend; ImportError without transformers 5.4 or newer.
    """
    check_backend(backend)
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, sdpa_mask

        has_offsets = "q_offset" in inspect.signature(sdpa_mask).parameters
    except ImportError:
        has_offsets = False
    if not has_offsets:
        raise ImportError("register_attention needs transformers: pip install 'transformers>=5.4'")
    # transformers recognises its own implementations by parts of a name, such as "flash" and "org/repository"
    if not name.isidentifier() or "flash" in name or (name in ALL_MASK_ATTENTION_FUNCTIONS and name not in _registered):
        raise ValueError(f"name is {name!r}, which transformers takes for one of its own: choose another word")

    AttentionInterface.register(name, functools.partial(_attend, backend=backend))
    AttentionMaskInterface.register(name, _mask_or_none)
    _registered.add(name)
    return name


def _mask_or_none(
    batch_size,
    q_length,
    kv_length,
    q_offset=0,
    kv_offset=0,
    *,
    attention_mask=None,
    local_size=None,
    allow_is_causal_skip=True,
    config=None,
    **others,
):
    """None if the kernels need no mask, else (B, 1, T, S) bools, True where a query sees a key.

    attention_mask   (B, tokens so far) of bools, False on padding; None: no padding.
    local_size       the window of a sliding layer; None on a layer that sees all earlier keys.
    Queries are at positions q_offset .. and keys at kv_offset .. (a sliding cache has dropped earlier ones).
    """
    from transformers.masking_utils import sdpa_mask

    windowed = local_size is not None or getattr(config, "sliding_window", None) is not None
    if (
        allow_is_causal_skip  # False for packed documents, images and other changes of the causal mask
        and (not windowed or config.model_type in PASS_THEIR_WINDOW)
        and _last_positions_match(q_offset + q_length, kv_offset + kv_length)
        and _no_padding(attention_mask, kv_offset, kv_length)
    ):
        return None
    # sdpa_mask must not return None for a mask where every query sees every key: here None means causal
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        attention_mask=attention_mask,
        local_size=local_size,
        config=config,
        **{**others, **skips},
    )


def _last_positions_match(queries, keys):
    """Whether the last query is at the last key. A static cache has unwritten keys, and its offset is a tensor."""
    return not isinstance(queries, torch.Tensor) and queries == keys


def _no_padding(attention_mask, kv_offset, kv_length):
    if attention_mask is None:
        return True
    return not _captured(attention_mask) and bool(attention_mask[:, kv_offset : kv_offset + kv_length].all())


def _captured(tensor):
    """Whether a graph is being captured, during which the values of tensors cannot be read."""
    from transformers.utils.import_utils import is_tracing

    return is_tracing(tensor)


def _attend(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    sliding_window=None,
    softcap=None,
    s_aux=None,
    is_causal=None,
    backend="auto",
    **others,
):
    """One layer: ((B, T, Hq, D), None) of query (B, Hq, T, D), key and value (B, Hkv, S, D), already rotated.

    attention_mask   of `_mask_or_none`, or the user's own (B, 1 or Hq, T, S): bools, or numbers to add to the scores.
    s_aux            the sinks (Hq,) of gpt-oss.
    """
    _refuse(module, attention_mask, is_causal, others)
    if attention_mask is None and not dropout:
        out = sliding_gqa_attention(
            query, key, value, sliding_window, scale=scaling, softcap=softcap, sinks=s_aux, backend=backend
        )
    else:
        if dropout:
            warnings.warn(
                f"attention_dropout is {dropout} while training: attention runs in plain PyTorch, because the fused "
                "kernels have no dropout (with 0, training uses them)",
                stacklevel=2,
            )
        if attention_mask is None:
            attention_mask = visible_mask(query.shape[2], key.shape[2], sliding_window, query.device)
        out = _masked_attention(query, key, value, attention_mask, scaling, softcap, s_aux, dropout)
    return out.transpose(1, 2).contiguous(), None


def _refuse(module, attention_mask, is_causal, others):
    """Raise ValueError for arguments that would otherwise be ignored."""
    if is_causal is False or (is_causal is None and not getattr(module, "is_causal", True)):
        raise ValueError(
            f"{type(module).__name__} looks at later tokens too, and this attention is causal: load the model with "
            "attn_implementation='sdpa', or a dict that names one for each part of it"
        )
    if others.get("output_attentions") or getattr(getattr(module, "config", None), "output_attentions", False):
        raise ValueError("output_attentions: the weights are never computed; load with attn_implementation='eager'")
    if others.get("position_bias") is not None:
        raise ValueError(f"{type(module).__name__} adds a position bias: load it with attn_implementation='eager'")
    if others.get("cache") is not None:
        raise ValueError("continuous batching is not supported: load the model with attn_implementation='sdpa'")
    if attention_mask is None and _packs_documents(module, **others):
        raise ValueError(
            f"documents are packed, but {type(module).__name__} got no mask that keeps them apart: give position_ids "
            "from 0 in each document, use_cache=False and no attention_mask, or a mask (B, 1, T, S) of your own"
        )


def _packs_documents(module, position_ids=None, cu_seq_lens_q=None, **_):
    """Whether a row of the forward pass holds several documents: positions start again at 0, or lengths are given.

    Without a cache, transformers makes a mask from the positions in most models, in gpt-oss never.
    """
    if cu_seq_lens_q is not None and len(cu_seq_lens_q) > 2:
        return True
    # once a forward pass, in layer 0: reading values makes the host wait for the device
    if position_ids is None or getattr(module, "layer_idx", None) != 0 or _captured(position_ids):
        return False
    return bool((position_ids[..., 1:] == 0).any())


def _masked_attention(query, key, value, mask, scale, softcap, sinks, dropout):
    """Attention through any mask that broadcasts to (B, Hq, T, S), in query's dtype: (B, Hq, T, D)."""
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=query.shape[1] > key.shape[1]
        )
    Hkv = key.shape[1]
    grouped = rearrange(query, "b (hkv g) t d -> b hkv g t d", hkv=Hkv)
    scores = grouped @ rearrange(key, "b hkv s d -> b hkv 1 d s")
    scores = rearrange(scores, "b hkv g t s -> b (hkv g) t s").float()
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    # finite, so that a row of padding, which sees no key, gives finite numbers and gradients
    lowest = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else (scores + mask).clamp(min=lowest)
    if sinks is not None:
        scores = torch.cat((scores, sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), dim=-1)
    weights = F.dropout(scores.softmax(-1)[..., : key.shape[2]].to(value.dtype), dropout)
    out = rearrange(weights, "b (hkv g) t s -> b hkv g t s", hkv=Hkv) @ rearrange(value, "b hkv s d -> b hkv 1 s d")
    return rearrange(out, "b hkv g t d -> b (hkv g) t d")
