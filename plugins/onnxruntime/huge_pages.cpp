#include "huge_pages.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <map>
#include <mutex>
#include <new>
#include <string>

#include "../kernels/cpu/layer.h"

namespace nmsparse {

namespace {

using cpu::LINE;
using cpu::round_up;

constexpr size_t HUGE = 2 << 20;  // bytes of a huge page
constexpr size_t CHUNK = 64 << 20;

// Memory for many weights, since few fill huge pages by themselves.
class Chunk {
public:
    explicit Chunk(size_t bytes)
        : size_(bytes + HUGE), start_(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
        if (start_ == MAP_FAILED) throw std::bad_alloc();
        next_ = round_up(reinterpret_cast<uintptr_t>(start_), HUGE), end_ = next_ + bytes;
        madvise(reinterpret_cast<void*>(next_), bytes, MADV_HUGEPAGE);
    }
    Chunk(Chunk const&) = delete;
    Chunk& operator=(Chunk const&) = delete;
    ~Chunk() { munmap(start_, size_); }

    // The place of the next so many bytes, or null where there are not as many.
    void* take(size_t bytes) {
        if (end_ - next_ < bytes) return nullptr;
        void* const place = reinterpret_cast<void*>(next_);
        next_ += bytes;
        return place;
    }

private:
    size_t size_;
    void* start_;
    uintptr_t next_, end_;
};

// Some of a chunk, which lives as long as anybody holds any of it.
struct Copy {
    std::shared_ptr<Chunk> chunk;
    void* place;
    size_t bytes;
};

std::shared_ptr<Copy const> copy_of(void const* data, size_t bytes) {
    static std::mutex mutex;
    static std::weak_ptr<Chunk> latest;
    static std::map<void const*, std::weak_ptr<Copy const>> copies;  // by their originals, for nodes that share one
    std::lock_guard<std::mutex> const lock(mutex);
    for (auto one = copies.begin(); one != copies.end();) one = one->second.expired() ? copies.erase(one) : ++one;
    std::weak_ptr<Copy const>& known = copies[data];
    std::shared_ptr<Copy const> copy = known.lock();
    // An original may be gone, and another weight in its place, before its copy is.
    if (copy != nullptr && copy->bytes == bytes && std::memcmp(copy->place, data, bytes) == 0) return copy;
    size_t const room = round_up(bytes, LINE);
    std::shared_ptr<Chunk> chunk = latest.lock();
    void* place = chunk == nullptr ? nullptr : chunk->take(room);
    if (place == nullptr) {
        latest = chunk = std::make_shared<Chunk>(std::max(room, CHUNK));
        place = chunk->take(room);
    }
    std::memcpy(place, data, bytes);
    known = copy = std::make_shared<Copy const>(Copy{chunk, place, bytes});
    return copy;
}

bool has_huge_pages() {
    std::string line;
    std::getline(std::ifstream("/sys/kernel/mm/transparent_hugepage/enabled"), line);
    return !line.empty() && line.find("[never]") == std::string::npos;
}

// Whether this memory is a file's, mapped for this process alone.
bool is_of_file(uintptr_t begin, uintptr_t end) {
    std::ifstream maps("/proc/self/maps");
    for (std::string line; std::getline(maps, line);) {
        unsigned long first, last, inode;
        char mode[5];
        if (std::sscanf(line.c_str(), "%lx-%lx %4s %*x %*x:%*x %lu", &first, &last, mode, &inode) == 4 && first <= begin &&
            end <= last)
            return inode != 0 && mode[3] == 'p';
    }
    return false;
}

}  // namespace

std::shared_ptr<void const> in_huge_pages(void const* data, size_t bytes) {
    uintptr_t const begin = reinterpret_cast<uintptr_t>(data), end = begin + bytes;
    static bool const possible = has_huge_pages();
    if (bytes == 0 || !possible || !is_of_file(begin, end)) return nullptr;
    std::shared_ptr<Copy const> const copy = copy_of(data, bytes);
    uintptr_t const page = sysconf(_SC_PAGESIZE), first = round_up(begin, page), last = end / page * page;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
    return {copy, copy->place};
}

}  // namespace nmsparse
