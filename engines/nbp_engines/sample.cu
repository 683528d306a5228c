// Draws one token a row of logits as sampling.py does: top-k, then top-p, then the inverse of the cumulative
// distribution.
//
// One block of SAMPLE_THREADS a row. Nothing is added in an order that depends on which thread came first: atomics add
// whole numbers alone, and the order of what is added in floating point is fixed by the vocabulary. So equal logits and
// equal noise give equal tokens, at every number of threads.
//
// A row is read once for its maximum; once a byte of the logits' width to find the k-th logit, by counting; once a byte
// to find the logit that crosses top-p, by adding masses; once for the equals at that edge, where not all of them stay;
// once for the draw: 7 passes in half precision, 11 in fp32. The first reads memory and the others L1, which can hold
// 64,000 halves beside the 29 KB of Scratch. exp in fp64 is the dear part: of all 64,000 tokens it means some 20 FMAs
// each, of which an A100's SM does 32 a clock. It is taken of tokens that stay, which threads gather first (`each`), in
// the first pass over masses and in the draw; in half precision the other pass over masses meets one byte's alone.
//
// Where numpy's rounding decides (a sum that meets top-p or the noise to within about 1e-12), the token may differ. So
// it may among logits so close that numpy finds their probabilities equal: here the larger logit still comes first.
// A row with a NaN or +inf, or of -inf alone, has no probabilities: token 0, as numpy's comparisons with NaN make it.
// tests/engines/test_sample_cu.py runs this file on a CPU, thread for thread.

#ifndef SAMPLE_THREADS
#define SAMPLE_THREADS 1024
#endif

