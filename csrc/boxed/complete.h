// What every operator needs and no operator has to write: found by loops over the schemas.
#pragma once

namespace torchquant {

// Gives each operator without gradients of its own a kernel for autograd that says so. To be called once, when all
// kernels are registered.
void complete_autograd();

// Gives each operator a rule for torch.func.vmap.
void complete_vmap();

}  // namespace torchquant
