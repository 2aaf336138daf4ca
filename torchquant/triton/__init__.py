"""Triton kernels for the operators on CUDA: fused, with the same bits as the CPU kernels.

``ops`` has the operators, one module per family; ``kernels`` has their kernels, ``gemm`` the
integer matrix products, ``tuning`` the choice of a configuration by measuring. An operator returns
``NotImplemented`` for a call that it leaves to the ATen fallback (``csrc/aten``).
:mod:`torchquant.cuda` registers the operators. ``import torchquant`` does not import this package,
because triton is optional and takes long to import.

Why the bits are the same: the kernels are compiled with ``enable_fp_fusion=False``, so that a fused
multiply-add exists only where :func:`~torchquant.triton.kernels.language.fma` is written. Divisions
are IEEE divisions (Triton's ``/`` is not). No function of libdevice is used, because those may
flush denormals. No floating-point sum across threads has an order that can vary.
"""
