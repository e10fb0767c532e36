#include "catalogue.h"

#include <algorithm>
#include <numeric>
#include <set>

using namespace raddpo;

Catalogue Catalogue::random(Random& random, int rows, int codes) {
  Catalogue c;
  c.columns = static_cast<int>(random.between(1, 4));
  c.vocab = static_cast<Vocab>(random.below(3));
  const bool ragged = c.vocab != Vocab::none && random.chance(0.5);
  std::vector<std::int64_t> sizes;
  std::int32_t next = static_cast<std::int32_t>(random.below(5));
  for (int l = 0; l < c.columns; ++l) {
    sizes.push_back(random.between(1, codes));
    if (c.vocab == Vocab::none) continue;
    std::vector<std::int32_t> level(sizes[l]);
    std::iota(level.begin(), level.end(), next);
    next += static_cast<std::int32_t>(sizes[l]);
    if (c.vocab == Vocab::table) std::shuffle(level.begin(), level.end(), random.engine);
    c.tokens.push_back(level);
  }
  if (ragged) c.eos = random.chance(0.5) ? next : 1000;
  const bool wide = random.chance(0.3);
  std::set<std::int64_t> used;
  for (std::int64_t count = random.between(1, rows); count > 0; --count) {
    Sid sid(ragged ? random.between(1, c.columns) : c.columns);
    for (std::size_t l = 0; l < sid.size(); ++l) sid[l] = random.below(sizes[l]);
    const std::int64_t item = random.below(wide ? std::int64_t(1) << 40 : 4 * rows);
    if (!used.insert(item).second) continue;
    c.sids.push_back(sid);
    c.items.push_back(item);
  }
  return c;
}

Catalogue Catalogue::without_rows() const {
  Catalogue c = *this;
  c.sids.clear();
  c.items.clear();
  return c;
}

void Catalogue::add(const Catalogue& other, std::size_t row) {
  sids.push_back(other.sids[row]);
  items.push_back(other.items[row]);
}

namespace {

// As raddpo_ext/index/trie_input.py makes it.
LevelSymbols symbols_of(const Catalogue& c, int level) {
  if (c.vocab == Vocab::none) return {};
  const std::vector<std::int32_t>& tokens = c.tokens[level];
  LevelSymbols s;
  s.size = static_cast<std::int64_t>(tokens.size());
  const bool with_eos = c.eos >= 0 && level > 0;
  if (!with_eos && std::is_sorted(tokens.begin(), tokens.end())) {  // they follow one another
    s.first_token = tokens[0];
    return s;
  }
  std::vector<std::pair<std::int32_t, std::int32_t>> all;  // token, code
  for (std::size_t code = 0; code < tokens.size(); ++code) all.emplace_back(tokens[code], code);
  if (with_eos) all.emplace_back(c.eos, -1);
  std::sort(all.begin(), all.end());
  s.symbol_of_code.resize(tokens.size());
  for (std::size_t symbol = 0; symbol < all.size(); ++symbol) {
    const auto [token, code] = all[symbol];
    s.tokens.push_back(token);
    s.codes.push_back(code);
    (code < 0 ? s.eos_symbol : s.symbol_of_code[code]) = static_cast<std::int32_t>(symbol);
  }
  return s;
}

template <typename Code>
TrieBytes build_as(const Catalogue& c, TrieBuildInput input) {
  std::vector<Code> codes;
  std::vector<std::int64_t> lengths;
  for (const Sid& sid : c.sids) {
    for (int l = 0; l < c.columns; ++l)
      codes.push_back(l < static_cast<int>(sid.size()) ? static_cast<Code>(sid[l]) : Code(-1));  // never read
    lengths.push_back(static_cast<std::int64_t>(sid.size()));
  }
  input.sids = codes.data();
  input.lengths = c.eos >= 0 ? lengths.data() : nullptr;
  return trie_build(input);
}

}  // namespace

TrieBytes Catalogue::build(int threads, int code_bytes, bool code_signed) const {
  TrieBuildInput input{};
  input.sid_bytes = code_bytes;
  input.sid_signed = code_signed;
  input.rows = static_cast<std::int64_t>(sids.size());
  input.columns = columns;
  input.item_ids = items.data();
  for (int l = 0; l < columns; ++l) input.levels.push_back(symbols_of(*this, l));
  if (eos >= 0) {
    LevelSymbols last;  // nothing but the end
    last.size = 0;
    last.eos_symbol = 0;
    last.tokens = {static_cast<std::int32_t>(eos)};
    last.codes = {-1};
    input.levels.push_back(last);
  }
  input.eos = eos;
  input.has_vocab = vocab != Vocab::none;
  input.threads = threads;
  switch (code_bytes * (code_signed ? 1 : -1)) {
    case 1:
      return build_as<std::int8_t>(*this, input);
    case -1:
      return build_as<std::uint8_t>(*this, input);
    case 2:
      return build_as<std::int16_t>(*this, input);
    case -2:
      return build_as<std::uint16_t>(*this, input);
    case 4:
      return build_as<std::int32_t>(*this, input);
    case -4:
      return build_as<std::uint32_t>(*this, input);
    case 8:
      return build_as<std::int64_t>(*this, input);
    default:
      return build_as<std::uint64_t>(*this, input);
  }
}

std::map<Sid, std::vector<std::int64_t>> Catalogue::by_tokens() const {
  std::map<Sid, std::vector<std::int64_t>> out;
  for (std::size_t row = 0; row < sids.size(); ++row) {
    Sid path;
    for (std::size_t l = 0; l < sids[row].size(); ++l)
      path.push_back(vocab == Vocab::none ? sids[row][l] : tokens[l][sids[row][l]]);
    if (eos >= 0) path.push_back(eos);
    out[path].push_back(items[row]);
  }
  return out;
}

std::int64_t Catalogue::num_tokens() const {
  std::int64_t most = eos;
  for (const auto& [path, unused] : by_tokens())
    for (std::int64_t token : path) most = std::max(most, token);
  for (const auto& level : tokens)
    for (std::int32_t token : level) most = std::max<std::int64_t>(most, token);
  return most + 1;
}