namespace {

typedef unsigned long long u64;

constexpr int THREADS = SAMPLE_THREADS;
constexpr int DIGIT = 8, BINS = 1 << DIGIT;  // bits and values of one digit of a key
constexpr int COPIES = 8;                    // of each bin: neighbouring threads do not queue for one address
constexpr int PARTS = 32, LANES = 32;        // of a range of the vocabulary, and of a part; a warp reads one part

struct Scratch {
    unsigned low[BINS * COPIES], high[BINS * COPIES];  // 64-bit sums by halves: a 64-bit atomic would be a loop
    u64 from[2][BINS];                                 // weight of a bin and of all above it
    double cells[LANES * PARTS], parts[PARTS];
    unsigned largest;
    int chosen;
};

// Floating point of a given width as whole numbers in the same order, both zeros one number, every NaN the largest.
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
        // The same digits read with fp64's exponent are 2^(1023 - BIAS) times too small, subnormals too.
        double size = __longlong_as_double(magnitude << (52 - MANTISSA)) * __longlong_as_double((2046 - BIAS) << 52);
        return key < SIGN ? -size : size;
    }

    // What a token weighs: exp of the distance to the peak over the temperature, in fp64. {0, 0}: every token 1.
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

    // visit(key) of the tokens first, first + stride, … < last, and of key 0, which no logit has, to fill the batch.
    template <class Visit>
    __device__ void scan(int first, int last, int stride, Visit visit) const {
        constexpr int BATCH = 8;  // loads under way at once
        for (; first < last; first += BATCH * stride) {
            unsigned keys[BATCH];
#pragma unroll
            for (int n = 0; n < BATCH; ++n) keys[n] = first + n * stride < last ? key(first + n * stride) : 0;
#pragma unroll
            for (int n = 0; n < BATCH; ++n) visit(keys[n]);
        }
    }

    // visit(token, key) of those with keys from `low` to `high`. A thread marks 32 tokens before it visits any: were
    // each visited where it is found, a warp would take as long as if every token of it were visited.
    template <class Visit>
    __device__ void each(int first, int last, int stride, unsigned low, unsigned high, Visit visit) const {
        for (; first < last; first += 32 * stride) {
            unsigned marks = 0, bit = 1;
            scan(first, min(last, first + 32 * stride), stride, [&](unsigned it) {
                if (it - low <= high - low) marks |= bit;
                bit <<= 1;
            });
            for (; marks; marks &= marks - 1) {
                int token = first + (__ffs(marks) - 1) * stride;
                visit(token, key(token));
            }
        }
    }

    __device__ unsigned largest() const {
        unsigned mine = 0;
        scan(threadIdx.x, vocab, THREADS, [&](unsigned it) { mine = max(mine, it); });
        if (threadIdx.x == 0) scratch.largest = 0;
        __syncthreads();
        atomicMax(&scratch.largest, mine);
        __syncthreads();
        return scratch.largest;
    }

    struct Edge {
        unsigned key;
        u64 weight, missing;  // of the tokens with that key; what those above it leave of the target
    };

    // The largest key that has, with all above it, at least target(total) of the weight. fill(shift, low, high) adds
    // the weight of every token with a key from `low` to `high` to the bin of its digit at `shift`.
    template <class Target, class Fill>
    __device__ Edge edge(Target target, Fill fill) const {
        Edge found = {0, 0, 0};
#pragma unroll 1
        for (int shift = F::BITS - DIGIT; shift >= 0; shift -= DIGIT) {
            for (int n = threadIdx.x; n < BINS * COPIES; n += THREADS) scratch.low[n] = scratch.high[n] = 0;
            __syncthreads();
            fill(shift, (u64)found.key << (shift + DIGIT), (((u64)found.key + 1) << (shift + DIGIT)) - 1);
            __syncthreads();
            for (int bin = threadIdx.x; bin < BINS; bin += THREADS) {
                u64 sum = 0;
                for (int n = bin * COPIES; n < (bin + 1) * COPIES; ++n)
                    sum += ((u64)scratch.high[n] << 32) + scratch.low[n];
                scratch.from[0][bin] = sum;
            }
            __syncthreads();
            int now = 0;
            for (int hop = 1; hop < BINS; hop *= 2, now ^= 1) {
                const u64* old = scratch.from[now];
                for (int bin = threadIdx.x; bin < BINS; bin += THREADS)
                    scratch.from[now ^ 1][bin] = old[bin] + (bin + hop < BINS ? old[bin + hop] : 0);
                __syncthreads();
            }
            const u64* from = scratch.from[now];
            if (shift == F::BITS - DIGIT) found.missing = target(from[0]);
            for (int bin = threadIdx.x; bin < BINS; bin += THREADS)
                if (from[bin] >= found.missing && (bin + 1 == BINS || from[bin + 1] < found.missing))
                    scratch.chosen = bin;
            __syncthreads();
            int bin = scratch.chosen;
            u64 above = bin + 1 < BINS ? from[bin + 1] : 0;
            found = {found.key << DIGIT | bin, from[bin] - above, found.missing - above};
        }
        return found;
    }

    static __device__ int bin(unsigned key, int shift) {
        return (key >> shift) % BINS * COPIES + threadIdx.x % COPIES;
    }

    // The k-th largest key. Key 0 is counted too, but lies below every token.
    __device__ unsigned kth(u64 k) const {
        auto count = [&](int shift, unsigned low, unsigned high) {
            scan(threadIdx.x, vocab, THREADS, [&](unsigned it) {
                if (it - low <= high - low) atomicAdd(&scratch.low[bin(it, shift)], 1u);
            });
        };
        return edge([=](u64) { return k; }, count).key;
    }

    // The key whose tokens cross top_p of the weight of all keys from `least` up.
    template <class Weight>
    __device__ Edge crossing(double top_p, unsigned least, Weight weight) const {
        auto weigh = [&](int shift, unsigned low, unsigned high) {
            each(threadIdx.x, vocab, THREADS, max(low, least), high, [&](int, unsigned it) {
                u64 sum = weight(it);
                unsigned part = sum, rest = sum >> 32;
                unsigned before = atomicAdd(&scratch.low[bin(it, shift)], part);
                rest += before + part < before;  // the carry
                if (rest) atomicAdd(&scratch.high[bin(it, shift)], rest);
            });
        };
        return edge([=](u64 total) { return min(total, max((u64)1, (u64)ceil(top_p * total))); }, weigh);
    }

    // Of the tokens with keys from `least` to `most`, those of `least` before `end` alone, the first whose cumulative
    // mass exceeds its share u of the total. Each part of a range is summed by one warp, and the part that is meant
    // becomes the range.
    __device__ int find(double u, unsigned least, unsigned most, int end, Mass mass) const {
        int first = 0, last = vocab;
        double target = -1, before = 0;
#pragma unroll 1
        do {
            int size = (last - first + PARTS - 1) / PARTS;
            for (int cell = threadIdx.x; cell < LANES * PARTS; cell += THREADS) {
                int part = cell / LANES, lane = cell % LANES, start = first + part * size;
                double sum = 0;
                each(start + lane, min(start + size, last), LANES, least, most, [&](int token, unsigned it) {
                    if (it > least || token < end) sum += mass(it);
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
                // u·total can round up to the total itself, beyond the last token.
                target = min(u * total, __longlong_as_double(__double_as_longlong(total) - 1));
            }
            // Within a part the order of adding is another, and its sum may fall short: then its last token is meant.
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

    __device__ int draw(double u, double temperature, int top_k, double top_p) const {
        constexpr Mass even = {0, 0};
        unsigned best = largest();
        if (temperature == 0) return find(0, best, best, vocab, even);
        if (best >= F::SIGN + F::INFINITE || best <= F::SIGN - F::INFINITE) return 0;

        unsigned least = F::SIGN - F::INFINITE + 1;
        if (top_k < vocab) least = max(least, kth(max(top_k, 1)));

        Mass mass = {F::value(best), 1 / temperature};
        int end = vocab;
        if (top_p < 1) {
            // No mass exceeds 1, so that their whole numbers of units, rounded, sum up to 2^63 at most.
            double units = (u64)1 << (__clz(vocab) + 31);
            auto whole = [=](unsigned it) { return (u64)(mass(it) * units + 0.5); };
            Edge cross = crossing(top_p, least, whole);
            least = cross.key;
            u64 one = whole(least), equals = cross.weight / one, stay = (cross.missing + one - 1) / one;
            if (stay < equals) end = find((stay - 0.5) / equals, least, least, vocab, even) + 1;
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

// logits [rows, vocab] as bits, uniforms [rows] in [0,1), tokens [rows]; grid = rows, block = SAMPLE_THREADS.
#define SAMPLE(NAME, BITS, MANTISSA)                                                                          \
    extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS)                                              \
        NAME(const BITS* logits, const double* uniforms, int vocab, double temperature, int top_k,            \
             double top_p, long long* tokens) {                                                               \
        sample<MANTISSA>(logits, uniforms, vocab, temperature, top_k, top_p, tokens);                         \
    }

SAMPLE(sample_fp32, unsigned, 23)
SAMPLE(sample_fp16, unsigned short, 10)
SAMPLE(sample_bf16, unsigned short, 7)
