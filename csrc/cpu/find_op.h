// Ops of this library by name, for ops that are made of others.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace firp {

template <typename Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace firp
