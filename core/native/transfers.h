// Many transfers between a file and memory at once, by the asynchronous I/O of the kernel (io_submit(2)).
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <vector>

namespace hillinfer {

struct Transfer {
    uint64_t offset, length;
    uint64_t least;   // of a read: where the file may end; of a write: length
    uint8_t *memory;  // null: a buffer of the queue, for at most Transfers::kBufferBytes
};

class Transfers {
  public:
    static constexpr size_t kDepth = 64;               // most that are in flight
    static constexpr uint64_t kBufferBytes = 128 << 10; // page-aligned, one for each in flight

    // The queue of this process, made at first use and never destroyed.
    static Transfers &instance();

    // Carries out `transfers`, in any order and at most `depth` at once, and calls done(i, memory) after each; returns errno, and the bytes
    // that were moved. Short transfers go on, from a multiple of kPage with `direct`. A read that ends before
    // `least` is EIO, a write that the medium takes no more of is ENOSPC. After an error no more are started,
    // and those in flight are waited for. Blocks; calls from different threads take turns. Without `direct`,
    // and where the kernel has no queue to give, transfers are plain calls, of large reads from a few threads:
    // `done` then is called from several at once.
    int run(int fd, bool write, bool direct, size_t depth, const std::vector<Transfer> &transfers,
            const std::function<void(size_t, const uint8_t *)> &done, uint64_t *moved);

  private:
    Transfers();
    int plain(int fd, bool write, uint64_t unit, const std::vector<Transfer> &transfers,
              const std::function<void(size_t, const uint8_t *)> &done, uint64_t *moved);

    std::mutex turn_;
    unsigned long context_ = 0;  // aio_context_t, 0 for none
    uint8_t *buffers_;           // kDepth of kBufferBytes; untouched pages cost nothing
    pid_t pid_;
};

}  // namespace hillinfer
