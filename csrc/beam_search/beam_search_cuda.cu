#include "beam_kernels.cuh"

namespace raddpo::cuda {

std::int64_t beam_step_workspace(const BeamStepArgs& a) { return lay_out(a, nullptr).bytes; }

int beam_step(const BeamStepArgs& a, void* workspace, CUstream_st* stream) { return launch_step(a, workspace, stream); }

}  // namespace raddpo::cuda
