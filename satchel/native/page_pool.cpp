// A page pool behind torch's CPU allocator: resident bytes equal the peak of live bytes, run after run.
//
// The C library keeps freed buffers in a heap that fragments: one training step of live peak P holds 1.3-1.6 P, and
// identical runs differ. Mapping each buffer afresh is exact but pays a page fault for every 4 KiB at every use. Here
// freed pages are kept, and a request that no free extent can hold is put together from several of them with
// mremap(2), which moves page-table entries and copies nothing. So no free page stays idle while a fresh one is taken,
// and a page is faulted in once in the life of the process.
//
// Buffers under `kSmall` go to torch's default allocator, and are counted. A limit makes allocation fail as CUDA's does
// (torch.OutOfMemoryError), before the operating system is asked. Linux only.

#include <c10/core/Allocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <malloc.h>
#include <sys/mman.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>

namespace {

constexpr size_t kPage = 4096;
constexpr size_t kSmall = 16 << 10;
constexpr size_t kMoves = 4 << 10;     // between two counts of the kernel's mappings; each makes two at most
constexpr size_t kMappings = 48'000;  // beyond, free pages are given back: a process may have 65530

using Address = uintptr_t;

struct Stats {
  size_t live, peak, free, faulted, moved, limit, small;  // bytes; live and peak include small
};

class PagePool final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device cpu(c10::DeviceType::CPU);
    if (bytes < kSmall) {
      void* data = c10::alloc_cpu(bytes);
      std::lock_guard<std::mutex> guard(mutex_);
      const size_t small = data ? malloc_usable_size(data) : 0;
      stats_.small += small;
      grow(small);
      report(data, small);
      return {data, data, &release, cpu};
    }
    const size_t size = (bytes + kPage - 1) / kPage * kPage;
    std::lock_guard<std::mutex> guard(mutex_);
    TORCH_CHECK_WITH(OutOfMemoryError, !stats_.limit || stats_.live - stats_.small + size <= stats_.limit,
                     "satchel memory budget: ", size, " bytes more than the ", stats_.live - stats_.small,
                     " in use would pass the limit of ", stats_.limit);
    const Address at = find(size);
    TORCH_CHECK_WITH(OutOfMemoryError, at, "satchel memory budget: the system gave no more memory for ", size, " bytes");
    live_[at] = size;
    grow(size);
    void* data = reinterpret_cast<void*>(at);
    report(data, size);
    return {data, data, &release, cpu};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  Stats stats() {
    std::lock_guard<std::mutex> guard(mutex_);
    return stats_;
  }

  void set_limit(size_t bytes) {
    std::lock_guard<std::mutex> guard(mutex_);
    stats_.limit = bytes;
  }

  void reset_peak() {
    std::lock_guard<std::mutex> guard(mutex_);
    stats_.peak = stats_.live;
  }

  // Gives every free page back to the system.
  void trim() {
    std::lock_guard<std::mutex> guard(mutex_);
    trim_free();
  }

  static PagePool& instance() {
    static PagePool* pool = new PagePool;  // never destroyed: tensors may outlive static destruction
    return *pool;
  }

 private:
  static void release(void* data) {
    if (!data) return;
    PagePool& pool = instance();
    {
      std::lock_guard<std::mutex> guard(pool.mutex_);
      if (const auto it = pool.live_.find(reinterpret_cast<Address>(data)); it != pool.live_.end()) {
        pool.stats_.live -= it->second;
        pool.report(data, -static_cast<int64_t>(it->second));
        pool.put(it->first, it->second);
        pool.live_.erase(it);
        return;
      }
      const size_t small = malloc_usable_size(data);
      pool.stats_.small -= small;
      pool.stats_.live -= small;
      pool.report(data, -static_cast<int64_t>(small));
    }
    c10::free_cpu(data);
  }

  void grow(size_t size) {
    stats_.live += size;
    stats_.peak = std::max(stats_.peak, stats_.live);
  }

  // Tells torch.profiler, if it listens.
  void report(void* data, int64_t size) const {
    if (c10::memoryProfilingEnabled())
      c10::reportMemoryUsageToProfiler(data, size, stats_.live, stats_.live + stats_.free, c10::Device(c10::DeviceType::CPU));
  }

