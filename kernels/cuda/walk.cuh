// The walk over tiles with an epilogue, as the GPU at hand can best do it.

#pragma once

#include "walk_ampere.cuh"
#if defined(IDML_FAST_HOPPER)
#include "walk_hopper.cuh"
#endif

namespace idml::cuda {

template <class T, Form FORM, class Epilogue>
void walk_all_tiles(const Walk& walk, const Epilogue& epilogue, void* stream) {
#if defined(IDML_FAST_HOPPER)
  if (is_hopper())
    return hopper::walk_all_tiles<T, FORM>(walk, epilogue, stream);
#endif
  ampere::walk_all_tiles<T, FORM>(walk, epilogue, stream);
}

// All tiles, and once more those in which pairs have cancelled. `epilogue(T())` makes the epilogue
// for embeddings of a type.
template <class MakeEpilogue>
void walk_all(const Walk& walk, const MakeEpilogue& epilogue, void* stream) {
  const auto of_form = [&](auto number, auto form) {
    using T = decltype(number);
    const auto made = epilogue(number);
    walk_all_tiles<T, form.value>(walk, made, stream);
    ampere::walk_flagged_tiles<T, form.value>(walk, made, stream);
  };
  const auto of_type = [&](auto number) {
    if (walk.form == Form::distance) {
      of_form(number, std::integral_constant<Form, Form::distance>());
    } else if (walk.form == Form::cosine) {
      of_form(number, std::integral_constant<Form, Form::cosine>());
    } else {
      of_form(number, std::integral_constant<Form, Form::official>());
    }
  };
  if (walk.dtype == Dtype::bfloat16) {
    of_type(Bfloat16());
  } else if (walk.dtype == Dtype::float16) {
    of_type(Float16());
  } else {
    of_type(float());
  }
}

}  // namespace idml::cuda
