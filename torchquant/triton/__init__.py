"""Triton kernels for the operators on CUDA: fused, with the bits of the CPU's kernels.

Each family of operators is a module with plain functions of the operators' signatures in
``OPERATORS``; a function returns ``NotImplemented`` for a call that it leaves to the ATen fallback
(``csrc/aten``). :mod:`torchquant.cuda` registers them. ``import torchquant`` does not import this
package: triton is optional, and importing it takes time.

How the bits come out equal: kernels are compiled with ``enable_fp_fusion=False``, so that a fused
multiply-add is one only where :func:`~torchquant.triton.language.fma` is written; divisions are
IEEE divisions (``/`` is not, in Triton); no function of libdevice is used, since those may flush
denormals; nothing is added in floating point across threads in an order that could vary.
"""
