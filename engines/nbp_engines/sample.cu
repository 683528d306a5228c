// Draws one token per row of logits as sampling.py does: top-k, then top-p, then the inverse of the cumulative
// distribution.
//
// One thread block of SAMPLE_THREADS threads draws the token of one row. No result depends on which thread comes first:
// atomics add only integers, and floating-point sums have an order that is fixed by the vocabulary. So equal logits and
// equal noise give equal tokens with every number of threads.
//
// A row is read once to find its largest logit; once per byte of a logit to find the k-th largest logit by counting;
// once per byte to find the logit that crosses top-p by adding weights; once to choose among the tokens that equal that
// logit, if not all of them are kept; and once to draw. These are 7 passes in half precision and 11 in fp32. The first
// pass reads device memory. The others mostly read the L1 cache, which can hold 64,000 logits of two bytes beside the
// 29 KB of Scratch.
//
// The most expensive operation is exp in fp64, which takes about 20 FMAs per token, while an SM of an A100 does 32 of
// them per clock. It is computed only for tokens that are kept so far, which each thread collects first (see `each`):
// in the first pass that adds weights, and in the draw. The second such pass of half precision computes it only for the
// tokens whose upper byte is the one that the first pass found.
//
// The token may differ from numpy's if rounding decides, which takes a sum that equals top-p or the noise to within
// about 1e-12. It may also differ among logits so close that numpy computes equal probabilities for them: here the
// larger logit still comes first. A row with NaN or +inf, or with -inf only, has no probabilities. Its token is 0, as
// in numpy, where all comparisons with NaN are false. tests/engines/test_sample_cu.py runs this file on a CPU, with one
// thread of the CPU per thread of the block.

#ifndef SAMPLE_THREADS
#define SAMPLE_THREADS 1024
#endif

namespace {

typedef unsigned long long u64;

constexpr int THREADS = SAMPLE_THREADS;
constexpr int DIGIT = 8, BINS = 1 << DIGIT;  // the bits of one digit of a key, and the number of its values
constexpr int COPIES = 8;                    // copies of each bin, so that neighbouring threads use other addresses
constexpr int PARTS = 32, LANES = 32;        // parts of a range of the vocabulary, and threads that read one part

struct Scratch {
    unsigned low[BINS * COPIES], high[BINS * COPIES];  // halves of 64-bit sums, whose own atomics would be loops
    u64 cumulative[2][BINS];                           // the weight of a bin and of all bins above it
    double cells[LANES * PARTS], parts[PARTS];
    unsigned largest;
    int chosen;
};

// Converts floating-point numbers of a given width to integer keys with the same order. Both zeros have the same key,
// and every NaN has the largest key.
template <class Bits, int MANTISSA>
struct Format {
    static constexpr int BITS = 8 * sizeof(Bits);
    static constexpr unsigned SIGN = 1u << (BITS - 1);
    static constexpr unsigned INFINITE = (SIGN - 1) >> MANTISSA << MANTISSA;
    static constexpr u64 BIAS = (1 << (BITS - MANTISSA - 2)) - 1;

    static __device__ unsigned key(unsigned bits) {
        unsigned magnitude = bits & (SIGN - 1);
        if (magnitude > INFINITE) return SIGN + (SIGN - 1);
        return bits & SIGN ? SIGN - magnitude : SIGN + magnitude;
    }

    static __device__ double value(unsigned key) {
        u64 magnitude = key < SIGN ? SIGN - key : key - SIGN;
        // The bits of the number, read as an fp64 number, are 2^(1023 - BIAS) times too small, even for subnormals.
        double size = __longlong_as_double(magnitude << (52 - MANTISSA)) * __longlong_as_double((2046 - BIAS) << 52);
        return key < SIGN ? -size : size;
    }

    // The unnormalised probability of a token: exp((logit - peak) * rate), where rate is 1 / temperature. With {0, 0}
    // every token has mass 1.
    struct Mass {
        double peak, rate;
        __device__ double operator()(unsigned key) const { return exp((value(key) - peak) * rate); }
    };
};

template <class Bits, int MANTISSA>
struct Row {
    using F = Format<Bits, MANTISSA>;
    using Mass = typename F::Mass;

    const Bits* logits;
    int vocab;
    Scratch& scratch;

    __device__ unsigned key(int token) const { return F::key(__ldg(logits + token)); }

    // Calls visit(key) for the tokens first, first + stride, … < last. It also calls visit(0) to fill the last batch;
    // no logit has key 0.
    template <class Visit>
    __device__ void scan(int first, int last, int stride, Visit visit) const {
        constexpr int BATCH = 8;  // number of loads in flight
        for (; first < last; first += BATCH * stride) {
            unsigned keys[BATCH];
#pragma unroll
            for (int n = 0; n < BATCH; ++n) keys[n] = first + n * stride < last ? key(first + n * stride) : 0;
#pragma unroll
            for (int n = 0; n < BATCH; ++n) visit(keys[n]);
        }
    }

