// The kernels of beam_step, whose candidates compete by perturbed scores.
#include "../beam_search/beam_kernels.cuh"

namespace raddpo::cuda {

std::int64_t sample_step_workspace(const SampleStepArgs& a) { return lay_out(a, nullptr).bytes; }

int sample_step(const SampleStepArgs& a, void* workspace, CUstream_st* stream) {
  return launch_step(a, workspace, stream);
}

}  // namespace raddpo::cuda
