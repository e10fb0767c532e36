// The Python module: what is not an operator on tensors.
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "common/huge_pages.h"
#include "common/isa.h"
#include "trie_index/trie_build.h"
#include "trie_index/trie_check.h"
#include "trie_index/trie_live.h"
#include "trie_index/trie_merge.h"

namespace py = pybind11;

namespace raddpo {
namespace {

using Int32s = py::array_t<std::int32_t, py::array::c_style | py::array::forcecast>;
using Int64s = py::array_t<std::int64_t, py::array::c_style>;

std::vector<std::int32_t> to_vector(const Int32s& a) { return {a.data(), a.data() + a.size()}; }

using Bytes = py::array_t<std::uint8_t, py::array::c_style>;
using Bools = py::array_t<bool, py::array::c_style>;

py::array_t<std::uint8_t> to_array(TrieBytes bytes) {
  std::uint8_t* data = bytes.data.release();
  return py::array_t<std::uint8_t>(bytes.size, data, py::capsule(data, [](void* p) { std::free(p); }));
}

// One level: (size, first_token, eos_symbol, symbol_of_code, tokens, codes).
using Level = std::tuple<std::int64_t, std::int32_t, std::int32_t, Int32s, Int32s, Int32s>;

py::array_t<std::uint8_t> build(const py::array& sids, const std::optional<Int64s>& lengths,
                                const std::optional<Int64s>& item_ids, const std::vector<Level>& levels,
                                std::int64_t eos, bool has_vocab, int threads,
                                const std::function<void(double)>& progress) {
  TrieBuildInput input{};
  input.sids = sids.data();
  input.sid_bytes = static_cast<int>(sids.itemsize());
  input.sid_signed = sids.dtype().kind() == 'i';
  input.rows = sids.shape(0);
  input.columns = sids.shape(1);
  input.lengths = lengths ? lengths->data() : nullptr;
  input.item_ids = item_ids ? item_ids->data() : nullptr;
  for (const auto& [size, first_token, eos_symbol, symbol_of_code, tokens, codes] : levels)
    input.levels.push_back(
        {size, first_token, eos_symbol, to_vector(symbol_of_code), to_vector(tokens), to_vector(codes)});
  input.eos = eos;
  input.has_vocab = has_vocab;
  input.threads = threads;
  if (progress)
    input.progress = [&](double share) {
      const py::gil_scoped_acquire gil;
      progress(share);
    };
  input.interrupt = [] {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals()) throw py::error_already_set();
  };
  TrieBytes bytes;
  {
    const py::gil_scoped_release no_gil;
    bytes = trie_build(input);
  }
  return to_array(std::move(bytes));
}

// (live, items, SIDs, nodes, nodes of the last level), all that are left.
auto live(const Bytes& trie, const std::optional<Bytes>& before, const std::optional<Int64s>& ids,
          const std::optional<Bools>& mask, bool keep, int threads) {
  TrieLiveInput input{};
  input.trie = trie.data();
  input.live = before ? before->data() : nullptr;
  input.ids = ids ? ids->data() : nullptr;
  input.count = ids ? ids->size() : 0;
  input.mask = mask ? mask->data() : nullptr;
  input.mask_size = mask ? mask->size() : 0;
  input.keep = keep;
  input.threads = threads;
  TrieLive left;
  {
    const py::gil_scoped_release no_gil;
    left = trie_live(input);
  }
  return py::make_tuple(to_array(std::move(left.bytes)), left.items, left.sids, left.nodes, left.deepest);
}

py::array_t<std::uint8_t> compact(const Bytes& trie, const Bytes& live, std::int64_t sids, int threads) {
  TrieBytes bytes;
  {
    const py::gil_scoped_release no_gil;
    bytes = trie_compact(trie.data(), live.data(), sids, threads);
  }
  return to_array(std::move(bytes));
}

py::array_t<std::uint8_t> merge_tries(const Bytes& trie, const Bytes& added, int threads) {
  TrieBytes bytes;
  {
    const py::gil_scoped_release no_gil;
    bytes = trie_merge(trie.data(), added.data(), threads);
  }
  return to_array(std::move(bytes));
}

std::int64_t first_known_id(const Bytes& trie, const Int64s& ids, int threads) {
  const py::gil_scoped_release no_gil;
  return first_known(trie.data(), ids.data(), ids.size(), threads);
}

Isa isa_of(const std::string& text) {
  for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512})
    if (text == name(isa) && isa <= best_isa()) return isa;
  throw py::value_error("isa must be an instruction set this CPU has (scalar, avx2, avx512), got '" + text + "'");
}

}  // namespace
}  // namespace raddpo

PYBIND11_MODULE(_C, m) {
  using namespace raddpo;
  m.attr("HEADER_WORDS") = kHeaderWords;
  m.attr("MAX_LEVELS") = kMaxLevels;
  m.attr("MAX_CODES") = kMaxCodes;
  m.attr("FORMAT_VERSION") = kFormatVersion;
  py::dict words;
  for (const HeaderName& header : kHeaderNames) words[header.name] = header.word;
  m.attr("HEADER") = words;
  m.def("trie_build", &build, py::arg("sids"), py::arg("lengths"), py::arg("item_ids"), py::arg("levels"),
        py::arg("eos"), py::arg("has_vocab"), py::arg("threads"), py::arg("progress"));
  m.def("trie_live", &live, py::arg("trie"), py::arg("live"), py::arg("ids"), py::arg("mask"), py::arg("keep"),
        py::arg("threads"));
  m.def("trie_compact", &compact, py::arg("trie"), py::arg("live"), py::arg("sids"), py::arg("threads"));
  m.def("trie_merge", &merge_tries, py::arg("trie"), py::arg("added"), py::arg("threads"));
  m.def("trie_first_known", &first_known_id, py::arg("trie"), py::arg("ids"), py::arg("threads"));
  m.def(
      "trie_check",
      [](const py::buffer& b, int threads) {
        const py::buffer_info info = b.request();
        const py::gil_scoped_release no_gil;
        trie_check(static_cast<const std::uint8_t*>(info.ptr), info.size * info.itemsize, threads);
      },
      py::arg("data"), py::arg("threads"));
  m.def("trie_checksum", [](const py::buffer& b) {
    const py::buffer_info info = b.request();
    const py::gil_scoped_release no_gil;
    return trie_checksum(static_cast<const std::uint8_t*>(info.ptr), info.size * info.itemsize);
  });
  m.def(
      "advise_huge_pages",
      [](std::uintptr_t address, std::size_t bytes) { advise_huge_pages(reinterpret_cast<void*>(address), bytes); },
      py::arg("address"), py::arg("bytes"));
  m.def("isa", [] { return name(current_isa()); });
  m.def("best_isa", [] { return name(best_isa()); });
  m.def("set_isa", [](const std::string& isa) { set_isa(isa_of(isa)); });
}
