// AVX512-VNNI: vpdpbusd, 64 products an instruction, exact.
#include "kernel_table.h"

#if defined(TQ_X86)
#include <immintrin.h>

#include <cmath>

#include "attention.h"
#include "formats/int8_tiles.h"

TQ_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
namespace torchquant {
namespace avx512vnni {
#include "vec_avx512.inc"
#include "affine.inc"
#include "qat.inc"
#include "activations.inc"
#include "norms.inc"
#include "attention_avx512.inc"
#include "attention_vector.inc"
#include "attention.inc"
#include "fake_quantize.inc"
#include "linear_epilogue.inc"
#include "linear_avx512.inc"
#include "linear_gemm.inc"
}  // namespace avx512vnni

const KernelTable& avx512vnni_kernels() {
  using namespace avx512vnni;
  static constexpr KernelTable table = {"avx512_vnni",
                                        128,
                                        kRows,
                                        kRows,
                                        kTiles,
                                        300.0f,
                                        quantize_rows,
                                        copy_rows,
                                        quantize_pack,
                                        gemm_vector,
                                        quantize_span,
                                        dequantize_span,
                                        activate_span,
                                        normalize_rows,
                                        pack_attention,
                                        attend,
                                        fake_quantize_span,
                                        learned_backward_span,
                                        mask_span,
                                        positive_span,
                                        minmax_span};
  return table;
}
}  // namespace torchquant
TQ_TARGET_END
#endif
