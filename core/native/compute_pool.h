// Threads that compute. Idle ones sleep on a condition variable: they never spin.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <functional>
#include <mutex>

namespace hillinfer {

class ComputePool {
  public:
    // The pool of this process, made at first use and never destroyed: its threads end with the process.
    static ComputePool &instance();

    // Calls job(i) for i in 0 .. count-1, in this order, from the calling thread and up to threads - 1 others;
    // returns when all are done. `job` must not throw. Calls from different threads take turns.
    void run(size_t count, size_t threads, const std::function<void(size_t)> &job);

    // As `run`, but waits for nobody's turn: while the threads work for another caller, this one does its jobs alone.
    void run_now(size_t count, size_t threads, const std::function<void(size_t)> &job);

  private:
    ComputePool();
    void share(size_t count, size_t threads, const std::function<void(size_t)> &job);
    void start_threads(size_t wanted);
    void serve();
    void work();

    std::mutex turn_;  // held by the caller whose jobs the threads share
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    size_t threads_ = 0;  // started so far
    size_t tickets_ = 0;  // threads asked to join and not yet there
    size_t active_ = 0;   // threads asked to join and not yet finished
    size_t count_ = 0;
    std::atomic<size_t> next_{0};
    const std::function<void(size_t)> *job_ = nullptr;
    pid_t pid_;
};

}  // namespace hillinfer
