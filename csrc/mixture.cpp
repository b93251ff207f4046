// Python face of mixture.h; arguments as stretch_python in megatron_commute/mixture.py.
#include "mixture.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>

namespace py = pybind11;

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

namespace {

void check_size(const py::array& array, const char* name, int64_t size) {
    if (array.ndim() != 1 || array.shape(0) < size) {
        throw std::invalid_argument(std::string(name) + ": give a one-dimensional array of " + std::to_string(size));
    }
}

int64_t stretch(const Array<double>& weights, const Array<double>& credit, int64_t elapsed, bool first,
                Array<int64_t>& served, const Array<int64_t>& origin, Array<int64_t>& room, int64_t spare,
                std::optional<Array<int64_t>> domain, std::optional<Array<int64_t>> position, int64_t n) {
    const int64_t K = weights.size();
    check_size(credit, "credit", K);
    check_size(served, "served", K);
    check_size(origin, "origin", K);
    check_size(room, "room", K);
    if (domain.has_value() != position.has_value()) throw std::invalid_argument("give domain and position, or neither");
    if (domain) check_size(*domain, "domain", n), check_size(*position, "position", n);
    commute::Contest contest(weights.data(), credit.data(), served.data(), origin.data(), K);
    if (contest.domain.empty()) throw std::invalid_argument("no domain has a positive weight: give one of them some");
    int64_t* to_domain = domain ? domain->mutable_data() : nullptr;
    int64_t* to_position = position ? position->mutable_data() : nullptr;
    int64_t *counts = served.mutable_data(), *rooms = room.mutable_data();
    py::gil_scoped_release release;
    return commute::stretch(contest, elapsed, first, counts, rooms, spare, to_domain, to_position, n);
}

}  // namespace

PYBIND11_MODULE(_mixture, module) {
    module.doc() = "Compiled stretch of megatron_commute.mixture; same results as stretch_python.";
    module.def("stretch", &stretch, py::arg("weights").noconvert(), py::arg("credit").noconvert(), py::arg("elapsed"),
               py::arg("first"), py::arg("served").noconvert(), py::arg("origin").noconvert(),
               py::arg("room").noconvert(), py::arg("spare"), py::arg("domain").noconvert().none(true),
               py::arg("position").noconvert().none(true), py::arg("n"));
}
