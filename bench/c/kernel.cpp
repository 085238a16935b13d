// The C benchmark: one experiment at one size on one stream per run, so that each starts with a fresh heap.
//
//     kernel EXPERIMENT STREAM SIZE ROUNDS OPERATIONS SUBJECTS FLUSH_BYTES
//
// Within a run the subjects take turns in every round, on equal norms. `python -m bench kernel` calls it and reads the
// lines; the experiments are listed at the bottom.
#include "subjects.hpp"

#include <cstring>
#include <functional>
#include <map>

namespace {

struct Plan {
    Reporter report;
    std::string stream;
    size_t size, operations;
    int rounds;
    std::string which;
    size_t flush_bytes;

    std::vector<double> norms(size_t count, uint64_t seed) const { return make_stream(stream, count, seed); }
    // Starts where it leaves no regular distance between a full buffer and the first timed operation.
    size_t start(size_t total, uint64_t seed) const {
        return size - std::min(size / 2, total / 2) + static_cast<size_t>(Random(seed).below(1 + size / 16) % 1024);
    }
};

uint64_t footprint(const Plan &plan) {
    SubjectOf<Autoclip> history;
    const std::vector<double> norms = make_stream("stationary", plan.size, 7);
    history.push(norms.data(), norms.size());
    return history.structure.memory();
}

// Brings a large structure back into the caches that another subject's turn may have taken from it, without changing it:
// what settle() is to the dependent load.
void settle(Subject &subject, const std::vector<double> &norms, size_t stored) {
    constexpr size_t touches = 300000;
    if (stored <= touches) return;
    std::vector<double> some(touches);
    for (size_t i = 0; i < touches; i++) some[i] = norms[i * (stored / touches)];
    subject.ranks(some.data(), some.size());
}

struct Loads {
    DependentLoad huge, small;
    explicit Loads(size_t bytes) : huge(bytes, true, 1), small(bytes, false, 2) {}
    void measure(const Reporter &report, int round, size_t count) {
        huge.settle();
        report.line("dependent load, huge pages", "load", round,
                    time_of([&] { huge.hop(count); }) / static_cast<double>(count));
        small.settle();
        report.line("dependent load, 4 KiB pages", "load", round,
                    time_of([&] { small.hop(count); }) / static_cast<double>(count));
    }
};

// ns per push + percentile(10), per push, and the distribution of single pushes and observes. A round is one block of
// operations on a large history that goes on living, or many blocks on small ones made anew, so that the size stays.
void growth(const Plan &plan) {
    const size_t block = std::min(plan.operations, std::max<size_t>(100, plan.size / 50));
    const bool afresh = plan.size <= 100000;
    const size_t blocks = afresh ? std::max<size_t>(1, plan.operations / block) : 1;
    const size_t warm = block / 2, per_block = warm + 4 * block;
    const size_t total = afresh ? per_block : per_block * static_cast<size_t>(plan.rounds);
    Loads loads(footprint(plan));
    Subjects subjects;
    std::vector<double> norms;
    size_t at = 0;
    for (int round = 0; round < plan.rounds; round++) {
        struct Times {
            double observe = 0, push = 0;
            std::vector<double> push_each, observe_each;
        };
        std::map<std::string, Times> times;
        for (size_t b = 0; b < blocks; b++) {
            const uint64_t seed = 1 + static_cast<uint64_t>(round) * blocks + b;
            if (afresh || round == 0) {
                subjects = make_subjects(plan.which);
                at = plan.start(total, seed);
                norms = plan.norms(at + total, seed);
                for (auto &subject : subjects) subject->push(norms.data(), at);
            }
            for (auto &subject : subjects) {
                Times &time = times[subject->name()];
                const double *next = norms.data() + at;
                if (!afresh) settle(*subject, norms, at);
                if (subject->ranked()) {
                    subject->observe(next, warm);
                    time.observe += time_of([&] { subject->observe(next + warm, block); });
                } else {
                    subject->push(next, warm + block);
                }
                next += warm + block;
                time.push += time_of([&] { subject->push(next, block); });
                next += block;
                for (size_t i = 0; i < block; i++)
                    time.push_each.push_back(without_overhead(subject->timed_push(next[i])));
                next += block;
                for (size_t i = 0; i < block; i++)
                    if (subject->ranked())
                        time.observe_each.push_back(without_overhead(subject->timed_observe(next[i])));
                    else
                        subject->push(next + i, 1);
            }
            at += per_block;
        }
        const double operations = static_cast<double>(block * blocks);
        for (auto &subject : subjects) {
            Times &time = times[subject->name()];
            if (subject->ranked()) {
                plan.report.line(subject->name(), "observe", round, time.observe / operations);
                plan.report.distribution(subject->name(), "single observe", round, time.observe_each);
            }
            plan.report.line(subject->name(), "push", round, time.push / operations);
            plan.report.distribution(subject->name(), "single push", round, time.push_each);
        }
        loads.measure(plan.report, round, plan.operations);
    }
}

// ns per question on a history at rest: the percentile with p unchanged and with random p, random select, random rank.
void query(const Plan &plan) {
    const std::vector<double> norms = plan.norms(plan.size, 1);
    Loads loads(footprint(plan));
    Subjects subjects = make_subjects(plan.which);
    for (auto &subject : subjects) subject->push(norms.data(), norms.size());
    for (int round = 0; round < plan.rounds; round++) {
        Random random(100 + static_cast<uint64_t>(round));
        const std::vector<double> same(plan.operations, paper_percentile);
        std::vector<double> percentiles(plan.operations), values(plan.operations);
        std::vector<uint64_t> ranks(plan.operations);
        for (size_t i = 0; i < plan.operations; i++) {
            percentiles[i] = 100 * random.uniform();
            ranks[i] = random.below(plan.size);
            values[i] = norms[random.below(plan.size)];
        }
        const double operations = static_cast<double>(plan.operations);
        for (auto &subject : subjects) {
            if (!subject->ranked()) continue;
            const auto line = [&](const char *metric, auto work) {
                plan.report.line(subject->name(), metric, round, time_of(work) / operations);
            };
            settle(*subject, norms, plan.size);
            subject->percentiles(same.data(), 1000);
            line("percentile, p unchanged", [&] { subject->percentiles(same.data(), same.size()); });
            line("percentile, p random", [&] { subject->percentiles(percentiles.data(), percentiles.size()); });
            line("select, rank random", [&] { subject->selects(ranks.data(), ranks.size()); });
            line("rank, norm random", [&] { subject->ranks(values.data(), values.size()); });
        }
        loads.measure(plan.report, round, plan.operations);
    }
}

// One operation at a time, the caches walked over in between: what a training step meets. After each walk every subject
// does one operation, in rotating order; they share no data.
void cold(const Plan &plan) {
    const size_t total = plan.operations * static_cast<size_t>(plan.rounds);
    const std::vector<double> norms = plan.norms(plan.size + total, 1);
    Loads loads(footprint(plan));
    Flusher flusher(plan.flush_bytes);
    Subjects subjects = make_subjects(plan.which);
    for (auto &subject : subjects) {
        subject->push(norms.data(), plan.size);
        subject->percentiles(&paper_percentile, 1);
    }
    timer_overhead();
    struct Turn {
        std::string name, metric;
        std::function<uint64_t(double)> timed;
    };
    std::vector<Turn> turns;
    for (auto &subject : subjects)
        if (subject->ranked())
            turns.push_back(
                {subject->name(), "cold observe", [&subject](double x) { return subject->timed_observe(x); }});
    turns.push_back({"dependent load, huge pages", "cold load", [&](double) { return loads.huge.timed_hop(); }});
    turns.push_back({"dependent load, 4 KiB pages", "cold load", [&](double) { return loads.small.timed_hop(); }});
    turns.push_back({"empty timed region", "cold nothing", [](double) {
                         const uint64_t start = now();
                         return now() - start;
                     }});
    size_t at = plan.size;
    for (int round = 0; round < plan.rounds; round++) {
        std::vector<std::vector<double>> samples(turns.size());
        for (size_t i = 0; i < plan.operations; i++, at++) {
            flusher.flush();
            now(); // the clock's own lines
            for (size_t j = 0; j < turns.size(); j++) {
                const size_t turn = (i + j) % turns.size();
                samples[turn].push_back(without_overhead(turns[turn].timed(norms[at])));
            }
        }
        for (size_t j = 0; j < turns.size(); j++)
            plan.report.distribution(turns[j].name, turns[j].metric, round, samples[j]);
        loads.measure(plan.report, round, 100000);
    }
}

// ns per push into a full window of SIZE norms, where each one evicts the oldest, against a push into a history of SIZE.
void window(const Plan &plan) {
    const size_t per_round = 3 * plan.operations / 2, total = per_round * static_cast<size_t>(plan.rounds);
    const std::vector<double> norms = plan.norms(2 * plan.size + total, 1);
    std::vector<std::pair<std::unique_ptr<Subject>, const char *>> subjects;
    auto moving = std::make_unique<SubjectOf<Autoclip>>(plan.size);
    const Autoclip &memory = moving->structure;
    subjects.emplace_back(std::move(moving), "push, window");
    subjects.emplace_back(std::make_unique<SubjectOf<Autoclip>>(), "push");
    subjects.emplace_back(std::make_unique<SubjectOf<PbDs>>(plan.size), "push, window");
    subjects.emplace_back(std::make_unique<SubjectOf<PbDs>>(), "push");
    const size_t first = 2 * plan.size;
    for (auto &[subject, metric] : subjects) // a window must have turned over, a plain history must not be larger
        if (std::strcmp(metric, "push"))
            subject->push(norms.data(), first);
        else
            subject->push(norms.data() + first - plan.size, plan.size);
    for (int round = 0; round < plan.rounds; round++)
        for (auto &[subject, metric] : subjects) {
            const double *next = norms.data() + first + per_round * static_cast<size_t>(round);
            subject->push(next, plan.operations / 2);
            next += plan.operations / 2;
            plan.report.line(subject->name(), metric, round, time_of([&] {
                                                                 subject->push(next, plan.operations);
                                                             }) / static_cast<double>(plan.operations));
        }
    plan.report.line("autoclip", "bytes per norm, window", 0,
                     static_cast<double>(memory.memory()) / static_cast<double>(plan.size));
}

autoclip_history *make_history() {
    autoclip_history *history;
    demand(autoclip_history_create(0, nullptr, &history));
    return history;
}

// ns per norm for SIZE norms at once into an empty history, unsorted and ascending, against std::sort of the same array.
void extend(const Plan &plan) {
    const double size = static_cast<double>(plan.size);
    for (int round = 0; round < plan.rounds; round++) {
        const std::vector<double> norms = plan.norms(plan.size, 1 + static_cast<uint64_t>(round));
        std::vector<double> sorted = norms;
        plan.report.line("std::sort", "sort", round, time_of([&] { std::sort(sorted.begin(), sorted.end()); }) / size);
        for (bool ascending : {false, true}) {
            const std::vector<double> &input = ascending ? sorted : norms;
            autoclip_history *history = make_history();
            plan.report.line("autoclip", ascending ? "extend, ascending" : "extend", round,
                             time_of([&] { demand(autoclip_history_extend(history, input.data(), input.size())); }) /
                                 size);
            autoclip_history_destroy(history);
        }
    }
}

// GB/s of saving and loading SIZE norms pushed in random order, against memcpy of as many bytes into fresh memory and
// into memory that was touched before.
void snapshot(const Plan &plan) {
    const std::vector<double> norms = plan.norms(plan.size, 1);
    autoclip_history *history = make_history();
    for (double norm : norms) demand(autoclip_history_push(history, norm));
    const size_t bytes = autoclip_history_save_size(history);
    std::vector<char> saved(bytes, 1), copy(bytes, 1);
    for (int round = 0; round < plan.rounds; round++) {
        const auto line = [&](const char *subject, const char *metric, double time) {
            plan.report.line(subject, metric, round, static_cast<double>(bytes) / time);
        };
        size_t written;
        line("autoclip", "save",
             time_of([&] { demand(autoclip_history_save(history, saved.data(), saved.size(), &written)); }));
        autoclip_history *loaded;
        line("autoclip", "load",
             time_of([&] { demand(autoclip_history_load(saved.data(), written, nullptr, &loaded)); }));
        autoclip_history_destroy(loaded);
        line("memcpy", "copy", time_of([&] { std::memcpy(copy.data(), saved.data(), bytes); }));
        std::unique_ptr<char[]> fresh(new char[bytes]);
        line("memcpy", "copy into fresh memory", time_of([&] { std::memcpy(fresh.get(), saved.data(), bytes); }));
        sink = fresh[bytes / 2] + copy[bytes / 3];
    }
    autoclip_history_destroy(history);
}

// ns per norm of merging a history of SIZE into another of SIZE, interleaved values, against std::merge of two arrays.
void merge(const Plan &plan) {
    std::vector<double> norms = plan.norms(2 * plan.size, 1);
    const auto half = norms.begin() + static_cast<std::ptrdiff_t>(plan.size);
    autoclip_history *left = make_history(), *right = make_history();
    for (size_t i = 0; i < plan.size; i++) {
        demand(autoclip_history_push(left, norms[i]));
        demand(autoclip_history_push(right, norms[plan.size + i]));
    }
    std::sort(norms.begin(), half);
    std::sort(half, norms.end());
    const double size = static_cast<double>(norms.size());
    for (int round = 0; round < plan.rounds; round++) {
        autoclip_history *target;
        demand(autoclip_history_clone(left, &target));
        plan.report.line("autoclip", "merge", round,
                         time_of([&] { demand(autoclip_history_merge(target, right)); }) / size);
        autoclip_history_destroy(target);
        std::vector<double> merged;
        plan.report.line("std::merge", "merge", round, time_of([&] {
                                                           merged.resize(norms.size());
                                                           std::merge(norms.begin(), half, half, norms.end(),
                                                                      merged.begin());
                                                       }) / size);
        sink = merged[plan.size];
    }
    autoclip_history_destroy(left);
    autoclip_history_destroy(right);
}

// Counts every byte that the kernel asks for: what autoclip_history_memory says is compared with it.
struct Counter {
    uint64_t bytes = 0;
    static void *allocate(void *context, size_t size) {
        static_cast<Counter *>(context)->bytes += size;
        return std::malloc(size);
    }
    static void release(void *context, void *block, size_t size) {
        static_cast<Counter *>(context)->bytes -= size;
        std::free(block);
    }
};

// Bytes per norm by the way the norms came, bytes of an empty history and of 1,000 histories of 100 norms; the rivals by
// what malloc holds for them. Where the kernel's own count differs from what was asked of the allocator, that is said.
void memory(const Plan &plan) {
    const double size = static_cast<double>(plan.size);
    const auto line = [&](const std::string &subject, const std::string &metric, double bytes) {
        plan.report.line(subject, metric, 0, bytes);
    };
    Counter counter;
    const autoclip_allocator allocator = {Counter::allocate, Counter::release, &counter};
    const auto held = [&](autoclip_history *history) {
        if (autoclip_history_memory(history) != counter.bytes)
            line("autoclip", "bytes not counted by autoclip_history_memory",
                 static_cast<double>(counter.bytes) - static_cast<double>(autoclip_history_memory(history)));
        const double bytes = static_cast<double>(counter.bytes);
        autoclip_history_destroy(history);
        return bytes;
    };
    const auto make = [&] {
        autoclip_history *history;
        demand(autoclip_history_create(0, &allocator, &history));
        return history;
    };
    line("autoclip", "bytes, empty", held(make()));
    for (const char *kind : {"stationary", "drifting", "sawtooth", "ascending", "descending"}) {
        autoclip_history *history = make();
        for (double norm : make_stream(kind, plan.size, 1)) demand(autoclip_history_push(history, norm));
        std::vector<char> saved(autoclip_history_save_size(history));
        size_t written;
        demand(autoclip_history_save(history, saved.data(), saved.size(), &written));
        line("autoclip", std::string("bytes per norm, pushed ") + kind, held(history) / size);
        if (kind != std::string("stationary")) continue;
        demand(autoclip_history_load(saved.data(), written, &allocator, &history));
        line("autoclip", "bytes per norm, loaded", held(history) / size);
    }
    {
        autoclip_history *history = make();
        const std::vector<double> norms = make_stream("stationary", plan.size, 1);
        demand(autoclip_history_extend(history, norms.data(), norms.size()));
        line("autoclip", "bytes per norm, extended", held(history) / size);
    }
    std::vector<autoclip_history *> layers(1000);
    const std::vector<double> norms = make_stream("stationary", 100 * layers.size(), 1);
    const double before_layers = malloc_bytes();
    for (size_t i = 0; i < layers.size(); i++) {
        layers[i] = make_history();
        for (size_t j = 0; j < 100; j++) demand(autoclip_history_push(layers[i], norms[100 * i + j]));
    }
    double bytes = 0;
    for (autoclip_history *layer : layers) bytes += static_cast<double>(autoclip_history_memory(layer));
    line("autoclip", "bytes, 1000 histories of 100", bytes);
    line("autoclip", "bytes of malloc, 1000 histories of 100", malloc_bytes() - before_layers);
    for (autoclip_history *layer : layers) autoclip_history_destroy(layer);
    Subjects subjects = make_subjects(plan.which);
    for (auto &subject : subjects) {
        if (subject->name() == Autoclip::name) continue;
        const std::vector<double> pushed = make_stream("stationary", plan.size, 1);
        const double before = malloc_bytes();
        subject->push(pushed.data(), pushed.size());
        line(subject->name(), "bytes of malloc per norm, pushed stationary", (malloc_bytes() - before) / size);
        subject.reset();
    }
}

// ns per dependent random load over SIZE bytes: what the machine can do at all.
void load(const Plan &plan) {
    Loads loads(plan.size);
    for (int round = 0; round < plan.rounds; round++) loads.measure(plan.report, round, plan.operations);
}

} // namespace

int main(int count, char **arguments) {
    const std::map<std::string, void (*)(const Plan &)> experiments = {
        {"growth", growth}, {"query", query},       {"cold", cold},     {"window", window}, {"extend", extend},
        {"merge", merge},   {"snapshot", snapshot}, {"memory", memory}, {"load", load}};
    if (count != 8 || !experiments.count(arguments[1]))
        die("usage: kernel EXPERIMENT STREAM SIZE ROUNDS OPERATIONS SUBJECTS FLUSH_BYTES");
    const auto number = [&](int i) { return static_cast<size_t>(std::strtoull(arguments[i], nullptr, 10)); };
    const Plan plan{{arguments[1], arguments[2], number(3)},
                    arguments[2],
                    number(3),
                    number(5),
                    static_cast<int>(number(4)),
                    arguments[6],
                    number(7)};
    experiments.at(arguments[1])(plan);
    return 0;
}
