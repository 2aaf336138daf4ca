"""The operators that run on Triton's kernels: one module per family.

Every public function of such a module is an operator, with its name and its arguments
(csrc/ops.cpp). It returns ``NotImplemented`` for a call that its kernels do not support, invalid
arguments included: the ATen fallback then computes the call, or raises the error.
``torchquant.cuda.host.FAMILIES`` lists the operators.
"""
