// Compiles the file named by RADDPO_KERNELS once per instruction set, each time in a namespace of its own
// (raddpo::scalar, raddpo::avx2, raddpo::avx512), so that one plain C++ source serves every CPU.
// No include guard: included once by each *_cpu.cpp, after every other header.
#define RADDPO_ISA scalar
#include RADDPO_KERNELS
#undef RADDPO_ISA

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,popcnt,bmi,bmi2")
#define RADDPO_BMI2  // __BMI2__ does not follow the pragma in C++
#define RADDPO_ISA avx2
#include RADDPO_KERNELS
#undef RADDPO_ISA
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt,bmi,bmi2,prefer-vector-width=512")
#define RADDPO_AVX512
#define RADDPO_ISA avx512
#include RADDPO_KERNELS
#undef RADDPO_ISA
#undef RADDPO_AVX512
#undef RADDPO_BMI2
#pragma GCC pop_options
#endif
