"""One room a backend. Each is a module with the same names, and `kernels.backend` has the table that finds it.

    why_not(device, dtype, head_dim)                  why it cannot run these, in a line; None if it can
    attend(q, k, v, window, **options)                -> (out, lse): attention, forward
    attend_backward(grad_out, grad_lse, q, k, v, out, lse, window, **options)    -> (dq, dk, dv, dsinks)
    rotate(q, k, cos, sin, *, positions, interleaved, inverse)                   -> (q, k), new tensors
    norm_rotate(q, k, norm, cos, sin, *, positions, interleaved)                 -> (q, k), normalised before
    norm_rotate_backward(grad_q, grad_k, q, k, norm, cos, sin, *, positions, interleaved)
                                                      -> (dq, dk, dq_weight, dk_weight), None for weights that are None
    append(k, v, k_cache, v_cache, lengths, *, rope)                             writes into the rings
    attend_to_cache(q, k_cache, v_cache, lengths, window, num_splits=None, lse=None, **options)    -> out; fills lse
    READS_LENGTHS                                     whether it reads `lengths` on the host, also from a GPU
    BACKWARD_READS_LSE                                whether `attend_backward` reads lse

The options of attention are starts, scale, softcap, sinks and rope, as `sliding_gqa_attention` has them, and right, the
later keys that a query sees (None: all); `attend` also takes with_lse, False where nobody needs lse. Arguments are
checked already, and results have the memory layout of q (k, v).
Two more names are optional: `attend_keeping`, an attention that keeps more for its backward pass, and `token_step`, a
module for one token at a time. banded has both.
"""

if __name__ == "kernels.backends":  # Hugging Face's package `kernels` has a module of this name, too
    from ..namesake import Namesake

    _namesake = Namesake(__name__, __path__)
    __path__ = _namesake.path
    __getattr__ = _namesake.attribute
