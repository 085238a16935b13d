// The kernel and its rivals behind one face, so that all get the same norms and are timed by the same lines.
//
// Every loop and every timed region stands inside the template, where the operation is inlined: the virtual call is paid
// once per batch and never between two clock readings.
#ifndef AUTOCLIP_BENCH_SUBJECTS_HPP
#define AUTOCLIP_BENCH_SUBJECTS_HPP

#include <autoclip.h>

#include <cmath>
#include <ext/pb_ds/assoc_container.hpp>
#include <ext/pb_ds/tree_policy.hpp>
#include <limits>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#if __has_include(<boost/multi_index/ranked_index.hpp>)
#define BENCH_HAS_BOOST 1
#include <boost/multi_index/identity.hpp>
#include <boost/multi_index/ranked_index.hpp>
#include <boost/multi_index_container.hpp>
#endif
#if defined(BENCH_HAS_ABSEIL)
#include <absl/container/btree_set.h>
#endif

#include "tools.hpp"

inline void demand(autoclip_status status) {
    if (status != AUTOCLIP_OK) die(autoclip_status_message(status));
}

// numpy's linear percentile over anything that finds two neighbours by rank.
template <class Neighbours> double interpolate(size_t count, double percentile, Neighbours neighbours) {
    const double virtual_rank = static_cast<double>(count - 1) * (percentile / 100);
    const size_t rank = static_cast<size_t>(virtual_rank);
    const double fraction = virtual_rank - static_cast<double>(rank);
    const std::pair<double, double> pair = neighbours(rank);
    const double difference = pair.second - pair.first;
    return fraction < 0.5 ? pair.first + difference * fraction : pair.second - difference * (1 - fraction);
}

class Autoclip {
  public:
    static constexpr const char *name = "autoclip";
    static constexpr bool ranked = true;
    explicit Autoclip(uint64_t window = 0) { demand(autoclip_history_create(window, nullptr, &history_)); }
    Autoclip(const Autoclip &) = delete;
    Autoclip &operator=(const Autoclip &) = delete;
    ~Autoclip() { autoclip_history_destroy(history_); }
    void push(double norm) { demand(autoclip_history_push(history_, norm)); }
    double observe(double norm, double percentile) {
        double threshold;
        demand(autoclip_history_observe(history_, norm, percentile, &threshold));
        return threshold;
    }
    double percentile(double percentile) {
        double threshold;
        demand(autoclip_history_percentile(history_, percentile, &threshold));
        return threshold;
    }
    double select(uint64_t rank) {
        double norm;
        demand(autoclip_history_select(history_, rank, &norm));
        return norm;
    }
    uint64_t rank(double norm) {
        uint64_t rank;
        demand(autoclip_history_rank(history_, norm, &rank));
        return rank;
    }
    uint64_t memory() const { return autoclip_history_memory(history_); }

  private:
    autoclip_history *history_;
};

class PbDs {
  public:
    static constexpr const char *name = "pb_ds";
    static constexpr bool ranked = true;
    using Key = std::pair<double, uint64_t>;
    explicit PbDs(uint64_t window = 0) : window_(window), ring_(window) {}
    void push(double norm) {
        const Key key(norm, age_);
        tree_.insert(key);
        if (window_) {
            Key &oldest = ring_[age_ % window_];
            if (age_ >= window_) tree_.erase(oldest);
            oldest = key;
        }
        age_++;
    }
    double percentile(double percentile) {
        return interpolate(tree_.size(), percentile, [this](size_t rank) {
            auto at = tree_.find_by_order(rank);
            const double below = at->first;
            return std::make_pair(below, ++at == tree_.end() ? below : at->first);
        });
    }
    double observe(double norm, double p) {
        push(norm);
        return percentile(p);
    }
    double select(uint64_t rank) { return tree_.find_by_order(rank)->first; }
    uint64_t rank(double norm) { return tree_.order_of_key(Key(norm, 0)); }

  private:
    __gnu_pbds::tree<Key, __gnu_pbds::null_type, std::less<Key>, __gnu_pbds::rb_tree_tag,
                     __gnu_pbds::tree_order_statistics_node_update>
        tree_;
    uint64_t window_, age_ = 0;
    std::vector<Key> ring_;
};

#if defined(BENCH_HAS_BOOST)
class BoostRanked {
  public:
    static constexpr const char *name = "boost ranked_index";
    static constexpr bool ranked = true;
    void push(double norm) { tree_.insert(norm); }
    double percentile(double percentile) {
        return interpolate(tree_.size(), percentile, [this](size_t rank) {
            auto at = tree_.nth(rank);
            const double below = *at;
            return std::make_pair(below, ++at == tree_.end() ? below : *at);
        });
    }
    double observe(double norm, double p) {
        push(norm);
        return percentile(p);
    }
    double select(uint64_t rank) { return *tree_.nth(rank); }
    uint64_t rank(double norm) { return tree_.lower_bound_rank(norm); }

