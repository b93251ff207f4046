// Runs the cases and planted faults named on the command line: main ORDER SEED NAME..., ORDER one of random, ascending,
// descending; a name with a leading + runs with unordered blocks, one with ! is a fault. Exit status 1: a result
// is off its reference; 2: the executor refused; anything else comes from a sanitizer.
#include "case_attention.h"
#include "case_elementwise.h"
#include "case_gram.h"
#include "case_headers.h"
#include "faults.h"

namespace {

struct Case {
    const char* name;
    void (*run)();
};

const Case CASES[] = {
    {"bfloat16", cases::bfloat16},
    {"attention_float", cases::attention_float},
    {"attention_bf16", cases::attention_bf16},
    {"attention_columns", cases::attention_columns},
    {"attention_blocks", cases::attention_blocks},
    {"norm_float", cases::norms<float>},
    {"norm_bf16", cases::norms<__nv_bfloat16>},
    {"activation_float", cases::activations<float>},
    {"activation_bf16", cases::activations<__nv_bfloat16>},
    {"cross_entropy_float", cases::cross_entropies<float>},
    {"cross_entropy_bf16", cases::cross_entropies<__nv_bfloat16>},
    {"elementwise_blocks", cases::elementwise_blocks},
    {"gram", cases::grams},
    {"gram_blocks", cases::gram_blocks},
};

bool run(const char* name) {
    if (*name == '!') return faults::run(name + 1);
    cases::config.unordered_blocks = *name == '+';
    for (const Case& x : CASES) {
        if (std::strcmp(x.name, name + (*name == '+'))) continue;
        printf("%s\n", x.name);
        x.run();
        return true;
    }
    return false;
}

}  // namespace

int main(int count, char** words) {
    if (count < 4) return fprintf(stderr, "main ORDER SEED NAME...\n"), 3;
    cases::config.order = *words[1] == 'r' ? simt::RANDOM : *words[1] == 'a' ? simt::ASCENDING : simt::DESCENDING;
    cases::config.seed = std::strtoull(words[2], nullptr, 10);
    for (int i = 3; i < count; ++i) {
        try {
            if (!run(words[i])) return fprintf(stderr, "no case %s\n", words[i]), 3;
        } catch (const simt::Error& error) {
            return fprintf(stderr, "%s\n", error.what()), 2;
        }
    }
    return cases::failures ? 1 : 0;
}
