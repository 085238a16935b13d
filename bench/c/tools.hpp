// What every measurement shares: the clock, the streams of norms, the cold cache, the dependent load, one output line.
//
// Output is one line per round and metric, separated by tabs; medians, ratios and tables are made in one place, bench/common.py.
#ifndef AUTOCLIP_BENCH_TOOLS_HPP
#define AUTOCLIP_BENCH_TOOLS_HPP

#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

inline volatile double sink; // results go here, so that no compiler may drop the work

[[noreturn]] inline void die(const std::string &message) {
    std::fprintf(stderr, "kernel benchmark: %s\n", message.c_str());
    std::exit(1);
}

inline uint64_t now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return static_cast<uint64_t>(time.tv_sec) * 1000000000u + static_cast<uint64_t>(time.tv_nsec);
}

// What an empty timed region shows: taken off every single-operation time.
inline uint64_t timer_overhead() {
    static const uint64_t overhead = [] {
        std::vector<uint64_t> empty(10001);
        for (uint64_t &sample : empty) {
            const uint64_t start = now();
            sample = now() - start;
        }
        std::nth_element(empty.begin(), empty.begin() + 5000, empty.end());
        return empty[5000];
    }();
    return overhead;
}

inline double without_overhead(uint64_t elapsed) {
    return elapsed > timer_overhead() ? static_cast<double>(elapsed - timer_overhead()) : 0.0;
}

template <class Work> double time_of(Work work) {
    const uint64_t start = now();
    work();
    return static_cast<double>(now() - start);
}

struct Random { // xoshiro256++ by Blackman and Vigna: the same numbers with every standard library
    uint64_t state[4];

    explicit Random(uint64_t seed) {
        for (uint64_t &word : state) { // splitmix64
            seed += 0x9E3779B97F4A7C15u;
            uint64_t z = seed;
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
            z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
            word = z ^ (z >> 31);
        }
    }
    static uint64_t rotate(uint64_t x, int by) { return (x << by) | (x >> (64 - by)); }
    uint64_t bits() {
        const uint64_t result = rotate(state[0] + state[3], 23) + state[0];
        const uint64_t shifted = state[1] << 17;
        state[2] ^= state[0];
        state[3] ^= state[1];
        state[1] ^= state[2];
        state[0] ^= state[3];
        state[2] ^= shifted;
        state[3] = rotate(state[3], 45);
        return result;
    }
    double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
    uint64_t below(uint64_t limit) { return static_cast<uint64_t>(uniform() * static_cast<double>(limit)); }
    double normal() { return std::sqrt(-2 * std::log(1 - uniform())) * std::cos(6.283185307179586 * uniform()); }
};

// Norms as training gives them: log-normal around a level that stays, that falls over three decades from the first norm
// to the last, or that falls over three decades every thousand steps and starts again.
inline std::vector<double> make_stream(const std::string &kind, size_t count, uint64_t seed) {
    Random random(seed);
    std::vector<double> norms(count);
    for (size_t i = 0; i < count; i++) {
        const double fall = kind == "drifting"   ? static_cast<double>(i) / static_cast<double>(count)
                            : kind == "sawtooth" ? static_cast<double>(i % 1000) / 1000
                                                 : 0;
        norms[i] = std::pow(10, -3 * fall) * std::exp((kind == "sawtooth" ? 0.05 : 0.5) * random.normal());
    }
    if (kind == "ascending" || kind == "descending") std::sort(norms.begin(), norms.end());
    if (kind == "descending") std::reverse(norms.begin(), norms.end());
    return norms;
}

// Memory as a program of any kind gets it: 4 KiB pages, or huge ones where the system grants them on advice.
class Pages {
  public:
    Pages(size_t bytes, bool huge) : bytes_(bytes) {
        const size_t step = size_t{1} << 21;
        mapped_ = bytes + step;
        base_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base_ == MAP_FAILED) die("out of memory");
        const uintptr_t aligned = (reinterpret_cast<uintptr_t>(base_) + step - 1) / step * step;
        data_ = reinterpret_cast<char *>(aligned);
#if defined(MADV_HUGEPAGE)
        madvise(data_, bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#else
        (void)huge;
#endif
    }
    Pages(const Pages &) = delete;
    Pages &operator=(const Pages &) = delete;
    ~Pages() { munmap(base_, mapped_); }
    char *data() { return data_; }
    size_t size() const { return bytes_; }

