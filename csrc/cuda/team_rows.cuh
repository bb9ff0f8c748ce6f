#pragma once
// Row losses with the columns across threads. A team of threads takes one block of kBlock columns:
// each of its threads has kRun neighbours of every group of kGroup columns, so that it adds up
// whole lanes of the canonical sum in order, and lanes are joined by shuffles. A row is the work of
// one team, of several in a block, or of all in a cluster of blocks, which tell each other maxima
// and block sums.
//
// Two ways to hold a row. Resident: the teams hold all of it in registers, first its logits, then
// its terms, while the next row is on its way to shared memory. Otherwise the teams go over the row
// in waves, and read it once more for each pass; this serves rows of any length, layout and
// alignment.
#include "cuda/stage.cuh"

namespace mbk::MBK_ISA {

// The thread's part of a row in one wave: its first column, and how many columns the row has from
// there on, at most a block.
struct Part {
  int64_t first;
  int left;
  MBK_DEVICE bool has(int step, int k) const { return step * kGroup + k < left; }
  // Where in the thread's part a column lies, step * kGroup + k, or -1: it is not the thread's.
  MBK_DEVICE int find(int64_t column, int run) const {
    const int64_t away = column - first;
    return column >= 0 && away >= 0 && away < kBlock && away % kGroup < run ? (int)away : -1;
  }
};

template <class Loss, class In, bool kResident>
struct TeamRows {
  typedef Compute<In> T;
  typedef typename Loss::template Call<T> Call;
  typedef typename Loss::template Item<double> Item;
  static constexpr int kRuns = kRun<T>;
  static constexpr bool kKeepTerms = kResident && !Loss::kHasSoftcap;
  // Whether the target's logit is -inf among a row's values, so that its term, which is kept out of
  // the sums, is 0 without being looked for. It is known from elsewhere.
  static constexpr bool kHidesTarget = kKeepTerms && Loss::kHasIndex && !Loss::kHasCoefficients;
  typedef T Run[kRuns];
  typedef typename Pick<kResident, int, int64_t>::type Column;  // registers are scarce

  const RowLaunch& p;
  const RowArgs& a;
  Team<T> team;
  bool has_row = false;  // otherwise these teams only keep the others company

  MBK_DEVICE TeamRows(const RowLaunch& launch, unsigned char* memory)
      : p(launch), a(launch.args), team(launch, memory) {}

  // What is the same for all items is in shared memory, where it takes no registers.
  struct Common {
    Call call;
    ItemScale<T> item_scale;
    double divisor;
  };
  static_assert(sizeof(Common) + 16 <= kCommonBytes);
  MBK_DEVICE Common& common() const { return *(Common*)team.common(); }
  MBK_DEVICE const Call& call() const { return common().call; }

  MBK_DEVICE int64_t waves() const { return kResident ? 1 : p.waves; }
  MBK_DEVICE Part part(int64_t wave) const {
    const int64_t first = (wave * team.total() + team.member()) * kBlock + team.thread() * kRuns;
    const int64_t left = has_row ? a.columns - first : 0;
    return {first, left < 0 ? 0 : left > kBlock ? (int)kBlock : (int)left};
  }

  // ---- the logits of a row, step by step ----

  MBK_DEVICE T logit(T x, bool inside) const {
    if constexpr (Loss::kHasSoftcap) return inside ? Loss::logit(call(), x) : x;
    return x;
  }

