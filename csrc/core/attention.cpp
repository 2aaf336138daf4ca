// attention: queries, keys and values are read in place (a transposed view [B, S, H, D] of a projection's output), and
// the result is written in the order in which the output projection reads it. A thread takes blocks of queries and
// packs the keys and values of the current head for itself: no result depends on threads or on the other entries of a
// batch.
#include <algorithm>
#include <atomic>

#include "core/convert.h"
#include "core/threads.h"
#include "core/workspace.h"
#include "isa.h"
#include "kernels/attention.h"

using namespace torchquant;

tq_status tq_attention(const tq_attention_call* call, const tq_parallel* parallel) {
  constexpr int64_t kThreadedProducts = 1 << 19;  // products that a thread should have at least
  const tq_attention_call& c = *call;
  AttentionArgs args{};
  args.q_stride = c.query.row_stride;
  args.k_stride = c.key.row_stride;
  args.v_stride = c.value.row_stride;
  args.mask_stride = c.mask.row_stride;
  args.out_stride = c.heads * c.dv;
  args.queries = c.queries;
  args.keys = c.keys;
  args.d = c.d;
  args.dv = c.dv;
  args.type = float_type(c.type);
  args.mask_type = mask_type(c.mask_type);
  args.scale = c.scale_in_powers_of_2;
  args.causal = c.causal;
  const tq_type mask_element = c.mask_type == TQ_BOOL_MASK ? TQ_U8 : TQ_F32;
  const auto head_of = [](const tq_heads& heads, tq_type type, int64_t b, int64_t h) {
    return element_at(heads.data, type, b * heads.batch_stride + h * heads.head_stride);
  };
  const int64_t heads_per_key = c.key_heads ? c.heads / c.key_heads : 1, blocks = ceil_div(c.queries, kQueryBlock);
  const int64_t work = kQueryBlock * c.keys * (c.d + c.dv);
  const KernelTable& table = kernels();
  std::atomic<tq_status> status{TQ_OK};
  parallel_for(parallel, 0, c.batch * c.heads * blocks, std::max<int64_t>(1, kThreadedProducts / work),
               [&](int64_t first, int64_t last) {
                 AttentionArgs a = args;
                 a.memory = Workspace::of_this_thread().get(AttentionMemory(nullptr, c.keys, c.d, c.dv).bytes);
                 if (!a.memory) {
                   status = TQ_OUT_OF_MEMORY;
                   return;
                 }
                 int64_t packed = -1;
                 for (int64_t unit = first; unit < last; ++unit) {
                   const int64_t block = unit % blocks, h = unit / blocks % c.heads, b = unit / blocks / c.heads;
                   const int64_t key_head = h / heads_per_key;
                   a.q = head_of(c.query, c.type, b, h);
                   a.k = head_of(c.key, c.type, b, key_head);
                   a.v = head_of(c.value, c.type, b, key_head);
                   a.out = element_at(c.out, c.type, (b * c.queries * c.heads + h) * c.dv);
                   if (c.mask_type != TQ_NO_MASK) a.mask = head_of(c.mask, mask_element, b, h);
                   if (packed != b * c.key_heads + key_head) table.pack_attention(a);
                   packed = b * c.key_heads + key_head;
                   table.attend(a, block * kQueryBlock, std::min(c.queries, (block + 1) * kQueryBlock));
                 }
               });
  return status;
}