    // Calls visit(token, key) for those of the tokens first, first + stride, … < last that have keys from `low` to
    // `high`. A thread marks its matches among 32 tokens before it visits any. Visiting each match at once would be
    // slow, because the whole warp waits for every thread with a match.
    template <class Visit>
    __device__ void each(int first, int last, int stride, unsigned low, unsigned high, Visit visit) const {
        for (; first < last; first += 32 * stride) {
            unsigned marks = 0, bit = 1;
            scan(first, min(last, first + 32 * stride), stride, [&](unsigned key) {
                if (key - low <= high - low) marks |= bit;
                bit <<= 1;
            });
            for (; marks; marks &= marks - 1) {
                int token = first + (__ffs(marks) - 1) * stride;
                visit(token, key(token));
            }
        }
    }

    // The largest key of the row.
    __device__ unsigned largest() const {
        unsigned thread_largest = 0;
        scan(threadIdx.x, vocab, THREADS, [&](unsigned key) { thread_largest = max(thread_largest, key); });
        if (threadIdx.x == 0) scratch.largest = 0;
        __syncthreads();
        atomicMax(&scratch.largest, thread_largest);
        __syncthreads();
        return scratch.largest;
    }

    struct Edge {
        unsigned key;
        u64 weight;   // the total weight of the tokens with that key
        u64 missing;  // the target minus the weight of all tokens with larger keys
    };

    // Finds the largest key such that the tokens with this or a larger key have at least the weight target(total),
    // where total is the weight of all tokens. It finds one digit of the key per pass. fill(shift, low, high) adds the
    // weight of every token with a key from `low` to `high` to the bin of the key's digit at bit `shift`.
    template <class Target, class Fill>
    __device__ Edge edge(Target target, Fill fill) const {
        Edge result = {0, 0, 0};
#pragma unroll 1
        for (int shift = F::BITS - DIGIT; shift >= 0; shift -= DIGIT) {
            for (int n = threadIdx.x; n < BINS * COPIES; n += THREADS) scratch.low[n] = scratch.high[n] = 0;
            __syncthreads();
            fill(shift, (u64)result.key << (shift + DIGIT), (((u64)result.key + 1) << (shift + DIGIT)) - 1);
            __syncthreads();
            for (int bin = threadIdx.x; bin < BINS; bin += THREADS) {
                u64 sum = 0;
                for (int n = bin * COPIES; n < (bin + 1) * COPIES; ++n)
                    sum += ((u64)scratch.high[n] << 32) + scratch.low[n];
                scratch.cumulative[0][bin] = sum;
            }
            __syncthreads();
            int current = 0;
            for (int offset = 1; offset < BINS; offset *= 2, current ^= 1) {
                const u64* previous = scratch.cumulative[current];
                for (int bin = threadIdx.x; bin < BINS; bin += THREADS)
                    scratch.cumulative[current ^ 1][bin] =
                        previous[bin] + (bin + offset < BINS ? previous[bin + offset] : 0);
                __syncthreads();
            }
            const u64* cumulative = scratch.cumulative[current];
            if (shift == F::BITS - DIGIT) result.missing = target(cumulative[0]);
            for (int bin = threadIdx.x; bin < BINS; bin += THREADS)
                if (cumulative[bin] >= result.missing && (bin + 1 == BINS || cumulative[bin + 1] < result.missing))
                    scratch.chosen = bin;
            __syncthreads();
            int bin = scratch.chosen;
            u64 above = bin + 1 < BINS ? cumulative[bin + 1] : 0;
            result = {result.key << DIGIT | bin, cumulative[bin] - above, result.missing - above};
        }
        return result;
    }

    // The index, in this thread's copy of the bins, of the bin of the key's digit at bit `shift`.
    static __device__ int bin(unsigned key, int shift) {
        return (key >> shift) % BINS * COPIES + threadIdx.x % COPIES;
    }

    // The k-th largest key. The key 0 that `scan` adds is counted too, but it is smaller than the key of every token.
    __device__ unsigned kth(u64 k) const {
        auto count = [&](int shift, unsigned low, unsigned high) {
            scan(threadIdx.x, vocab, THREADS, [&](unsigned key) {
                if (key - low <= high - low) atomicAdd(&scratch.low[bin(key, shift)], 1u);
            });
        };
        return edge([=](u64) { return k; }, count).key;
    }

    // The key at which the weight, added from the largest key down, reaches the share top_p of the weight of all tokens
    // with keys from `least` up.
    template <class Weight>
    __device__ Edge crossing(double top_p, unsigned least, Weight weight) const {
        auto weigh = [&](int shift, unsigned low, unsigned high) {
            each(threadIdx.x, vocab, THREADS, max(low, least), high, [&](int, unsigned key) {
                u64 added = weight(key);
                unsigned low_half = added, high_half = added >> 32;
                unsigned before = atomicAdd(&scratch.low[bin(key, shift)], low_half);
                high_half += before + low_half < before;  // the carry
                if (high_half) atomicAdd(&scratch.high[bin(key, shift)], high_half);
            });
        };
        return edge([=](u64 total) { return min(total, max((u64)1, (u64)ceil(top_p * total))); }, weigh);
    }

