"""Hugging Face's models on our attention: `register_attention` registers it with transformers under a name.

    from model.huggingface import register_attention
    register_attention()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sliding_gqa")

transformers takes two functions. One makes the mask of a forward pass, once for each kind of layer; the other attends,
in every layer, with that mask. Ours makes `starts` (B, 1, 1, S) int32 in its place, the first position of each key's
document, as `sliding_gqa_attention` takes it: padding and packed documents are documents. It makes None where neither
can be. Then the kernels run, with the window of the layer. Everything else that a mask can say gets transformers' own
mask and exact attention in plain PyTorch, with T x S scores. No mask is ignored.
"""

import functools
import inspect
import warnings

import torch
import torch.nn.functional as F
from einops import rearrange

from kernels import document_starts, sliding_gqa_attention
from kernels.backend import check_backend
from kernels.band import visible_mask
from kernels.checks import check_window

# What the layers of a model may be. Those of the second line do not attend, or as full_attention; others change masks.
KNOWN_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"} | {
    "linear_attention", "conv", "mamba", "attention", "moe", "mlp", "hybrid"
}  # fmt: skip
READ_THEIR_MASK = {"doge"}  # model_type of models that compute with the mask: they need one of all pairs
# model_type of encoders, whose queries see later keys too -> how many keys fewer than config.sliding_window a query of
# a sliding layer sees on each side. ModernBERT's sliding_window is local_attention // 2
ENCODERS = {"modernbert": 0, "embedding_gemma2_text": 0, "t5_gemma_module": 0, "gemma3_text": 1}
_registered = set()


