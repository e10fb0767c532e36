// Constrained beam search from C++: an index that TrieIndex.save wrote, random logits in place of a model's, and
// raddpo::beam_step once a level. Prints every beam of every step, then the item that each beam ends in.
//
//   beam_search INDEX [batch=2] [beam_width=5] [seed=0]
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <raddpo_ext/trie.h>

#include <cstdio>
#include <exception>
#include <filesystem>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// An operator of the package, found by its name in torch's registry; csrc/schema.cpp lists them all.
template <typename Signature>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

struct Index {
  Tensor block;   // uint8, the whole file, mapped into memory
  Tensor header;  // int64, its first words, always on the CPU

  std::int64_t word(int i) const { return header.const_data_ptr<std::int64_t>()[i]; }
};

Index load(const std::string& path) {
  static const auto trie_check = find_op<Tensor(const Tensor&, std::int64_t)>("raddpo::trie_check");
  const auto size = static_cast<std::int64_t>(std::filesystem::file_size(path));
  const Tensor block = size ? at::from_file(path, /*shared=*/false, size, at::kByte) : at::empty({0}, at::kByte);
  try {
    return {block, trie_check.call(block, /*threads=*/1)};
  } catch (const std::exception& error) {  // the file is not a whole index
    throw std::runtime_error(path + ": " + error.what());
  }
}

// Columns of the logits: one more than the largest token id.
std::int64_t vocab_of(const Index& index) {
  std::int64_t most = 0;
  for (int level = 0; level < index.word(raddpo::kLevels); ++level)
    most = std::max(most, index.word(raddpo::kMaxToken + level));
  return most + 1;
}

void search(const Index& index, std::int64_t batch, std::int64_t beam_width, std::uint64_t seed) {
  // (logits, scores, nodes, trie, header, live, lse, level, beam_width, normalize, length_penalty)
  static const auto beam_step = find_op<std::tuple<Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
      const OptionalTensor&, std::int64_t, std::int64_t, std::int64_t, double)>("raddpo::beam_step");
  static const auto trie_items =
      find_op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&)>(
          "raddpo::trie_items");

  at::manual_seed(seed);
  const std::int64_t vocab = vocab_of(index);
  Tensor scores = at::zeros({batch, 1});  // one beam a query, at the root
  Tensor nodes = at::zeros({batch, 1}, at::kLong);
  Tensor tokens, parents;
  for (int level = 0; level < index.word(raddpo::kLevels); ++level) {
    const Tensor logits = at::randn({batch, scores.size(1), vocab});  // a model reads `tokens` and `parents` here
    std::tie(scores, tokens, parents, nodes) =
        beam_step.call(logits, scores, nodes, index.block, index.header, std::nullopt, std::nullopt,
                       /*level=*/-1, beam_width, /*normalize=*/0, /*length_penalty=*/0.0);
    for (std::int64_t query = 0; query < batch; ++query)
      for (std::int64_t slot = 0; slot < beam_width; ++slot)
        std::printf("step %d query %ld slot %ld token %ld parent %ld score %.9g\n", level, query, slot,
                    tokens[query][slot].item<std::int64_t>(), parents[query][slot].item<std::int64_t>(),
                    scores[query][slot].item<float>());
  }

  const auto [first, count] = trie_items.call(nodes, index.block, index.header, std::nullopt);
  const auto bytes = index.word(raddpo::kItemBytes);
  const Tensor items = index.block.narrow(0, index.word(raddpo::kItems), bytes * index.word(raddpo::kNumItems))
                           .view(bytes == 8 ? at::kLong : at::kInt);
  for (std::int64_t beam = 0; beam < batch * beam_width; ++beam)
    if (count[beam].item<std::int64_t>() > 0)  // an empty slot, where the catalogue has fewer SIDs, has no item
      std::printf("query %ld item %ld score %.9g\n", beam / beam_width,
                  items[first[beam].item<std::int64_t>()].item<std::int64_t>(), scores.view(-1)[beam].item<float>());
}

int main(int argc, char** argv) try {
  if (argc < 2) throw std::runtime_error("usage: beam_search INDEX [batch] [beam_width] [seed]");
  const auto number = [&](int i, int otherwise) { return argc > i ? std::stoi(argv[i]) : otherwise; };
  search(load(argv[1]), number(2, 2), number(3, 5), number(4, 0));
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
