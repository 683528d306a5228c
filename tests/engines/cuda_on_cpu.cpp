// Implements the part of CUDA that sample.cu uses in C++20. Thread blocks run one after another, and each has as many
// threads as on a GPU.
//
// The arguments of main are <kernel> <rows> <vocab> <temperature> <top_k> <top_p>. It reads the logits and uniforms from
// standard input as they are in memory, and writes the tokens to standard output in the same way. If a barrier is not
// reached by every thread, the program ends with a message.

#include <atomic>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(threads)
#define __syncthreads() barrier.arrive(__LINE__)

struct Index {
    unsigned x;
};
inline thread_local Index threadIdx, blockIdx;

// It is made of atomics only, so that it orders memory accesses around one barrier and nothing else. The thread sanitizer
// therefore sees every race.
class Barrier {
    std::atomic<int> waiting = 0, turn = 0, ended = 0, place = 0;
    int threads = 0;

    [[noreturn]] void fail(int line, const char* why) {
        std::fprintf(stderr, "barrier at line %d: %s\n", line, why);
        std::_Exit(3);
    }

   public:
    void begin(int count) { threads = count; }

    void arrive(int line) {
        int now = turn.load(std::memory_order_relaxed), other = 0;
        if (!place.compare_exchange_strong(other, line, std::memory_order_relaxed) && other != line)
            fail(line, "other threads wait at another");
        if (waiting.fetch_add(1) + 1 == threads) {
            place.store(0, std::memory_order_relaxed);
            waiting.store(0, std::memory_order_relaxed);
            turn.fetch_add(1);
            turn.notify_all();
        } else {
            if (ended) fail(line, "another thread has ended");
            turn.wait(now);
        }
    }

    void end() {
        ++ended;
        if (waiting) fail(place, "another thread has ended");
    }
};
inline Barrier barrier;

using std::ceil, std::exp, std::max, std::min;

template <class T>
T __ldg(const T* at) {
    return *at;
}
inline double __longlong_as_double(long long bits) { return std::bit_cast<double>(bits); }
inline long long __double_as_longlong(double value) { return std::bit_cast<long long>(value); }
inline int __clz(int bits) { return std::countl_zero(unsigned(bits)); }
inline int __ffs(int bits) { return bits ? std::countr_zero(unsigned(bits)) + 1 : 0; }
inline unsigned atomicAdd(unsigned* at, unsigned amount) {
    return std::atomic_ref(*at).fetch_add(amount, std::memory_order_relaxed);
}
inline unsigned atomicMax(unsigned* at, unsigned value) {
    std::atomic_ref shared(*at);
    unsigned before = shared.load(std::memory_order_relaxed);
    while (before < value && !shared.compare_exchange_weak(before, value, std::memory_order_relaxed)) {}
    return before;
}

#include SOURCE

template <class T>
std::vector<T> from_input(size_t count) {
    std::vector<T> values(count);
    if (std::fread(values.data(), sizeof(T), count, stdin) != count) std::exit(2);
    return values;
}

template <class T>
void run(void (*kernel)(const T*, const double*, int, double, int, double, long long*), char** argument) {
    int rows = std::atoi(argument[2]), vocab = std::atoi(argument[3]), top_k = std::atoi(argument[5]);
    double temperature = std::atof(argument[4]), top_p = std::atof(argument[6]);
    auto logits = from_input<T>(size_t(rows) * vocab);
    auto uniforms = from_input<double>(rows);
    std::vector<long long> tokens(rows);
    barrier.begin(SAMPLE_THREADS);
    auto thread = [&](unsigned index) {
        threadIdx.x = index;
        // All threads wait between two blocks, because the blocks use the same shared memory here.
        for (blockIdx.x = 0; blockIdx.x < unsigned(rows); ++blockIdx.x) {
            kernel(logits.data(), uniforms.data(), vocab, temperature, top_k, top_p, tokens.data());
            __syncthreads();
        }
        barrier.end();
    };
    std::vector<std::thread> block;
    for (unsigned index = 0; index < SAMPLE_THREADS; ++index) block.emplace_back(thread, index);
    for (auto& each : block) each.join();
    std::fwrite(tokens.data(), sizeof(long long), rows, stdout);
}

int main(int count, char** argument) {
    if (count != 7) return 2;
    std::string kernel = argument[1];
    if (kernel == "sample_fp32") run(sample_fp32, argument);
    if (kernel == "sample_fp16") run(sample_fp16, argument);
    if (kernel == "sample_bf16") run(sample_bf16, argument);
}
