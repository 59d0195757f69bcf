// The arithmetic of both multi-label ops, for device code.
#pragma once

#include "../math/row_stats.h"

namespace ups::cuda {
namespace {

#include "../math/multilabel.inl"

}  // namespace
}  // namespace ups::cuda