  struct Resident {
    T v[kSteps][kRuns];
    template <class F>
    MBK_DEVICE void each(const TeamRows&, const In*, const Part&, F f) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) f(s, v[s]);
    }
  };
  struct Reread {
    template <class F>
    MBK_DEVICE void each(const TeamRows& rows, const In* row, const Part& at, F f) {
      const int64_t stride = rows.a.input_strides.column;
      const In* from = row + at.first * stride;
#pragma unroll 1
      for (int s = 0; s * kGroup < at.left; ++s, from += kGroup * stride) {
        T x[kRuns];
#pragma unroll
        for (int k = 0; k < kRuns; ++k) {
          const bool inside = at.has(s, k);
          x[k] = inside ? (T)widen(from[k * stride]) : -(T)__builtin_inff();
          x[k] = rows.logit(x[k], inside);
        }
        f(s, x);
      }
    }
  };
  typedef typename Pick<kResident, Resident, Reread>::type Values;

  // q_j of a column, where the loss has them; 0 past the end.
  MBK_DEVICE T coefficient(const In* probabilities, const Part& at, int step, int k) const {
    if constexpr (!Loss::kHasCoefficients) return 0;
    return at.has(step, k) ? coefficient(probabilities, (Column)at.first + step * kGroup + k) : 0;
  }
  MBK_DEVICE T coefficient(const In* probabilities, Column j) const {
    if constexpr (!Loss::kHasCoefficients) return 0;
    const T weight = a.class_weight ? ((const T*)a.class_weight)[j] : (T)1;
    T share = 0;
    if constexpr (!Loss::kHasIndex) share = (T)widen(probabilities[j * a.target_strides.column]);
    return Loss::coefficient(call(), weight, share);
  }

  // ---- a row ----

  struct Row {
    Column apart;  // whose term is kept out of the sums
    const In *logits, *probabilities;
    T max, factor, scale, at_target;  // of the gradient
    bool ignored;
  };

  MBK_DEVICE T raw_logit(const Row& r, Column j) const {
    return (T)widen(r.logits[j * a.input_strides.column]);
  }

  MBK_DEVICE T maximum(Values& v, const Row& r) const {
    T m[kRuns];
#pragma unroll
    for (int k = 0; k < kRuns; ++k) m[k] = -(T)__builtin_inff();
    for (int64_t w = 0; w < waves(); ++w) {
      const Part at = part(w);
      v.each(*this, r.logits, at, [&](int s, const Run& x) {
        if (!at.has(s, 0)) return;
#pragma unroll
        for (int k = 0; k < kRuns; ++k) m[k] = max_or_nan(m[k], x[k]);
      });
    }
#pragma unroll
    for (int k = 1; k < kRuns; ++k) m[0] = max_or_nan(m[0], m[k]);
    return team.maximum(m[0]) + 0;  // + 0: a maximum of -0 is that of +0
  }

  MBK_DEVICE int64_t first_maximum(Values& v, const Row& r) const {
    int64_t first = INT64_MAX;
    for (int64_t w = 0; w < waves(); ++w) {
      const Part at = part(w);
      v.each(*this, r.logits, at, [&](int s, const Run& x) {
#pragma unroll
        for (int k = kRuns - 1; k >= 0; --k)
          if (x[k] == r.max && at.has(s, k)) {
            const int64_t j = at.first + s * kGroup + k;
            first = j < first ? j : first;
          }
      });
    }
    return team.minimum(first);
  }

  // The sums of the team's block without the term and, where they are summed, the coefficient of
  // the column `apart`. Terms take the place of the logits where they are kept.
  typedef typename Pick<Loss::kWideDistance, double, T>::type Distance;
  MBK_DEVICE void sum_block(Values& v, const Row& r, const Part& at, Column apart,
                            double (&sums)[3]) const {
    const int spot = kHidesTarget ? -1 : at.find(apart, kRuns);
    T rest[kRuns] = {}, coefficients[kRuns] = {};
    Distance distance[kRuns] = {};
    v.each(*this, r.logits, at, [&](int s, Run& x) {
      // The branch also keeps the compiler from computing all terms before it adds up the first,
      // which would take twice the registers.
      if (!at.has(s, 0)) return;
#pragma unroll
      for (int k = 0; k < kRuns; ++k) {
        const T e = Loss::term(x[k] - r.max);
        if constexpr (Loss::kHasCoefficients) {
          const T q = coefficient(r.probabilities, at, s, k);
          const Distance d = at.has(s, k) ? (Distance)x[k] - (Distance)r.max : (Distance)0;
          distance[k] = Loss::add_distance(d, (Distance)q, distance[k]);
          const bool is_apart = Loss::kSums > 2 && spot == s * kGroup + k;
          coefficients[k] = coefficients[k] + (is_apart ? (T)0 : q);
        }
        if constexpr (kKeepTerms) x[k] = e;
        rest[k] = rest[k] + (!kHidesTarget && spot == s * kGroup + k ? (T)0 : e);
      }
    });
    sums[Loss::kRest] = (double)join_team<T>(rest);
    if constexpr (Loss::kSums > 1) sums[Loss::kDistance] = (double)join_team<T>(distance);
    if constexpr (Loss::kSums > 2) sums[Loss::kCoefficients] = (double)join_team<T>(coefficients);
  }

  // Brings what row i will be accumulated into near, while the row is computed: no load may pass a
  // store later, and there are no registers to load it into now.
  MBK_DEVICE void prefetch_buffer(int64_t i) const {
    constexpr int kLine = 128 / sizeof(T);
    const Part at = part(0);
    if (!a.grad || !a.accumulate || team.thread() * kRuns % kLine || !at.left) return;
    const T* const buffer = (const T*)a.grad + ItemPosition(a, i).offset(a.grad_strides) + at.first;
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
      if (at.has(s, 0)) prefetch(buffer + s * kGroup);
  }

  // The gradient of a part, from terms that were kept or from logits.
  template <class S>
  MBK_DEVICE void write_gradient(Values& v, const Row& r, const Part& at, S* grad,
                                 bool accumulate) const {
    const int spot = at.left ? at.find(r.apart, kRuns) : -1;
    const int64_t stride = a.grad_strides.column;
    S* const to = grad + at.first * stride;
    T at_target = r.at_target;
    if (accumulate && spot >= 0) at_target = (T)widen(to[spot * stride]) + at_target;
    v.each(*this, r.logits, at, [&](int s, const Run& x) {
      T g[kRuns];
#pragma unroll
      for (int k = 0; k < kRuns; ++k) {
        const T e = kKeepTerms ? x[k] : Loss::term(x[k] - r.max);
        const T q = coefficient(r.probabilities, at, s, k);
        T slope = 0;
        if constexpr (Loss::kHasSoftcap)
          if (at.has(s, k))
            slope = Loss::slope(call(), raw_logit(r, (Column)at.first + s * kGroup + k));
        g[k] = Loss::gradient(e, slope, q, r.factor, r.scale);
        if (Loss::kHasSoftcap && r.ignored) g[k] = 0;  // 0 times a logit that is not finite
      }
      if constexpr (kResident) {
        Packed<S>* const place = (Packed<S>*)(to + s * kGroup);
        if (at.has(s, 0)) {
          if (accumulate) {
            const Packed<S> old = *place;
#pragma unroll
            for (int k = 0; k < kRuns; ++k) g[k] = canonical((T)old.get(k) + g[k]);
          }
          *place = pack<S>(g);
        }
      } else {
#pragma unroll
        for (int k = 0; k < kRuns; ++k)
          if (at.has(s, k)) {
            S* const place = to + (s * kGroup + k) * stride;
            if (accumulate) g[k] = (T)widen(*place) + g[k];
            *place = narrow<S>(canonical(g[k]));  // or the NaN of a GPU's arithmetic becomes -0
          }
      }
    });
    if (spot >= 0) to[spot * stride] = narrow<S>(canonical(at_target));
  }
  // Replaces every NaN that was written by the one that is ours; `value`, if it is not 0,
  // everything.
  template <class S>
  MBK_DEVICE void canonicalise(const Part& at, S* grad) const {
    S* const to = grad + at.first * a.grad_strides.column;
#pragma unroll 1
    for (int j = 0; j < at.left; j += j % kGroup == kRuns - 1 ? kGroup - kRuns + 1 : 1) {
      S* const place = to + j * a.grad_strides.column;
      *place = narrow<S>(canonical(widen(*place)));
    }
  }

  // What is to be done with item i; ignored where there is none.
  struct Task {
    int64_t target;
    ItemKind kind;
  };
  MBK_DEVICE Task task_of(int64_t i) const {
    Task task{-1, ItemKind::ignored};
    if (i < a.items) task.kind = describe_item<Loss>(a, ItemPosition(a, i), task.target);
    return task;
  }

  // Item i; `v` holds its logits where the row is resident. Every thread of a row's teams takes
  // part, also where there is no such item.
  MBK_DEVICE void row(int64_t i, const Task& task, Values& v) {
    const bool active = has_row = i < a.items;
    const ItemPosition at(a, active ? i : 0);
    Row r;
    r.logits = (const In*)a.input + at.offset(a.input_strides);
    r.probabilities = Loss::kHasIndex ? nullptr : (const In*)a.target + at.offset(a.target_strides);
    const int64_t target = task.target;
    ItemKind kind = task.kind;
    if (kind == ItemKind::bad && !a.from_state && team.speaks()) note_bad_target(p, i, target);
    r.apart = kind == ItemKind::plain ? (Column)target : -1;
    r.ignored = kind == ItemKind::ignored;  // all terms will be 0

    Item item;
    item.target_weight = item.target_slope = 1;
    T target_logit = 0;
    if (Loss::kHasIndex && kind == ItemKind::plain) {
      target_logit = logit(raw_logit(r, r.apart), true);
      if (a.class_weight) item.target_weight = (double)((const T*)a.class_weight)[r.apart];
    }

    if (a.from_state) {
      r.max = kind == ItemKind::ignored ? (T)__builtin_inff() : *row_state<T>(a, i, 0);
    } else {
      r.max = maximum(v, r);
      if (kHidesTarget && r.apart >= 0) r.max = max_or_nan(r.max, target_logit) + 0;
    }
    if constexpr (!Loss::kHasIndex) {
      const int64_t first = first_maximum(v, r);
      r.apart = active && first < a.columns ? (Column)first : -1;
      if (r.apart >= 0) item.target_weight = (double)coefficient(r.probabilities, r.apart);
    }
    if constexpr (Loss::kHasSoftcap)
      if (r.apart >= 0) item.target_slope = (double)Loss::slope(call(), raw_logit(r, r.apart));
    // NaN anywhere, +inf, or no finite logit at all: torch's log_softmax is NaN throughout.
    if (kind == ItemKind::plain && !(abs(r.max) < (T)__builtin_inff())) kind = ItemKind::bad;

    for (double& s : item.sums) s = 0;
    if (kKeepTerms || !a.from_state) {  // the terms are needed in any case
      constexpr int kOrdered = Loss::kWideDistance ? Loss::kDistance : -1;
      if constexpr (kResident) {
        double sums[3];
        sum_block(v, r, part(0), r.apart, sums);
        if (!a.from_state) {
          team.template join_wave<Loss::kSums, kOrdered>(sums);
          for (int k = 0; k < Loss::kSums; ++k) item.sums[k] = sums[k];
        }
      } else {
        RowTotals totals;
        for (int64_t w = 0; w < waves(); ++w) {
          double sums[3];
          sum_block(v, r, part(w), r.apart, sums);
          if (!a.from_state)
            team.template add_wave<Loss::kSums, kOrdered>(sums, totals, w + 1 == waves());
        }
        if (!a.from_state) team.template sums_of_row<Loss::kSums, kOrdered>(totals, item.sums);
      }
    }
    if (a.from_state && active) {
      item.sums[Loss::kRest] = (double)*row_state<T>(a, i, 1);
      if (Loss::kSums > 2) item.sums[2] = (double)*row_state<T>(a, i, 2);
    }
    item.max = (double)r.max;
    item.target_logit = (double)target_logit;
    item.target_term = Loss::kHasIndex ? (double)Loss::term(target_logit - r.max) : 1;
    item.scale = active ? common().item_scale(a, at) : 0;
    if (!a.from_state) {
      if (active && team.speaks()) save_state<Loss, T>(a, i, item, kind);
      const T weight = active ? item_value<T>(a.sample_weight, a.sample_weight_strides, at) : (T)0;
      team.push(active ? i : -1, item, weight, kind);
    }
    if (!a.grad) return;
    const auto factors =
        Loss::factors(call(), item, call().z_loss != 0 ? Loss::log_sum(item) : 0.0);
    r.factor = (T)factors.all;
    r.scale = (T)item.scale;
    r.at_target = canonical((T)factors.target);
    bool finite = abs(r.factor) < (T)__builtin_inff() && abs(r.scale) < (T)__builtin_inff();
    if (kind == ItemKind::ignored) r.factor = r.scale = 0, finite = true;
    if (kind == ItemKind::bad)
      r.factor = r.scale = canonical((T)__builtin_nanf("")), r.apart = -1, finite = false;
    // The gradient may lie over the logits, and every thread has read the target's. A row whose
    // sums several teams have joined has met barriers since.
    if (a.from_state || team.total() == 1) team.sync();
    const bool write = active && !(kind == ItemKind::ignored && a.accumulate);
    // Where the item is, is computed again: kept through the sums, it would take registers that
    // there are not.
    const int64_t offset = ItemPosition(a, write ? i : 0).offset(a.grad_strides);
    for (int64_t w = 0; w < waves(); ++w) {
      Part here = part(w);
      if (!write) here.left = 0;
      if (__is_same(In, T) || !a.accumulate)  // one copy of the code where the types are the same
        write_gradient(v, r, here, (In*)a.grad + offset, __is_same(In, T) && a.accumulate);
      else
        write_gradient(v, r, here, (T*)a.grad + offset, true);
      if (!finite && !a.accumulate) canonicalise(here, (In*)a.grad + offset);
    }
  }

  // ---- all rows of a block ----

  // Columns of row i that the team holds, and where they are.
  MBK_DEVICE int columns_of_team(int64_t i) const {
    const int64_t left = i < a.items ? a.columns - team.member() * kBlock : 0;
    return left < 0 ? 0 : left > kBlock ? (int)kBlock : (int)left;
  }
  MBK_DEVICE void stage_row(Stage<In>& stage, int64_t i) const {
    const int columns = columns_of_team(i);
    const int64_t offset = columns ? ItemPosition(a, i).offset(a.input_strides) : 0;
    stage.load((const In*)a.input + offset + team.member() * kBlock, columns);
  }

  MBK_DEVICE void begin() {
    team.begin();
    const double divisor = divisor_of_rows(p, team.warps()[0].total);
    if (threadIdx.x == 0) {
      common().call = Call(a);
      common().item_scale = ItemScale<T>(a, divisor);
      common().divisor = divisor;
    }
    __syncthreads();
  }

  MBK_DEVICE void run() {
    Values v;
    // The block's rows of this round; not kept from round to round: registers are scarce.
    const auto base = [this] {
      return (int64_t)(blockIdx.x / p.cluster) * p.rows_of_block + team.round * p.row_step;
    };
    if constexpr (kResident) {
      Stage<In> stage(team.memory + team.bytes());
      stage.begin();
      begin();
      stage_row(stage, base() + team.group());
      while (base() < a.items) {
        const int64_t i = base() + team.group();
        has_row = i < a.items;
        prefetch_buffer(i);
        const Task task = task_of(i);
        stage.wait(columns_of_team(i), team.round);
        if (kHidesTarget && task.kind == ItemKind::plain) stage.hide(part(0).first, task.target);
        const Part at = part(0);
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          const Packed<In> x = stage.step(s);
#pragma unroll
          for (int k = 0; k < kRuns; ++k) v.v[s][k] = logit((T)x.get(k), at.has(s, k));
        }
        stage_row(stage, i + p.row_step);
        row(i, task, v);
        team.template flush_if_full<Loss>(call());
      }
    } else {
      begin();
      while (base() < a.items) {
        const int64_t i = base() + team.group();
        row(i, task_of(i), v);
        team.template flush_if_full<Loss>(call());
      }
    }
    team.template flush<Loss>(call());
    team.finish(common().divisor);
  }
};

template <class Loss, class In, bool kResident>
__global__ void __launch_bounds__(kMaxThreads, 1) team_rows(const __grid_constant__ RowLaunch p) {
  TeamRows<Loss, In, kResident> rows(p, shared_memory<unsigned char>());
  rows.run();
}

}  // namespace mbk::MBK_ISA
