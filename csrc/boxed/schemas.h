// Loops over the operators that a library defines.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <string>
#include <string_view>
#include <vector>

namespace torchquant {

// Of "torchquant" or "torchquant_aten".
inline std::vector<c10::OperatorHandle> operators_of(std::string_view library) {
  std::vector<c10::OperatorHandle> operators;
  for (const c10::OperatorName& name : c10::Dispatcher::singleton().getAllOpNames()) {
    const auto space = name.getNamespace();
    if (!space || *space != library) continue;
    if (const auto op = c10::Dispatcher::singleton().findSchema(name)) operators.push_back(*op);
  }
  return operators;
}

inline std::string short_name(const c10::OperatorHandle& op) {  // without the library's
  const std::string& name = op.schema().name();
  return name.substr(name.rfind(':') + 1);
}

}  // namespace torchquant
