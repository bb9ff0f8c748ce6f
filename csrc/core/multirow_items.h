#pragma once
// What the losses of several rows an item are made of, on every device. A loss (csrc/losses) is a
// struct of
//
//   name, kInputs      rows an item has
//   kGradients         the first so many of them may get a gradient
//   kTarget            what the target of an item is
//   kWeighsDivisor     whether the class weight of the target is part of the mean's divisor
//   kApart             there is a target index, with its class weight; its column is kept out of
//   the
//                      sums, and its gradient is what factors() returns
//   kColumnWeights     every column has its class weight
//   kMaxima            so many rows need their maximum first; an item with none that is finite is
//                      NaN
//   kScaleParameter    the parameter that multiplies such rows, and so must be positive
//   kKept              values a column that the passes share, the exponentials
//   kWide              elements are widened to fp64 for the sums, which cancel and are of few
//                      operations; kWideGradient: for the gradient as well
//   kLevels            passes that add up; the second may use the sums of the first
//   kSums              sums of a level, at most kMaxSums; of the second if not as many: kSecondSums
//   kConstants         numbers that its columns share
//   kFusedLevel        in the pass of this level the gradients may be formed as well, in the second
//                      that of the first row alone (0: never)
//
// and of functions, all static. In fp64, once a row, for the numbers that its columns share:
//
//   begin(args, item, c)      before the first level
//   between(args, item, c)    before the second
//   finish(args, item)        after all sums: what loss() and factors() both need
//   loss(args, item)          without the sample weight
//   factors(args, item, c)    before the gradient; returns that of the target's column
//   can_fuse(args)            whether factors() needs no sums of the fused level, but for the
//                             target's column
// and for V, any lane type, and C, what the columns share (Constants, LaneConstants<V>):
//
//   keep(c, x, kept)
//   sums1(c, x, w, kept, term), sums2(c, x, w, kept, term)    what a column adds to each sum
//   gradient(c, x, w, kept, g)
//
// Constants are written once and read as often as one likes: `c` keeps those of earlier steps.
#include "core/args.h"
#include "core/dtype.h"

namespace mbk::MBK_ISA {

inline constexpr int kMaxSums = 5, kMaxKept = 2;

// What the columns of a row share: numbers, or one in each lane where lanes are items. Read by
// constant<V>(c, k).
inline constexpr int kMaxConstants = 15;
struct Constants {
  double value[kMaxConstants];
};
template <class V>
struct LaneConstants {
  V value[kMaxConstants];
};
template <class V>
MBK_FN V constant(const Constants& c, int k) {
  return splat<V>((Element<V>)c.value[k]);
}
template <class V>
MBK_FN V constant(const LaneConstants<V>& c, int k) {
  return c.value[k];
}

struct MultirowItem {
  double max[2], target_logit, target_term, target_weight, label, scale;
  double first[kMaxSums], second[kMaxSums];
  double own[5];  // what finish() leaves for loss() and factors()
};

// What a loss that has nothing special need not say.
struct MultirowLoss {
  static constexpr int kInputs = 1, kGradients = 1, kMaxima = 0, kKept = 0, kLevels = 1, kSums = 1,
                       kSecondSums = 0, kFusedLevel = 0, kScaleParameter = -1,
                       kConstants = kMaxConstants;
  static constexpr bool kWeighsDivisor = false, kApart = false, kColumnWeights = false,
                        kWide = false, kWideGradient = false;
  static constexpr ItemTarget kTarget = ItemTarget::none;
  MBK_FN static void prepare(MultirowArgs&) {}
  MBK_FN static bool can_fuse(const MultirowArgs&) { return true; }
  MBK_FN static void begin(const MultirowArgs&, const MultirowItem&, Constants&) {}
  MBK_FN static void between(const MultirowArgs&, const MultirowItem&, Constants&) {}
  MBK_FN static void finish(const MultirowArgs&, MultirowItem&) {}
  template <class V, class C>
  MBK_FN static void keep(const C&, const V*, V*) {}
  template <class V, class C>
  MBK_FN static void sums2(const C&, const V*, V, const V*, V*) {}
};

template <class Loss>
MBK_FN constexpr int sums_of(int level) {
  return level == 2 && Loss::kSecondSums ? Loss::kSecondSums : Loss::kSums;
}

// Calls f with a null pointer of a storage type.
template <class F>
MBK_FN void with_storage(DType dtype, F f) {
  switch (dtype) {
    case DType::f32:
      return f((float*)nullptr);
    case DType::bf16:
      return f((bf16*)nullptr);
    case DType::f16:
      return f((f16*)nullptr);
    default:
      return f((double*)nullptr);
  }
}
template <class P>
struct StorageOfPointer;
template <class S>
struct StorageOfPointer<S*> {
  typedef S type;
};
template <class P>
using StorageOf = typename StorageOfPointer<P>::type;

}  // namespace mbk::MBK_ISA
