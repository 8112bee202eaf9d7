// Weights in huge pages. The kernels read eight rows of W at once, each in a page of its own, and find 4 KiB of them by
// one entry of the processor's table of pages; in pages of 2 MiB that table holds all of W (measured:
// docs/design/cpu-kernel.md).
#pragma once

#include <cstddef>
#include <memory>

namespace nmsparse {

// A copy of a weight in huge pages, one for all who ask for it, for as long as somebody holds it; or null where it would
// be no use, since the system has no huge pages, or memory in addition, since the original does not lie in a file. What
// lies in a file is mapped from there: its pages are given back once they are copied, and whoever reads them again gets
// them from the file.
std::shared_ptr<void const> in_huge_pages(void const* data, size_t bytes);

}  // namespace nmsparse
