// The stretch of a mixture's stream between two changes of its weights. The plain reference, which gives the same
// bits, is stretch_python in megatron_commute/mixture.py. Compile without contraction to fused multiply-add.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace commute {

constexpr int64_t LANES = 8;

// The domains that can be served (positive weight), each with its weight, its credit when the weights came into
// force and its samples since; padded to whole lanes with entries that never win.
struct Contest {
    std::vector<double> weight, credit, count, excess;
    std::vector<int64_t> domain;

    Contest(const double* weights, const double* credits, const int64_t* served, const int64_t* origin, int64_t K) {
        for (int64_t d = 0; d < K; ++d) {
            if (!(weights[d] > 0.0)) continue;
            add(weights[d], credits[d], static_cast<double>(served[d] - origin[d]), d);
        }
        while (domain.size() % LANES) add(0.0, -std::numeric_limits<double>::infinity(), 0.0, -1);
        excess.resize(domain.size());
    }

    // Index of the greatest excess of target over count at `time`, the lowest one among equals.
    int64_t winner(double time) {
        const int64_t n = static_cast<int64_t>(domain.size());
        const double *w = weight.data(), *c = credit.data(), *m = count.data();
        double* e = excess.data();
        double top[LANES];
        std::fill(top, top + LANES, -std::numeric_limits<double>::infinity());
        for (int64_t j = 0; j < n; j += LANES) {
            for (int64_t l = 0; l < LANES; ++l) {
                e[j + l] = (c[j + l] + w[j + l] * time) - m[j + l];
                top[l] = top[l] > e[j + l] ? top[l] : e[j + l];
            }
        }
        const double best = *std::max_element(top, top + LANES);
        int64_t j = 0;
        while (e[j] != best) ++j;
        return j;
    }

   private:
    void add(double w, double c, double m, int64_t d) {
        weight.push_back(w), credit.push_back(c), count.push_back(m), domain.push_back(d);
    }
};

// Up to n samples under one weight vector; returns how many. elapsed: samples since the weights came into force;
// first: they are the run's first weights, whose sample 0 counts as sample 1 (Megatron's rule). room [K]: samples
// left of each budget, -1 for endless domains, which share `spare`. Updates served [K] and room, writes domain and
// position [n] unless they are null. Stops after the sample that uses up a budget or the spare.
inline int64_t stretch(Contest& contest, int64_t elapsed, bool first, int64_t* served, int64_t* room, int64_t spare,
                       int64_t* domain, int64_t* position, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        const int64_t since = elapsed + i;
        const int64_t j = contest.winner(static_cast<double>(first && since < 1 ? 1 : since));
        const int64_t d = contest.domain[j];
        if (domain != nullptr) {
            domain[i] = d;
            position[i] = served[d];
        }
        contest.count[j] += 1.0;
        served[d] += 1;
        int64_t& left = room[d] >= 0 ? room[d] : spare;
        if (--left == 0) return i + 1;
    }
    return n;
}

}  // namespace commute
