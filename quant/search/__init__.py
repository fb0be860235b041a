"""Searches: for each group of weights, the scale (minimum, grid points) that rounds it best.

Groups are columns: **element index on axis 0, groups on axis 1**. A sum along axis 0 then adds in the order in which
ggml's C loops add, so every result has the same bits, and SIMD runs across groups. Multiplications and additions are
separate, and einsum serves only where it rounds in between (`base.dot`): nothing is fused on any machine, so all agree.
Every class names the C function that it equals (ggml/src/ggml-quants.c); what they do not do: pack the results.
"""