  // The smallest free extent that holds `size`, else a new range made of free pages and, last, of fresh ones.
  Address find(size_t size) {
    if (const auto it = by_size_.lower_bound({size, 0}); it != by_size_.end()) {
      const auto [extent, at] = *it;
      take(at, extent);
      if (extent > size) put(at + size, extent - size);
      return at;
    }
    void* range = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (range == MAP_FAILED) {  // too many mappings, or no addresses
      trim_free();
      range = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    }
    if (range == MAP_FAILED) return 0;
    const Address base = reinterpret_cast<Address>(range);
    size_t filled = 0;
    while (filled < size && !by_size_.empty()) {
      filled += move_largest(base + filled, size - filled);
      if (moves_ < kMoves) continue;
      moves_ = 0;
      if (mappings() > kMappings) trim_free();
    }
    seams_.insert(base + filled);
    seams_.insert(base + size);
    stats_.faulted += size - filled;
    return base;
  }

  // Moves the head of the largest free extent, up to the next seam, to `to`; the bytes moved.
  size_t move_largest(Address to, size_t room) {
    const auto [extent, at] = *by_size_.rbegin();
    take(at, extent);
    size_t piece = std::min(extent, room);
    if (const auto seam = seams_.upper_bound(at); seam != seams_.end()) piece = std::min(piece, *seam - at);
    if (extent > piece) put(at + piece, extent - piece);
    void* moved = mremap(reinterpret_cast<void*>(at), piece, piece, MREMAP_MAYMOVE | MREMAP_FIXED, reinterpret_cast<void*>(to));
    if (moved == MAP_FAILED) {  // too many mappings: let these pages go and fault fresh ones in
      unmap(at, piece);
      stats_.faulted += piece;
    } else {
      stats_.moved += piece;
      ++moves_;
      forget_seams(at, piece);
      seams_.insert({at, at + piece, to});
    }
    return piece;
  }

  void unmap(Address at, size_t size) {
    munmap(reinterpret_cast<void*>(at), size);
    forget_seams(at, size);
    seams_.insert({at, at + size});
  }

  // Those within a range that is no longer mapped.
  void forget_seams(Address at, size_t size) { seams_.erase(seams_.upper_bound(at), seams_.lower_bound(at + size)); }

  // How many the process has; the kernel refuses any more than vm.max_map_count.
  static size_t mappings() {
    std::ifstream maps("/proc/self/maps");
    return std::count(std::istreambuf_iterator<char>(maps), {}, '\n');
  }

  void trim_free() {
    for (const auto& [at, size] : by_address_) unmap(at, size);
    by_address_.clear();
    by_size_.clear();
    stats_.free = 0;
  }

  // Returns an extent to the free set, joined with its free neighbours.
  void put(Address at, size_t size) {
    stats_.free += size;
    auto next = by_address_.lower_bound(at);
    if (next != by_address_.end() && next->first == at + size) {
      size += next->second;
      by_size_.erase({next->second, next->first});
      next = by_address_.erase(next);
    }
    if (next != by_address_.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second == at) {
        at = before->first;
        size += before->second;
        by_size_.erase({before->second, before->first});
        by_address_.erase(before);
      }
    }
    by_address_[at] = size;
    by_size_.insert({size, at});
  }

  void take(Address at, size_t size) {
    by_address_.erase(at);
    by_size_.erase({size, at});
    stats_.free -= size;
  }

  std::mutex mutex_;
  std::map<Address, size_t> by_address_;            // free extents, none adjacent to another
  std::set<std::pair<size_t, Address>> by_size_;    // the same, smallest first
  std::set<Address> seams_;                         // where one kernel mapping may end and another begin
  std::unordered_map<Address, size_t> live_;
  size_t moves_ = 0;  // since the mappings were counted
  Stats stats_{};
};

}  // namespace

extern "C" {
void satchel_pool_install() { c10::SetAllocator(c10::DeviceType::CPU, &PagePool::instance(), 100); }
void satchel_pool_stats(Stats* out) { *out = PagePool::instance().stats(); }
void satchel_pool_limit(size_t bytes) { PagePool::instance().set_limit(bytes); }
void satchel_pool_reset_peak() { PagePool::instance().reset_peak(); }
void satchel_pool_trim() { PagePool::instance().trim(); }
}