    // The first token whose cumulative mass exceeds u times the total mass. Only tokens with keys from `least` to
    // `most` count, and of those with the key `least` only the tokens before `end`. The range of the vocabulary is
    // divided into parts, and one warp adds the masses of each part. The part with the token becomes the next range.
    __device__ int find(double u, unsigned least, unsigned most, int end, Mass mass) const {
        int first = 0, last = vocab;
        double target = -1, before = 0;
#pragma unroll 1
        do {
            int size = (last - first + PARTS - 1) / PARTS;
            for (int cell = threadIdx.x; cell < LANES * PARTS; cell += THREADS) {
                int part = cell / LANES, lane = cell % LANES, start = first + part * size;
                double sum = 0;
                each(start + lane, min(start + size, last), LANES, least, most, [&](int token, unsigned key) {
                    if (key > least || token < end) sum += mass(key);
                });
                scratch.cells[lane * PARTS + part] = sum;
            }
            __syncthreads();
            for (int part = threadIdx.x; part < PARTS; part += THREADS) {
                double sum = 0;
                for (int lane = 0; lane < LANES; ++lane) sum += scratch.cells[lane * PARTS + part];
                scratch.parts[part] = sum;
            }
            __syncthreads();
            if (target < 0) {
                double total = 0;
#pragma unroll 4
                for (int part = 0; part < PARTS; ++part) total += scratch.parts[part];
                // The product u·total can round up to total, which no cumulative mass exceeds.
                target = min(u * total, __longlong_as_double(__double_as_longlong(total) - 1));
            }
            // The parts of a part are added in another order, and their sum may be smaller than the part's. If it does
            // not exceed the target, the last part with any mass is chosen.
            int chosen = 0;
            double sum = before;
#pragma unroll 4
            for (int part = 0; part < PARTS && sum <= target; ++part)
                if (scratch.parts[part] > 0) {
                    chosen = part, before = sum;
                    sum += scratch.parts[part];
                }
            first += chosen * size;
            last = min(first + size, last);
        } while (last - first > 1);
        return first;
    }

    // The token of the row for the uniform number u.
    __device__ int draw(double u, double temperature, int top_k, double top_p) const {
        constexpr Mass equal_mass = {0, 0};
        unsigned best = largest();
        if (temperature == 0) return find(0, best, best, vocab, equal_mass);
        if (best >= F::SIGN + F::INFINITE || best <= F::SIGN - F::INFINITE) return 0;

        unsigned least = F::SIGN - F::INFINITE + 1;  // the key of the smallest finite logit
        if (top_k < vocab) least = max(least, kth(max(top_k, 1)));

        Mass mass = {F::value(best), 1 / temperature};
        int end = vocab;
        if (top_p < 1) {
            // Weights are masses in integer units. No mass exceeds 1, so the weights add up to 2^63 at most.
            double units = (u64)1 << (__clz(vocab) + 31);
            auto weight = [=](unsigned key) { return (u64)(mass(key) * units + 0.5); };
            Edge cross = crossing(top_p, least, weight);
            least = cross.key;
            // Tokens with the same key have the same weight. Of these ties, the lowest ids are kept.
            u64 each_weight = weight(least), ties = cross.weight / each_weight;
            u64 kept = (cross.missing + each_weight - 1) / each_weight;
            if (kept < ties) end = find((kept - 0.5) / ties, least, least, vocab, equal_mass) + 1;
        }
        return find(u, least, best, end, mass);
    }
};

template <int MANTISSA, class Bits>
__device__ void sample(const Bits* logits, const double* uniforms, int vocab, double temperature, int top_k,
                       double top_p, long long* tokens) {
    __shared__ Scratch scratch;
    Row<Bits, MANTISSA> row = {logits + (u64)blockIdx.x * vocab, vocab, scratch};
    int token = row.draw(uniforms[blockIdx.x], temperature, top_k, top_p);
    if (threadIdx.x == 0) tokens[blockIdx.x] = token;
}

}  // namespace

// The kernels. logits: [rows, vocab], the bits of the numbers. uniforms: [rows] in [0,1). tokens: [rows], the output.
// Launch them with one thread block of SAMPLE_THREADS threads per row.
#define SAMPLE(NAME, BITS, MANTISSA)                                                                          \
    extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS)                                              \
        NAME(const BITS* logits, const double* uniforms, int vocab, double temperature, int top_k,            \
             double top_p, long long* tokens) {                                                               \
        sample<MANTISSA>(logits, uniforms, vocab, temperature, top_k, top_p, tokens);                         \
    }

SAMPLE(sample_fp32, unsigned, 23)
SAMPLE(sample_fp16, unsigned short, 10)
SAMPLE(sample_bf16, unsigned short, 7)
