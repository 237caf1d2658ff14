#include "compute_pool.h"

#include <unistd.h>

#include <algorithm>
#include <system_error>
#include <thread>

namespace hillinfer {

namespace {

void alone(size_t count, const std::function<void(size_t)> &job) {
    for (size_t i = 0; i < count; ++i) job(i);
}

}  // namespace

ComputePool::ComputePool() : pid_(getpid()) {}

ComputePool &ComputePool::instance() {
    static std::mutex mutex;
    static ComputePool *pool = nullptr;
    std::lock_guard<std::mutex> lock(mutex);
    // A forked child has the object but not its threads.
    if (pool == nullptr || pool->pid_ != getpid()) pool = new ComputePool();
    return *pool;
}

void ComputePool::run(size_t count, size_t threads, const std::function<void(size_t)> &job) {
    if (count <= 1 || threads <= 1) return alone(count, job);  // needs nobody else, so it takes no turn either
    std::lock_guard<std::mutex> turn(turn_);
    share(count, threads, job);
}

void ComputePool::run_now(size_t count, size_t threads, const std::function<void(size_t)> &job) {
    if (count <= 1 || threads <= 1) return alone(count, job);
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn) return alone(count, job);
    share(count, threads, job);
}

void ComputePool::share(size_t count, size_t threads, const std::function<void(size_t)> &job) {
    const size_t wanted = std::min(count, threads) - 1;
    size_t asked;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        job_ = &job;
        count_ = count;
        next_.store(0, std::memory_order_relaxed);
        start_threads(wanted);
        asked = tickets_ = active_ = std::min(wanted, threads_);
    }
    for (size_t i = 0; i < asked; ++i) wake_.notify_one();
    work();
    std::unique_lock<std::mutex> lock(mutex_);
    // Jobs are all taken: whoever has not come yet need not come.
    active_ -= tickets_;
    tickets_ = 0;
    done_.wait(lock, [this] { return active_ == 0; });
}

void ComputePool::start_threads(size_t wanted) {
    while (threads_ < wanted) {
        try {
            std::thread([this] { serve(); }).detach();
        } catch (const std::system_error &) {
            return;  // under a thread limit fewer threads, at worst the caller alone, do the same work
        }
        ++threads_;
    }
}

void ComputePool::work() {
    for (size_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) (*job_)(i);
}

void ComputePool::serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
        wake_.wait(lock, [this] { return tickets_ > 0; });
        --tickets_;
        lock.unlock();
        work();
        lock.lock();
        if (--active_ == 0) done_.notify_one();
    }
}

}  // namespace hillinfer
