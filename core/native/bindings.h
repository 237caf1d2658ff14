// What the files with Python bindings share.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>

namespace hillinfer {

template <class T, size_t kDims>
using Array = nanobind::ndarray<T, nanobind::ndim<kDims>, nanobind::c_contig, nanobind::device::cpu>;
template <class T, size_t kDims>
using Strided = nanobind::ndarray<T, nanobind::ndim<kDims>, nanobind::device::cpu>;
using Bytes1 = Array<const uint8_t, 1>;

void define_arena(nanobind::module_ &module);
void define_express(nanobind::module_ &module);
void define_moves(nanobind::module_ &module);
void define_predict(nanobind::module_ &module);
void define_repeats(nanobind::module_ &module);
void define_ring(nanobind::module_ &module);

}  // namespace hillinfer
