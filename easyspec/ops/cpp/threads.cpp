#include "threads.h"

#include <algorithm>
#include <cstdlib>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace easyspec {

namespace {

// [12 pass][12 phase][20 number of pieces][20 next piece]; the last phase means that the pass is over. Everything that
// tells whether a piece is there stands in the word itself: a thread that was put aside since may read nothing else.
constexpr uint64_t END = 0xfff;
constexpr uint64_t MAX_PIECES = 0xffff0;  // each thread may count some pieces beyond the last

uint64_t ticket(uint64_t pass, uint64_t phase, uint64_t num_pieces) {
  return (pass & 0xfff) << 52 | phase << 40 | num_pieces << 20;
}

uint64_t phase_of(uint64_t ticket) { return ticket >> 40 & 0xfff; }

void pause_briefly(int& num_spins) {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#endif
  // Where other processes want the cores, the thread that is waited for may be one of those put aside.
  if (++num_spins % 2048 == 0) std::this_thread::yield();
}

}  // namespace

ThreadPool::ThreadPool(int num_threads) : num_active_(num_threads < 1 ? 1 : num_threads) {
  ticket_ = ticket(0, END, 0);
  for (int thread = 1; thread < num_threads; thread++) threads_.emplace_back([this, thread] { live(thread); });
}

ThreadPool::~ThreadPool() {
  is_over_ = true;
  num_passes_.fetch_add(1);
  num_passes_.notify_all();
  for (auto& thread : threads_) thread.join();
}

void ThreadPool::use(int num_threads) {
  num_active_ = std::clamp(num_threads, 1, int(threads_.size()) + 1);
}

void ThreadPool::live(int thread) {
  uint32_t seen = 0;
  while (true) {
    num_passes_.wait(seen);
    seen = num_passes_.load();
    if (is_over_) return;
    if (thread < num_active_) take_part(thread);
  }
}

void ThreadPool::run(Work& work) {
  if (num_active_ == 1) {
    for (int64_t phase = 0; phase < work.num_phases(); phase++)
      for (int64_t piece = 0; piece < work.num_pieces(phase); piece++) work.run(phase, piece, 0);
    return;
  }
  work_ = &work;
  num_done_ = 0;
  num_passes_.fetch_add(1);
  publish(0, 0);
  num_passes_.notify_all();
  take_part(0);
}

// Opens the first phase from `phase` on that has work to share, or ends the pass. A phase of a single piece is run here
// and now: the others would only learn of it to wait for it.
void ThreadPool::publish(int64_t phase, int thread) {
  for (; phase < work_->num_phases() && work_->num_pieces(phase) < 2; phase++)
    if (work_->num_pieces(phase) == 1) work_->run(phase, 0, thread);
  const bool is_over = phase >= work_->num_phases();
  const uint64_t next = is_over ? END : uint64_t(phase), num_pieces = is_over ? 0 : uint64_t(work_->num_pieces(phase));
  if (next > END || num_pieces > MAX_PIECES) std::abort();
  ticket_.store(ticket(num_passes_.load(), next, num_pieces), std::memory_order_release);
}

void ThreadPool::take_part(int thread) {
  int num_spins = 0;
  while (true) {
    if (phase_of(ticket_.load(std::memory_order_acquire)) == END) return;
    const uint64_t now = ticket_.fetch_add(1, std::memory_order_acq_rel), phase = phase_of(now);
    if (phase == END) return;
    const int64_t piece = int64_t(now & 0xfffff), num_pieces = int64_t(now >> 20 & 0xfffff);
    if (piece < num_pieces) {
      work_->run(int64_t(phase), piece, thread);
      if (num_done_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_pieces) {
        num_done_.store(0, std::memory_order_relaxed);
        publish(int64_t(phase) + 1, thread);
      }
      continue;
    }
    while (ticket_.load(std::memory_order_acquire) >> 20 == now >> 20) pause_briefly(num_spins);
  }
}

}  // namespace easyspec