def register_attention(name="sliding_gqa", *, backend="auto"):
    """Make our attention available as attn_implementation=name in transformers; returns the name.

    backend    of the kernels, as in `sliding_gqa_attention`.

    It runs any architecture with causal attention, in training and generation, with dynamic and static caches, and the
    encoders ModernBERT, EmbeddingGemma (both versions) and T5Gemma. The kernels run in all layers: with padding on
    either side, with documents packed by position_ids or cu_seq_lens_q, and with caches. Plain PyTorch runs for your
    own masks, attention dropout, single tokens into a static cache, models that change the causal mask, and attention
    of a decoder to its encoder. The forward raises ValueError for what it cannot do: return attention weights, attend
    to later tokens in other architectures, continuous batching, a padding mask with zeros between ones (on a GPU, where
    it is not read, each run of ones is a document then). Raises ValueError for a name that transformers gives another
    meaning and for an unknown backend; ImportError without transformers 5.4 or newer.
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
    AttentionMaskInterface.register(name, _starts_or_mask)
    _registered.add(name)
    return name


def _starts_or_mask(
    batch_size,
    q_length,
    kv_length,
    q_offset=0,
    kv_offset=0,
    *,
    mask_function,
    attention_mask=None,
    local_size=None,
    allow_is_causal_skip=True,
    use_vmap=False,
    config=None,
    device=None,
    **others,
):
    """None, or starts (B, 1, 1, S) int32 for the kernels, or (B, 1, T, S) bools, True where a query sees a key.

    mask_function    (row, head, query, key) -> whether the query sees the key, padding aside; index tensors broadcast.
    attention_mask   (B, tokens so far) of bools, False on padding; None: no padding.
    local_size       the window of a sliding layer, or the size of chunks; None on a layer that sees all earlier keys.
    allow_is_causal_skip   False if documents are packed, if the causal mask is changed, for single tokens into a static
                     cache, whose graph must not change, and for models that need a mask.
    Queries are at positions q_offset .. and keys at kv_offset .. (a sliding cache has dropped earlier ones). starts may
    be shorter than the keys: those after it are a static cache's unwritten ones.
    """
    parts = _parts(mask_function, attention_mask)
    packed = not allow_is_causal_skip and _packed(parts, q_length, kv_length, attention_mask)
    if _is_encoder(config):
        needs_mask = kv_length != q_length or not _is_mask_of_an_encoder(config, parts, use_vmap, others)
    else:
        needs_mask = (
            use_vmap  # for masks that users and models of images change
            or getattr(mask_function, "__name__", None) == "or_mask"
            or "allow_is_bidirectional_skip" in others
            or not (allow_is_causal_skip or packed)
            or getattr(config, "model_type", None) in READ_THEIR_MASK
        )
    written = None if needs_mask else _written(q_length, kv_length, q_offset, kv_offset)
    if written is None or not _layers_know(config, local_size):
        from transformers.masking_utils import sdpa_mask

        # sdpa_mask must not return None where every query sees every key: here None leaves it to the layer's window
        skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            use_vmap=use_vmap,
            config=config,
            device=device,
            **{**others, **skips},
        )

    if attention_mask is not None:
        end = kv_offset + written
        attention_mask = F.pad(attention_mask, (0, max(0, end - attention_mask.shape[1])))[:, kv_offset:end]
        # on a GPU, looking at the values would wait for them
        if attention_mask.is_cpu and not _captured(attention_mask) and attention_mask.all():
            attention_mask = None
    document_ids = None
    if packed or (local_size is not None and getattr(config, "attention_chunk_size", None) is not None):
        # a key that the next position does not see ends a document
        key = torch.arange(written - 1, device=device)[None] + kv_offset
        row = torch.arange(batch_size, device=device)[:, None]
        ends = ~mask_function(row, torch.zeros_like(row), key + 1, key)
        document_ids = F.pad(ends.cumsum(1), (1, 0))
    elif attention_mask is None:
        if written == kv_length:
            return None
        document_ids = torch.zeros(1, written, dtype=torch.int32, device=device)
    try:
        starts = document_starts(document_ids=document_ids, attention_mask=attention_mask)
    except ValueError as error:
        raise ValueError(f"{error}: pad on one side, to generate on the left, or give a mask (B, 1, T, S)") from None
    return starts.expand(batch_size, -1)[:, None, None]


def _parts(mask_function, attention_mask):
    """The names of the functions that mask_function combines; None while a graph is captured, which cannot look."""
    if _captured(attention_mask):
        return None
    found = [mask_function]
    for function in found:
        for cell in getattr(function, "__closure__", None) or ():
            inner = cell.cell_contents if isinstance(cell.cell_contents, tuple) else (cell.cell_contents,)
            found += [part for part in inner if callable(part) and part not in found]
    return {getattr(function, "__qualname__", "") for function in found}


def _packed(parts, q_length, kv_length, attention_mask):
    """Whether transformers found packed documents; then they are one of the parts of the mask function."""
    if parts is None:  # transformers takes each such call for packed
        return attention_mask is None and q_length == kv_length > 1
    return any("packed_sequence" in name for name in parts)


def _is_encoder(config):
    """Whether config is of a model whose queries see later keys, as ENCODERS says; not of a decoder beside it."""
    return (
        getattr(config, "model_type", None) in ENCODERS
        and not getattr(config, "is_decoder", False)
        and getattr(config, "use_bidirectional_attention", True)
    )


def _is_mask_of_an_encoder(config, parts, use_vmap, others):
    """Whether the mask is that of the encoder's layers themselves, and neither a causal one nor changed.

    Gemma 3 makes it by a change of the causal mask, the others by transformers' function for both sides, which says
    whether a mask without padding may be left out: not if it is changed.
    """
    if config.model_type != "gemma3_text":
        return others.get("allow_is_bidirectional_skip", False)
    if parts is None:
        return use_vmap
    own = ("Gemma3TextModel.forward.", "_bidirectional_window_overlay.")
    return any(name.startswith(own) for name in parts) and not any("blockwise" in name for name in parts)


def _written(q_length, kv_length, q_offset, kv_offset):
    """How many of the keys are written, as a number of the host: the last query is at the last of them.

    A static cache counts on the device, so that reading the number waits for it, as transformers' own masks do. None in
    a graph, where it cannot be read, and if the keys are fewer.
    """
    if isinstance(q_offset, torch.Tensor) and _captured(q_offset):
        return None
    written = int(q_offset) + q_length - kv_offset
    return written if written <= kv_length else None


def _layers_know(config, local_size):
    """Whether `_window` gives the layers for which a mask with that local_size is made what the mask would say."""
    layer_types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if layer_types is not None and not set(layer_types) <= KNOWN_LAYERS:
        return False
    if local_size is None:
        return layer_types is not None or window is None
    return local_size in (window, getattr(config, "attention_chunk_size", None))


def _window(module, others, causal=True):
    """The window of a layer: what it says itself, else what its config says of it; None if it sees all earlier keys.

    Of an encoder's layer it is (left, right).
    """
    config = getattr(module, "config", None)
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if "sliding_window" in others:
        window = others["sliding_window"]
    elif layer_types is not None and layer_types[module.layer_idx] != "sliding_attention":
        window = None
    if causal:
        return window
    # what the layer says is made for flash-attention, and in T5Gemma not what its mask says
    side = None if window is None else config.sliding_window - ENCODERS[config.model_type]
    return side, side


def _captured(tensor):
    """Whether a graph is being captured, during which the values of tensors cannot be read."""
    from transformers.utils.import_utils import is_tracing

    return is_tracing(tensor if isinstance(tensor, torch.Tensor) else None)


def _attend(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    softcap=None,
    s_aux=None,
    is_causal=None,
    backend="auto",
    **others,
):
    """One layer: ((B, T, Hq, D), None) of query (B, Hq, T, D), key and value (B, Hkv, S, D), already rotated.

    attention_mask   of `_starts_or_mask`, or the user's own (B, 1 or Hq, T, S): bools, or numbers to add to the scores.
    s_aux            the sinks (Hq,) of gpt-oss.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    _refuse(module, causal, others)
    starts = None
    if attention_mask is not None and attention_mask.dtype == torch.int32:
        starts, attention_mask = attention_mask[:, 0, 0], None
        key, value = key[:, :, : starts.shape[1]], value[:, :, : starts.shape[1]]
    if attention_mask is None:
        starts = _with_documents(starts, module, len(query), key.shape[2], others)
        window = _window(module, others, causal)
    if attention_mask is None and not dropout:
        out = sliding_gqa_attention(
            query, key, value, window, starts=starts, scale=scaling, softcap=softcap, sinks=s_aux, backend=backend
        )
    else:
        if dropout:
            warnings.warn(
                f"attention_dropout is {dropout} while training: attention runs in plain PyTorch, because the fused "
                "kernels have no dropout (with 0, training uses them)",
                stacklevel=2,
            )
        if attention_mask is None:
            window, right = check_window(window)
            attention_mask = visible_mask(
                query.shape[2], key.shape[2], window, query.device, right=right, starts=starts
            )
        out = _masked_attention(query, key, value, attention_mask, scaling, softcap, s_aux, dropout)
    return out.transpose(1, 2).contiguous(), None