  private:
    boost::multi_index_container<
        double,
        boost::multi_index::indexed_by<boost::multi_index::ranked_non_unique<boost::multi_index::identity<double>>>>
        tree_;
};
#endif

// These two cannot answer a rank at all: they are timed for the push alone, as the bound of what an ordered set costs.
template <class Set> class Unranked {
  public:
    static constexpr bool ranked = false;
    void push(double norm) { set_.insert(norm); }
    double observe(double, double) { return unanswered(); }
    double percentile(double) { return unanswered(); }
    double select(uint64_t) { return unanswered(); }
    uint64_t rank(double norm) { return set_.lower_bound(norm) == set_.end(); } // touches what a rank would

  private:
    static double unanswered() { return std::numeric_limits<double>::quiet_NaN(); }
    Set set_;
};
struct StdMultiset : Unranked<std::multiset<double>> {
    static constexpr const char *name = "std::multiset";
};
#if defined(BENCH_HAS_ABSEIL)
struct AbslBtree : Unranked<absl::btree_multiset<double>> {
    static constexpr const char *name = "absl::btree_multiset";
};
#endif

class Subject {
  public:
    virtual ~Subject() = default;
    virtual std::string name() const = 0;
    virtual bool ranked() const = 0;
    virtual void push(const double *norms, size_t count) = 0;
    virtual void observe(const double *norms, size_t count) = 0;
    virtual void percentiles(const double *percentiles, size_t count) = 0;
    virtual void selects(const uint64_t *ranks, size_t count) = 0;
    virtual void ranks(const double *norms, size_t count) = 0;
    virtual uint64_t timed_push(double norm) = 0;
    virtual uint64_t timed_observe(double norm) = 0;
};

// The percentile of every observe: the paper's.
constexpr double paper_percentile = 10.0;

template <class Structure> class SubjectOf : public Subject {
  public:
    template <class... Arguments> explicit SubjectOf(Arguments... arguments) : structure(arguments...) {}
    std::string name() const override { return Structure::name; }
    bool ranked() const override { return Structure::ranked; }
    void push(const double *norms, size_t count) override {
        for (size_t i = 0; i < count; i++) structure.push(norms[i]);
    }
    void observe(const double *norms, size_t count) override {
        double sum = 0;
        for (size_t i = 0; i < count; i++) sum += structure.observe(norms[i], paper_percentile);
        sink = sum;
    }
    void percentiles(const double *percentiles, size_t count) override {
        double sum = 0;
        for (size_t i = 0; i < count; i++) sum += structure.percentile(percentiles[i]);
        sink = sum;
    }
    void selects(const uint64_t *ranks, size_t count) override {
        double sum = 0;
        for (size_t i = 0; i < count; i++) sum += structure.select(ranks[i]);
        sink = sum;
    }
    void ranks(const double *norms, size_t count) override {
        uint64_t sum = 0;
        for (size_t i = 0; i < count; i++) sum += structure.rank(norms[i]);
        sink = static_cast<double>(sum);
    }
    uint64_t timed_push(double norm) override {
        const uint64_t start = now();
        structure.push(norm);
        return now() - start;
    }
    uint64_t timed_observe(double norm) override {
        const uint64_t start = now();
        sink = structure.observe(norm, paper_percentile);
        return now() - start;
    }
    Structure structure;
};

using Subjects = std::vector<std::unique_ptr<Subject>>;

// The kernel first, then the rivals of this build; `which` is "all", or the names wanted, separated by '+'.
inline Subjects make_subjects(const std::string &which) {
    Subjects all, wanted;
    all.push_back(std::make_unique<SubjectOf<Autoclip>>());
    all.push_back(std::make_unique<SubjectOf<PbDs>>());
#if defined(BENCH_HAS_BOOST)
    all.push_back(std::make_unique<SubjectOf<BoostRanked>>());
#endif
#if defined(BENCH_HAS_ABSEIL)
    all.push_back(std::make_unique<SubjectOf<AbslBtree>>());
#endif
    all.push_back(std::make_unique<SubjectOf<StdMultiset>>());
    for (auto &subject : all)
        if (which == "all" || ("+" + which + "+").find("+" + subject->name() + "+") != std::string::npos)
            wanted.push_back(std::move(subject));
    return wanted;
}

#endif
