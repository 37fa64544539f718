// Threads that run the phases of a pass: they spin between phases and sleep between passes.
//
// A phase is a number of independent pieces of work that threads take one at a time, so that a thread which the
// system has put aside, or not yet woken, costs its share of speed and nothing else. Which thread computes a piece
// changes no bit.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace easyspec {

class Work {
 public:
  virtual ~Work() = default;
  virtual int64_t num_phases() const = 0;
  virtual int64_t num_pieces(int64_t phase) const = 0;
  virtual void run(int64_t phase, int64_t piece, int thread) = 0;
};

class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;

  // Threads that take part.
  int num_threads() const { return num_active_; }
  void use(int num_threads);

  // Runs all phases, one after the other, on the calling thread and the others. One call at a time.
  void run(Work& work);

 private:
  void take_part(int thread);
  void live(int thread);
  void publish(int64_t phase, int thread);

  std::atomic<int> num_active_;
  std::vector<std::thread> threads_;
  Work* work_ = nullptr;
  // Pass number, phase and next piece in one word: a thread learns all three by one addition.
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int64_t> num_done_{0};
  alignas(64) std::atomic<uint32_t> num_passes_{0};
  std::atomic<bool> is_over_{false};
};

}  // namespace easyspec
