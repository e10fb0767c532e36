// What a torch without CUDA lacks for tensors that say they are on it: autograd and `device=` ask for a guard and for
// the accelerator's name. Neither does anything.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>

#include <cstring>

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, FakeGuardImpl<DeviceType::CUDA>)
}

namespace at {
struct FakeHooks : CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};

// Torch keeps the hooks that it found when it was imported, without members: only what they answer is exchanged.
const bool installed = [] {
  static const FakeHooks hooks;
  static_assert(sizeof(FakeHooks) == sizeof(void*));
  std::memcpy(const_cast<CUDAHooksInterface*>(&detail::getCUDAHooks()), &hooks, sizeof(void*));
  return true;
}();
}  // namespace at
