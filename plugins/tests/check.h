// How the programs of the tests say what fails, and count it.
#pragma once

#include <cstdio>

inline int failures = 0;

#define CHECK(CONDITION)                                                \
    do {                                                                \
        if (!(CONDITION)) {                                             \
            std::printf("%s:%d: %s\n", __FILE__, __LINE__, #CONDITION); \
            ++failures;                                                 \
        }                                                               \
    } while (false)