def _refuse(module, causal, others):
    """Raise ValueError for arguments that would otherwise be ignored."""
    if not causal and getattr(getattr(module, "config", None), "model_type", None) not in ENCODERS:
        raise ValueError(
            f"{type(module).__name__} looks at later tokens too, which this attention does for ModernBERT, "
            "EmbeddingGemma and T5Gemma only: load the model with attn_implementation='sdpa', or a dict that names one "
            "for each part of it"
        )
    if others.get("output_attentions") or getattr(getattr(module, "config", None), "output_attentions", False):
        raise ValueError("output_attentions: the weights are never computed; load with attn_implementation='eager'")
    if others.get("position_bias") is not None:
        raise ValueError(f"{type(module).__name__} adds a position bias: load it with attn_implementation='eager'")
    if others.get("cache") is not None:
        raise ValueError("continuous batching is not supported: load the model with attn_implementation='sdpa'")


def _with_documents(starts, module, batch_size, length, others):
    """starts (B, length) or None, and the documents of the new tokens, which transformers does not put into every mask.

    It sees them in position_ids if there is neither a cache nor a mask for padding, in gpt-oss never, and never in
    cu_seq_lens_q.
    """
    given = others.get("position_ids"), others.get("cu_seq_lens_q")
    documents = _once_a_forward(module, lambda: _documents(*given, batch_size, length), *given)
    if documents is None:
        return starts
    earlier = length - documents.shape[1]
    if earlier:  # the keys of a cache: the first document goes on with them
        documents = F.pad((documents + earlier) * (documents > 0), (earlier, 0))
    documents = documents.to(torch.int32).expand(batch_size, -1)
    return documents.contiguous() if starts is None else torch.maximum(starts, documents)


def _documents(position_ids, cu_seq_lens, batch_size, length):
    """(B or 1, T) int32, the starts of the documents that position_ids and cu_seq_lens pack into rows; None: of none.

    A document begins where a position is 0 again, or smaller than the one before. On a GPU, where positions are not
    read, there may be one document a row.
    """
    given = {}
    if position_ids is not None and position_ids.dim() == 2 and position_ids.shape[1] > 1:
        begins = (position_ids[:, 1:] == 0) | (position_ids[:, 1:] < position_ids[:, :-1])
        if not begins.is_cpu or _captured(begins) or begins.any():
            given["document_ids"] = F.pad(begins.cumsum(1), (1, 0))
    if cu_seq_lens is not None and len(cu_seq_lens) > 2:
        if batch_size > 1:
            raise ValueError(f"cu_seq_lens_q is for one row, and the batch has {batch_size}: give position_ids (B, T)")
        given["cu_seqlens"] = cu_seq_lens
        given["length"] = length if position_ids is None else position_ids.shape[-1]
    return document_starts(**given) if given else None


_latest = (None, None, None)


def _once_a_forward(module, make, *inputs):
    """make(), called in the first layer of a forward pass, and its result in those that follow with the same inputs.

    A forward pass visits layers in rising order, so a layer that is not above the latest begins another one: the inputs
    may have been written to since.
    """
    global _latest
    layer = getattr(module, "layer_idx", None)
    if layer is None or torch.compiler.is_compiling():
        return make()
    last_layer, known, result = _latest
    if last_layer is None or layer <= last_layer or any(a is not b for a, b in zip(inputs, known, strict=True)):
        result = make()
    _latest = layer, inputs, result
    return result


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