  private:
    size_t bytes_, mapped_;
    void *base_;
    char *data_;
};

// One dependent random load: every cache line of the footprint names the next one, in one random cycle through all.
class DependentLoad {
  public:
    DependentLoad(size_t bytes, bool huge, uint64_t seed) : pages_(std::max(bytes, size_t{64} * 64), huge) {
        const size_t lines = pages_.size() / line;
        Random random(seed);
        std::vector<uint32_t> cycle(lines);
        for (size_t i = 0; i < lines; i++) cycle[i] = static_cast<uint32_t>(i);
        for (size_t i = lines - 1; i > 0; i--) // Sattolo: one cycle through all lines
            std::swap(cycle[i], cycle[random.below(i)]);
        for (size_t i = 0; i < lines; i++)
            *reinterpret_cast<char **>(pages_.data() + i * line) = pages_.data() + cycle[i] * line;
        at_ = pages_.data();
    }
    void hop(size_t count) {
        char *at = at_;
        for (size_t i = 0; i < count; i++) at = *reinterpret_cast<char *volatile *>(at);
        at_ = at;
        sink = static_cast<double>(at - pages_.data());
    }
    // Once around, or far enough to bring the caches to what they are in the long run.
    void settle() { hop(std::min<size_t>(pages_.size() / line, 2000000)); }
    uint64_t timed_hop() {
        const uint64_t start = now();
        hop(1);
        return now() - start;
    }

  private:
    static constexpr size_t line = 64;
    Pages pages_;
    char *at_;
};

// Walks a buffer larger than the caches, as the tensors of a training step would; this is never timed.
class Flusher {
  public:
    explicit Flusher(size_t bytes) : pages_(bytes, false) { std::fill(pages_.data(), pages_.data() + bytes, 1); }
    void flush() {
        uint64_t sum = 0;
        for (size_t i = 0; i + 64 <= pages_.size(); i += 64)
            sum += *reinterpret_cast<volatile uint64_t *>(pages_.data() + i);
        sink = static_cast<double>(sum);
    }

  private:
    Pages pages_;
};

// Bytes that malloc holds for the program now, its own headers included; 0 where that cannot be asked.
inline double malloc_bytes() {
#if defined(__GLIBC__)
    const struct mallinfo2 info = mallinfo2();
    return static_cast<double>(info.uordblks + info.hblkhd);
#else
    return 0;
#endif
}

struct Reporter {
    std::string experiment, stream;
    uint64_t size;
    void line(const std::string &subject, const std::string &metric, int round, double value) const {
        std::printf("%s\t%s\t%llu\t%s\t%s\t%d\t%.9g\n", experiment.c_str(), stream.c_str(),
                    static_cast<unsigned long long>(size), subject.c_str(), metric.c_str(), round, value);
        std::fflush(stdout);
    }
    // p50, p99, p99.9, largest and mean of single-operation times; sorts the samples.
    void distribution(const std::string &subject, const std::string &metric, int round,
                      std::vector<double> &samples) const {
        std::sort(samples.begin(), samples.end());
        const double last = static_cast<double>(samples.size() - 1);
        double sum = 0;
        for (double sample : samples) sum += sample;
        line(subject, metric + " p50", round, samples[static_cast<size_t>(last * 0.5)]);
        line(subject, metric + " p99", round, samples[static_cast<size_t>(last * 0.99)]);
        line(subject, metric + " p99.9", round, samples[static_cast<size_t>(last * 0.999)]);
        line(subject, metric + " max", round, samples.back());
        line(subject, metric + " mean", round, sum / static_cast<double>(samples.size()));
    }
};

#endif
