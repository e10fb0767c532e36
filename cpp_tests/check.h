#pragma once
// Tests that register themselves, checks that say what they found, and the instruction sets to go through.
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/isa.h"

struct Test {
  const char* name;
  void (*run)();
};
std::vector<Test>& tests();

#define TEST(name)                                                                 \
  static void name();                                                              \
  static const bool registered_##name = (tests().push_back({#name, &name}), true); \
  static void name()

template <typename... Parts>
[[noreturn]] void fail(const char* file, int line, const Parts&... parts) {
  std::ostringstream message;
  message << file << ":" << line << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

#define CHECK(condition)                                    \
  do                                                        \
    if (!(condition)) fail(__FILE__, __LINE__, #condition); \
  while (false)

#define CHECK_EQUAL(got, expected)                                                                                  \
  do {                                                                                                              \
    const auto got_ = got;                                                                                          \
    const auto expected_ = expected;                                                                                \
    if (!(got_ == expected_)) fail(__FILE__, __LINE__, #got " is ", got_, ", not ", expected_, " (" #expected ")"); \
  } while (false)

// The statement throws std::invalid_argument with `part` in its message.
#define CHECK_REFUSED(statement, part)                                                                        \
  do {                                                                                                        \
    std::string message_ = "nothing was thrown";                                                              \
    try {                                                                                                     \
      statement;                                                                                              \
    } catch (const std::invalid_argument& error) {                                                            \
      message_ = error.what();                                                                                \
    }                                                                                                         \
    if (message_.find(part) == std::string::npos) fail(__FILE__, __LINE__, "no '", part, "' in: ", message_); \
  } while (false)

// Calls body once for each instruction set that this CPU has, with that one current.
template <typename Body>
void for_each_isa(const Body& body) {
  const raddpo::Isa before = raddpo::current_isa();
  for (raddpo::Isa isa : {raddpo::Isa::scalar, raddpo::Isa::avx2, raddpo::Isa::avx512}) {
    if (isa > raddpo::best_isa()) continue;
    raddpo::set_isa(isa);
    body();
  }
  raddpo::set_isa(before);
}
