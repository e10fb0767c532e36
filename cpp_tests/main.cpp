#include <chrono>
#include <cstdio>
#include <cstring>

#include "check.h"

std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

int main(int argc, char** argv) {
  int ran = 0, failed = 0;
  for (const Test& test : tests()) {
    if (argc > 1 && !std::strstr(test.name, argv[1])) continue;
    ++ran;
    const auto begin = std::chrono::steady_clock::now();
    try {
      test.run();
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
      std::printf("ok %s (%.2f s)\n", test.name, seconds.count());
    } catch (const std::exception& error) {
      ++failed;
      std::printf("FAILED %s\n  %s\n", test.name, error.what());
    }
    std::fflush(stdout);
  }
  std::printf("%d tests, %d failed, up to %s\n", ran, failed, raddpo::name(raddpo::best_isa()));
  return failed || !ran;
}
