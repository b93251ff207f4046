// Python face of kernels.h: the same functions without _cpu, addresses as integers. Arguments are checked in
// megatron_commute/ops.py. The interpreter runs on meanwhile.
#include <pybind11/pybind11.h>

#include <type_traits>

#include "vectorise.h"

namespace py = pybind11;

namespace {

template <class A>
using Face = std::conditional_t<std::is_pointer_v<A>, std::uintptr_t, A>;

template <class A>
A argument(Face<A> value) {
    if constexpr (std::is_pointer_v<A>) {
        return reinterpret_cast<A>(value);
    } else {
        return value;
    }
}

template <class... A>
void define(py::module_& module, const char* name, void (*function)(A...)) {
    module.def(name, [function](Face<A>... values) {
        py::gil_scoped_release release;
        function(argument<A>(values)...);
    });
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
    module.doc() = "Compiled kernels behind megatron_commute.ops; same results as megatron_commute.kernels.reference.";
    define(module, "norm_forward", commute::norm_forward_cpu);
    define(module, "norm_backward", commute::norm_backward_cpu);
    define(module, "activation_forward", commute::activation_forward_cpu);
    define(module, "activation_backward", commute::activation_backward_cpu);
    define(module, "cross_entropy_statistics", commute::cross_entropy_statistics_cpu);
    define(module, "cross_entropy_backward", commute::cross_entropy_backward_cpu);
    define(module, "attention_forward", commute::attention_forward_cpu);
    define(module, "attention_backward", commute::attention_backward_cpu);
    define(module, "gram", commute::gram_cpu);
    define(module, "displace", commute::displace_cpu);
    module.def("limit_machine", [](int newest) { commute::newest_machine = newest; });
    module.def("pieces", [](int64_t elements) {
        py::list pieces;
        for (int64_t index = 0; index < commute::pieces_of(elements); ++index) {
            const commute::Piece piece = commute::piece_of(elements, index);
            pieces.append(py::make_tuple(piece.begin, piece.end));
        }
        return pieces;
    });
}
