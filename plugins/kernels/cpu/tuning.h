// What decides which way a product goes and what it is cut into. Speed depends on it, no bit of a result does.
#pragma once

#include <cstdint>

namespace nmsparse::cpu {

// Measured on an Intel Xeon of 2023 by benchmarks/cpu.py; another processor may want other numbers, which
// benchmarks/tuning.py --write finds for the panels.
struct Tuning {
    int64_t worth_waking = 1 << 15;  // numbers: to select among fewer takes less time than to wake a thread

    // A panel costs so much that it pays from t tokens on where t * (read * group - 6 * keep) >= cost * group: with
    // float32 from 32 where half is kept and from 19 where a quarter is, with 16 bits from 20 and 12. Of integers few rows
    // are held at once, as many vectors are read of each: there from 9 and 8, and from 15 where all is kept.
    struct Panels {
        int64_t cost, read;
    };
    Panels of_float{64, 5}, of_sixteen_bits{40, 5}, of_integers{60, 10};

    int64_t widest = 1024, narrowest = 64;  // columns of a tile of panels
    int64_t longest = 16384;                // columns of a tile of few tokens
    int64_t short_row = 1024;               // bytes of a row that are not worth cutting
};

inline constexpr Tuning TUNING{};

}  // namespace nmsparse::cpu
