// Python face of mixture.h and hashes.h; arguments as stretch_python in megatron_commute/mixture.py and sum_of_hashes in
// megatron_commute/record/tally.py.
#include "mixture.h"

#include "hashes.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

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

uint64_t sum_of_hashes(const Array<int64_t>& index, const Array<int64_t>& domain, const Array<int64_t>& position,
                       const std::vector<Array<int64_t>>& parts, const Array<uint64_t>& factors) {
    int64_t rows = 0;
    for (const auto& part : parts) {
        if (part.ndim() != 2) throw std::invalid_argument("tokens: give arrays of two dimensions");
        check_size(factors, "factors", std::max<int64_t>(3, part.shape(1)));
        rows += part.shape(0);
    }
    check_size(index, "index", rows);
    check_size(domain, "domain", rows);
    check_size(position, "position", rows);
    py::gil_scoped_release release;
    uint64_t sum = 0;
    int64_t row = 0;
    for (const auto& part : parts) {
        const int64_t n = part.shape(1);
        for (int64_t i = 0; i < part.shape(0); ++i, ++row) {
            const int64_t place[3] = {index.data()[row], domain.data()[row], position.data()[row]};
            sum += commute::sample_hash(place, part.data() + i * n, factors.data(), n);
        }
    }
    return sum;
}

}  // namespace

PYBIND11_MODULE(_mixture, module) {
    module.doc() = "Stretch of megatron_commute.mixture and sum_of_hashes of record.tally; results as in Python.";
    module.def("stretch", &stretch, py::arg("weights").noconvert(), py::arg("credit").noconvert(), py::arg("elapsed"),
               py::arg("first"), py::arg("served").noconvert(), py::arg("origin").noconvert(),
               py::arg("room").noconvert(), py::arg("spare"), py::arg("domain").noconvert().none(true),
               py::arg("position").noconvert().none(true), py::arg("n"));
    module.def("sum_of_hashes", &sum_of_hashes, py::arg("index").noconvert(), py::arg("domain").noconvert(),
               py::arg("position").noconvert(), py::arg("parts").noconvert(), py::arg("factors").noconvert());
}
