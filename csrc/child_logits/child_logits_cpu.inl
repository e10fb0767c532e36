// Dot products of a beam's state with four rows of the head at a time, so that each of the state's numbers is loaded
// once for four. The state is converted to float once a beam, a piece at a time.
namespace raddpo::RADDPO_ISA {
namespace {

constexpr int kPiece = 1024;  // features
constexpr int kRows = 4;
constexpr int kChildren = 512;  // at a time

// A piece of the state, its words' lanes apart.
template <typename D>
struct Piece {
  float lanes[D::kLanes][kPiece / D::kLanes];
  std::int64_t words;

  RADDPO_HD void load(const typename D::T* x, std::int64_t size) {
    words = size / D::kLanes;
    for (int k = 0; k < D::kLanes; ++k)
#pragma omp simd
      for (std::int64_t i = 0; i < words; ++i) lanes[k][i] = D::load(x + i * D::kLanes + k);
  }
};

template <typename D>
RADDPO_HD void dot(const Piece<D>& piece, const typename D::T* const (&rows)[kRows], float (&sums)[kRows]) {
  const typename D::T *w0 = rows[0], *w1 = rows[1], *w2 = rows[2], *w3 = rows[3];
  float s0 = 0.f, s1 = 0.f, s2 = 0.f, s3 = 0.f;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (std::int64_t i = 0; i < piece.words; ++i) {
    const auto v0 = D::load_word(w0 + i * D::kLanes), v1 = D::load_word(w1 + i * D::kLanes),
               v2 = D::load_word(w2 + i * D::kLanes), v3 = D::load_word(w3 + i * D::kLanes);
    for (int k = 0; k < D::kLanes; ++k) {
      const float x = piece.lanes[k][i];
      s0 += x * D::lane(v0, k);
      s1 += x * D::lane(v1, k);
      s2 += x * D::lane(v2, k);
      s3 += x * D::lane(v3, k);
    }
  }
  sums[0] = s0;
  sums[1] = s1;
  sums[2] = s2;
  sums[3] = s3;
}

template <typename D>
RADDPO_HD float dot(const Piece<D>& piece, const typename D::T* row) {
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < piece.words; ++i) {
    const auto word = D::load_word(row + i * D::kLanes);
    for (int k = 0; k < D::kLanes; ++k) sum += piece.lanes[k][i] * D::lane(word, k);
  }
  return sum;
}

template <typename D, typename Symbol>
RADDPO_HD void extend(const ChildLogitsArgs& a, std::int64_t row, const Symbol* symbols, std::int64_t count) {
  using T = typename D::T;
  const int level = static_cast<int>(a.level);
  const T* hidden = static_cast<const T*>(a.hidden) + row * a.stride_hidden;
  const T* weight = static_cast<const T*>(a.weight);
  const T* bias = static_cast<const T*>(a.bias);
  float* out = a.out + row * a.columns;
  const auto row_of = [&](std::int64_t i) {
    return static_cast<std::int64_t>(token_of(a.trie, level, symbols[i])) * a.stride_weight;
  };
  for (std::int64_t i = 0; i < count; ++i)
    out[symbols[i]] = bias ? D::load(bias + token_of(a.trie, level, symbols[i])) : 0.f;
  for (std::int64_t first = 0; first < a.size; first += kPiece) {
    const std::int64_t size = a.size - first < kPiece ? a.size - first : kPiece;
    Piece<D> piece;
    piece.load(hidden + first, size);
    const bool odd = piece.words * D::kLanes < size;
    const std::int64_t last = first + size - 1;
    const float last_feature = odd ? D::load(hidden + last) : 0.f;
    std::int64_t i = 0;
    for (; i + kRows <= count; i += kRows) {
      const T* rows[kRows];
      float sums[kRows];
      for (int k = 0; k < kRows; ++k) rows[k] = weight + row_of(i + k) + first;
      dot<D>(piece, rows, sums);
      for (int k = 0; k < kRows; ++k)
        out[symbols[i + k]] += sums[k] + (odd ? last_feature * D::load(rows[k] + size - 1) : 0.f);
    }
    for (; i < count; ++i) {
      const T* one = weight + row_of(i) + first;
      out[symbols[i]] += dot<D>(piece, one) + (odd ? last_feature * D::load(one + size - 1) : 0.f);
    }
  }
  if (a.scale != 1.f || a.softcap != 0.f)
    for (std::int64_t i = 0; i < count; ++i) out[symbols[i]] = logit_of(a, out[symbols[i]]);
}

template <typename D, typename Symbol>
RADDPO_HD void extend(const ChildLogitsArgs& a, std::int64_t row) {
  for (LiveChunks<Symbol, kChildren> chunk(a.trie, children_of(a.trie, a.nodes[row])); chunk.next();)
    extend<D>(a, row, chunk.symbols, chunk.size);
}

template <typename D>
RADDPO_HD void run(const ChildLogitsArgs& a, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    if (!is_extended(a, row)) continue;
    if (a.trie.wide)
      extend<D, std::uint32_t>(a, row);
    else
      extend<D, std::uint16_t>(a, row);
  }
}

}  // namespace

void child_logits(const ChildLogitsArgs& a, std::int64_t begin, std::int64_t end) {
  if (a.type == LogitType::float32)
    run<Float32>(a, begin, end);
  else if (a.type == LogitType::bfloat16)
    run<BFloat16>(a, begin, end);
  else
    run<Float16>(a, begin, end);
}

}  // namespace raddpo::RADDPO_ISA
