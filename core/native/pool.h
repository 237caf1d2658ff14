// A small pool of threads for blocking reads. Idle threads sleep on a condition variable: they never spin.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>

namespace hillinfer {

class ReadPool {
  public:
    static constexpr size_t kThreads = 16;            // reads in flight, beside the caller's own
    static constexpr size_t kBufferBytes = 128 << 10; // page-aligned, one for each thread

    // The pool of this process, made at first use and never destroyed: its threads end with the process.
    static ReadPool &instance();

    // Calls job(i, buffer) for i in 0 .. count-1 from several threads and the calling one; returns when all
    // are done. `job` must not throw. Calls from different threads take turns.
    void run(size_t count, const std::function<void(size_t, uint8_t *)> &job);

  private:
    ReadPool();
    void start_threads(size_t wanted);
    void serve(uint8_t *buffer);
    void work(uint8_t *buffer);

    std::mutex turn_;  // held by the caller whose jobs are running
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    size_t threads_ = 0;   // started so far
    size_t tickets_ = 0;   // threads asked to join and not yet there
    size_t active_ = 0;    // threads asked to join and not yet finished
    size_t count_ = 0;
    std::atomic<size_t> next_{0};
    const std::function<void(size_t, uint8_t *)> *job_ = nullptr;
    uint8_t *caller_buffer_;
    pid_t pid_;
};

}  // namespace hillinfer
