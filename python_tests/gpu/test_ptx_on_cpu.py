"""The translation of PTX to C++ (cuda_on_cpu/ptx.py), instruction by instruction, and that a wrong PTX is noticed."""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path

import pytest
import torch
from support.beam_cases import generator_of
from support.cuda_on_cpu.ptx import _COMPARISONS, UnknownPTX, translate
from support.cuda_on_cpu.ptx_kernels import CSRC, compiled, nvcc, ptx_of
from support.cuda_on_cpu.shim import Shim, compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler (g++, or the one named by CXX)")

HEAD = ".version 9.0\n.target sm_90\n.address_size 64\n"
#: Takes the place of a kernel of faults.cuh: its name, and its parameters "in" and "out".
NAME = "_ZN6raddpo4cuda15reversed_kernelEPKiPi"


def f32(x: float) -> int:
    return int.from_bytes(struct.pack("<f", x), "little")


def f64(x: float) -> int:
    return int.from_bytes(struct.pack("<d", x), "little")


#: Instructions on %a, %b, %c (64 bits each; %ra ... their low halves, %ha ... the low 16 bits, %fa ... and %da ... as
#: floats, %pa ... whether they are odd), their operands, and the bits of the result in %d, %rd, %hd, %fd, %dd or %pd.
CASES: list[tuple[str, list[int], int]] = [
    ("add.s32 %rd, %ra, %rb", [0x7FFFFFFF, 1], 0x80000000),
    ("add.s64 %d, %a, -8", [5], 2**64 - 3),
    ("sub.s32 %rd, %ra, %rb", [1, 2], 0xFFFFFFFF),
    ("mul.lo.s32 %rd, %ra, %rb", [0x10001, 0x10001], 0x20001),
    ("mul.wide.s32 %d, %ra, %rb", [0xFFFFFFFF, 3], 2**64 - 3),
    ("mul.wide.u32 %d, %ra, %rb", [0xFFFFFFFF, 3], 0x2FFFFFFFD),
    ("mad.lo.s32 %rd, %ra, %rb, %rc", [3, 4, 5], 17),
    ("div.s64 %d, %a, %b", [2**64 - 7, 2], 2**64 - 3),
    ("div.u64 %d, %a, %b", [2**64 - 7, 2], 2**63 - 4),
    ("div.s64 %d, %a, %b", [2**63, 2**64 - 1], 2**63),
    ("rem.s64 %d, %a, %b", [2**64 - 7, 2], 2**64 - 1),
    ("rem.u32 %rd, %ra, %rb", [7, 4], 3),
    ("neg.s32 %rd, %ra", [5], 0xFFFFFFFB),
    ("min.s64 %d, %a, %b", [2**64 - 1, 0], 2**64 - 1),
    ("min.u64 %d, %a, %b", [2**64 - 1, 0], 0),
    ("max.s32 %rd, %ra, %rb", [0xFFFFFFFF, 0], 0),
    ("max.f32 %fd, %fa, %fb", [f32(math.nan), f32(1.0)], f32(1.0)),
    ("max.f32 %fd, %fa, %fb", [f32(-0.0), f32(0.0)], f32(0.0)),
    ("min.f32 %fd, %fa, %fb", [f32(0.0), f32(-0.0)], f32(-0.0)),
    ("and.b16 %hd, %ha, %hb", [0xFF0F, 0x0FFF], 0x0F0F),
    ("or.b32 %rd, %ra, %rb", [0xF0, 0x0F], 0xFF),
    ("xor.b64 %d, %a, %b", [0xFF, 0x0F], 0xF0),
    ("not.b64 %d, %a", [1], 2**64 - 2),
    ("and.pred %pd, %pa, %pb", [1, 0], 0),
    ("or.pred %pd, %pa, %pb", [1, 0], 1),
    ("xor.pred %pd, %pa, %pb", [1, 1], 0),
    ("not.pred %pd, %pa", [0], 1),
    ("shl.b32 %rd, %ra, 32", [1], 0),
    ("shl.b64 %d, %a, %rb", [1, 63], 2**63),
    ("shr.s32 %rd, %ra, 40", [0x80000000], 0xFFFFFFFF),
    ("shr.u32 %rd, %ra, 31", [0x80000000], 1),
    ("shr.s64 %d, %a, 63", [2**63], 2**64 - 1),
    ("shr.u64 %d, %a, 64", [2**63], 0),
    ("bfi.b64 %d, %a, %b, 32, 32", [0x11223344, 0xAABBCCDD], 0x11223344AABBCCDD),
    ("bfi.b32 %rd, %ra, %rb, 4, 8", [0xFF, 0], 0xFF0),
    ("popc.b64 %rd, %a", [2**64 - 1], 64),
    ("popc.b32 %rd, %ra", [0xF0F], 8),
    ("clz.b64 %rd, %a", [1], 63),
    ("clz.b64 %rd, %a", [0], 64),
    ("selp.b32 %rd, %ra, 7, %pb", [3, 0], 7),
    ("selp.f64 %dd, %da, %db, %pa", [f64(1.5) | 1, f64(2.5)], f64(1.5) | 1),
    ("mov.u32 %rd, 0x10", [], 16),
    ("mov.b32 %fd, 0f3F800000", [], f32(1.0)),
    ("mov.b32 %fd, %ra", [f32(1.0)], f32(1.0)),
    ("mov.pred %pd, 1", [], 1),
    ("mov.b64 %d, {%ra, %rb}", [1, 2], 2 << 32 | 1),
    ("mov.b64 {%rd, %ra}, %b", [0, 2 << 32 | 1], 1),
    ("mov.b64 {%ra, %rd}, %b", [0, 2 << 32 | 1], 2),
    ("add.f32 %fd, %fa, %fb", [f32(1.0), f32(2.0**-24)], f32(1.0)),
    ("add.rz.f32 %fd, %fa, %fb", [f32(1.0), f32(-(2.0**-30))], f32(1.0 - 2.0**-24)),
    ("mul.rn.f64 %dd, %da, %db", [f64(1.5), f64(3.0)], f64(4.5)),
    ("fma.rn.f32 %fd, %fa, %fb, %fc", [f32(1 + 2.0**-12), f32(1 + 2.0**-12), f32(-1 - 2.0**-11)], f32(2.0**-24)),
    ("fma.rm.f32 %fd, %fa, %fb, %fc", [f32(1.0), f32(1.0), f32(-(2.0**-30))], f32(1.0 - 2.0**-24)),
    ("fma.rn.f32 %fd, %fa, %fb, %fc", [f32(1.0), f32(1.0), f32(-(2.0**-30))], f32(1.0)),
    ("div.rn.f32 %fd, %fa, %fb", [f32(1.0), f32(3.0)], f32(1 / 3)),
    ("rcp.rn.f64 %dd, %da", [f64(3.0)], f64(1 / 3)),
    ("rcp.approx.ftz.f32 %fd, %fa", [f32(2.0**-130)], f32(math.inf)),
    ("rcp.approx.ftz.f64 %dd, %da", [f64(3.0)], f64(1 / 3) >> 32 << 32),
    ("ex2.approx.f32 %fd, %fa", [f32(-140.0)], f32(2.0**-140)),
    ("ex2.approx.ftz.f32 %fd, %fa", [f32(-140.0)], 0),
    ("ex2.approx.ftz.f32 %fd, %fa", [f32(3.0)], f32(8.0)),
    ("neg.f32 %fd, %fa", [f32(1.0)], f32(-1.0)),
    ("abs.f64 %dd, %da", [f64(-1.0)], f64(1.0)),
    ("copysign.f32 %fd, %fa, %fb", [f32(-1.0), f32(5.0)], f32(-5.0)),
    ("cvt.s64.s32 %d, %ra", [0xFFFFFFFF], 2**64 - 1),
    ("cvt.u64.u32 %d, %ra", [0xFFFFFFFF], 0xFFFFFFFF),
    ("cvt.s32.s16 %rd, %ha", [0x8000], 0xFFFF8000),
    ("cvt.u16.u32 %hd, %ra", [0x12345], 0x2345),
    ("cvt.rn.f32.s32 %fd, %ra", [0xFFFFFFFF], f32(-1.0)),
    ("cvt.rn.f64.s64 %dd, %a", [2**64 - 2], f64(-2.0)),
    ("cvt.rn.f32.f64 %fd, %da", [f64(1 / 3)], f32(1 / 3)),
    ("cvt.f64.f32 %dd, %fa", [f32(1.5)], f64(1.5)),
    ("cvt.f32.f16 %fd, %ha", [0x3E00], f32(1.5)),
    ("cvt.rni.f32.f32 %fd, %fa", [f32(2.5)], f32(2.0)),
    ("cvt.sat.f32.f32 %fd, %fa", [f32(math.nan)], 0),
    ("cvt.sat.f32.f32 %fd, %fa", [f32(1.5)], f32(1.0)),
    ("cvt.rn.f16x2.f32 %rd, %fa, %fb", [f32(1.5), f32(-2.0)], 0x3E00C000),
    ("cvt.rn.bf16x2.f32 %rd, %fa, %fb", [f32(1.5), f32(-2.0)], 0x3FC0C000),
    ("setp.lt.s32 %pd, %ra, %rb", [0xFFFFFFFF, 0], 1),
    ("setp.lt.u32 %pd, %ra, %rb", [0xFFFFFFFF, 0], 0),
    ("setp.ge.s64 %pd, %a, %b", [0, 2**64 - 1], 1),
    ("setp.gt.u16 %pd, %ha, 31743", [31744], 1),
    ("setp.eq.f32 %pd, %fa, 0fFF800000", [f32(-math.inf)], 1),
    *[
        (f"setp.{name}.f32 %pd, %fa, %fb", [f32(math.nan), f32(1.0)], int(name[-1] == "u" or name == "nan"))
        for name in _COMPARISONS
    ],
    *[
        (f"setp.{name}.f64 %pd, %da, %db", [f64(1.0), f64(2.0)], int(name[:2] in ("lt", "le", "ne") or name == "num"))
        for name in _COMPARISONS
    ],
    ("shfl.sync.bfly.b32 %rd, %lane, 5, 31, -1", [], 3 ^ 5),
    ("shfl.sync.idx.b32 %rd, %lane, 9, 31, -1", [], 9),
    ("shfl.sync.up.b32 %rd|%pb, %lane, 1, 0, -1", [], 2),
    ("shfl.sync.up.b32 %rb|%pd, %lane, 4, 0, -1", [], 0),
    ("shfl.sync.down.b32 %rd, %lane, 2, 31, -1", [], 5),
    ("shfl.sync.down.b32 %rd, %lane, 2, 0x1c03, -1", [], 3),
    ("vote.sync.ballot.b32 %rd, %even, -1", [], 0x55555555),
    ("@%pa mov.u32 %rd, 9", [1], 9),
    ("@!%pa mov.u32 %rd, 9", [1], 777),
    ("@%pa bra $L_1; mov.u32 %rd, 9; $L_1: mov.u32 %ra, 1", [1], 777),
    ("mov.u32 %rd, %ntid.x", [], 64),
    ("mov.u32 %ra, space; st.shared.v2.u32 [%ra+8], {%rb, 7}; ld.shared.v2.u32 {_, %rd}, [space+8]", [0, 5], 7),
    ("mov.u32 %ra, space; st.shared.u8 [%ra+1], 200; ld.shared.s8 %rd, [%ra+1]", [], 0xFFFFFFC8),
    ("st.shared.u32 [space], 5; bar.sync 0; atom.shared.add.u32 %rd, [space], 0", [], 5),
    ("st.global.u64 [%from], 5; atom.global.cas.b64 %a, [%from], 5, 8; ld.global.u64 %d, [%from]", [], 8),
    ("st.global.u32 [%from], 5; atom.acq_rel.gpu.global.add.u32 %ra, [%from], 2; ld.global.u32 %rd, [%from]", [], 7),
    ("st.shared.u32 [space+4], 6; cvta.shared.u64 %a, 4; ld.u32 %rd, [%a]", [], 6),
    ("st.shared.u32 [space+4], 6; cvta.shared.u64 %a, 4; mapa.u64 %b, %a, 0; ld.u32 %rd, [%b]", [], 6),
    ("barrier.cluster.arrive; barrier.cluster.wait; membar.gl; mov.u32 %rd, 1", [], 1),
    ("griddepcontrol.launch_dependents; griddepcontrol.wait; mov.u32 %rd, 1", [], 1),
    ("{ .reg .b32 %tmp; mov.u32 %tmp, 4; mov.u32 %rd, %tmp; } mov.u32 %ra, 1", [], 4),
]


def ptx_of_case(instructions: str, case: int, operands: list[int]) -> str:
    """A kernel of 64 threads, of which the fourth writes the result to its place."""
    names = [f"{prefix}{name}" for prefix in ("", "r", "h", "f", "d", "p") for name in "abcd"]
    types = {"": "b64", "r": "b32", "h": "b16", "f": "f32", "d": "f64", "p": "pred"}
    registers = [f".reg .{types[name[:-1]]} %{name};" for name in names]
    inputs = []
    for name, value in zip("abc", operands + [0] * 3, strict=False):
        inputs += [f"mov.u64 %{name}, {value};", f"cvt.u32.u64 %r{name}, %{name};", f"cvt.u16.u32 %h{name}, %r{name};"]
        inputs += [f"mov.b32 %f{name}, %r{name};", f"mov.b64 %d{name}, %{name};"]
        inputs += [f"and.b32 %low, %r{name}, 1;", f"setp.eq.s32 %p{name}, %low, 1;"]
    target = re.search(r"%(d|rd|hd|fd|dd|pd)\b", instructions)
    assert target
    result = {
        "d": "mov.u64 %out, %d;",
        "rd": "cvt.u64.u32 %out, %rd;",
        "hd": "cvt.u32.u16 %rd, %hd; cvt.u64.u32 %out, %rd;",
        "fd": "mov.b32 %rd, %fd; cvt.u64.u32 %out, %rd;",
        "dd": "mov.b64 %out, %dd;",
        "pd": "selp.u64 %out, 1, 0, %pd;",
    }[target[1]]
    return f"""{HEAD}.visible .entry {NAME}_{case}(.param .u64 p_0, .param .u64 p_1)
.maxntid 64, 1, 1
{{
  .reg .b64 %from, %to, %out; .reg .b32 %lane, %low; .reg .pred %even, %other;
  .shared .align 8 .b8 space[64];
  {" ".join(registers)}
  ld.param.u64 %from, [p_0]; ld.param.u64 %to, [p_1];
  mov.u32 %lane, %tid.x; and.b32 %low, %lane, 1; setp.eq.s32 %even, %low, 0;
  {" ".join(inputs)}
  mov.u32 %rd, 777;
  {instructions};
  {result}
  setp.ne.s32 %other, %lane, 3;
  @%other bra $L_end;
  st.global.u64 [%to], %out;
$L_end:
  ret;
}}
"""


@pytest.fixture(scope="module")
def cases(shim_folder: Path) -> Shim:
    texts = [ptx_of_case(instructions, i, operands) for i, (instructions, operands, _) in enumerate(CASES)]
    kernels = [kernel for text in texts for kernel in translate(text)]
    return Shim(shim_folder, [compiled("cases", kernels, shim_folder)])


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: f"{i}:{CASES[i][0]}")
def test_instruction(cases: Shim, case: int) -> None:
    out = torch.full((1,), 777)
    cases.run_alone(f"{NAME}_{case}", torch.full((1,), 5), out)
    assert out.item() % 2**64 == CASES[case][2]


@pytest.mark.parametrize(
    "instruction",
    [
        "sin.approx.f32 %fd, %fa",
        "add.sat.s32 %rd, %ra, %rb",
        "mul.hi.s32 %rd, %ra, %rb",
        "cvt.rzi.s32.f32 %rd, %fa",
        "bar.sync 1, 64",
        "call.uni f, ()",
        "atom.global.exch.b64 %d, [%a], %b",
        "ld.const.u32 %rd, [%a]",
        "mov.u32 %rd, %clock",
        "mov.u32 %rd, %missing",
        "mov.u32 %rd, missing",
        "add.s32 %rd, %ra",
        "add.f32 %fd, %fa, 1",
        "cvt.u64.u32 %rd, %ra",
        ".reg .b128 %x",
        ".local .align 8 .b8 depot[16]",
    ],
)
def test_unknown_is_refused(instruction: str) -> None:
    """By its text: an instruction, an operand or a directive."""
    with pytest.raises(UnknownPTX, match=re.escape(instruction)):
        translate(ptx_of_case(f"{instruction}; mov.u32 %rd, 1", 0, []))


def test_unknown_directive_is_refused() -> None:
    with pytest.raises(UnknownPTX, match=r"\.func"):
        translate(HEAD + ".visible .func f()\n{\nret;\n}\n")


ROW_LSE = ("row_lse/row_lse_cuda.cu", "row_lse_kernelINS_7Float32E")
CLUSTERS = ("token_logps/token_logps_cuda.cu", "forward_kernelINS_7Float32ENS0_5PlainIfEE")
#: Faults put into a kernel's PTX: where, the text replaced, and what the run says of it; None: the result is wrong.
FAULTS: dict[str, tuple[tuple[str, str], str, str, str | None]] = {
    "no barrier": (ROW_LSE, r"bar\.sync\s+0;", "", None),
    "wrong lane": (ROW_LSE, r"(shfl\.sync\.bfly\.b32\s+\S+ %r\d+, )%r\d+", r"\g<1>0", None),
    "half a warp": (ROW_LSE, r"(shfl\.sync\.bfly\.b32[^;]*, )%r\d+;", r"\g<1>65535;", "shfl.sync.bfly.b32 at line"),
    "next element": (ROW_LSE, r"(ld\.global\.f32\s+%f\d+, \[%rd\d+)", r"\1+4", None),
    "misaligned": (ROW_LSE, r"(ld\.global\.nc\.v4\.u32[^\[]*\[%rd\d+)", r"\1+4", "ld.global.nc.v4.u32 at line"),
    "past shared memory": (ROW_LSE, r"(ld\.shared\.f32\s+%f\d+, \[%r\d+)\]", r"\1+256]", "ld.shared.f32 at line"),
    "no wait for the cluster": (CLUSTERS, r"(.*)barrier\.cluster\.wait;", r"\1", "memory of a block that"),
    "another block's memory": (CLUSTERS, r"(mapa\.u64\s+%rd\d+, %rd\d+), %r\d+", r"\1, 1", "memory of a block that"),
    "arrives once": (CLUSTERS, r"(.*)barrier\.cluster\.arrive;", r"\1", "wait for the cluster without an arrival"),
}


def entry_of(text: str, name: str) -> str:
    """The PTX of the one kernel whose name contains ``name``."""
    (entry,) = (part for part in re.split(r"^(?=\.entry)", text, flags=re.MULTILINE)[1:] if name in part.split("(")[0])
    return HEAD + entry


def is_right(shim: Shim, kernel: tuple[str, str]) -> bool:
    logits = torch.randn(2, 40_001, generator=generator_of(0))  # one row at least begins off a multiple of 16 bytes
    logits[:, 0] = 14
    for order in ((0, 0), (1, 1), (2, 3)):
        shim.set_order(*order)
        if kernel is ROW_LSE:
            lse = shim.row_lse(logits)
        else:
            _, lse = shim.token_logps(logits, torch.tensor([3, 4]), None, None, None, 1.0, 0.0, -100, 0, 40_001)
        if not torch.allclose(lse.double(), logits.double().logsumexp(1), rtol=1e-6, atol=0):
            return False
    return True


@pytest.fixture(scope="module")
def ptx_texts(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], str]:
    if nvcc() is None:
        pytest.skip("needs nvcc, in CUDA_HOME or /usr/local/cuda")
    folder = tmp_path_factory.mktemp("ptx")
    return {kernel: entry_of(ptx_of(CSRC / kernel[0], folder), kernel[1]) for kernel in (ROW_LSE, CLUSTERS)}


@pytest.mark.parametrize("kernel", [ROW_LSE, CLUSTERS], ids=["row_lse", "clusters"])
def test_right_ptx(ptx_texts: dict[tuple[str, str], str], kernel: tuple[str, str], shim_folder: Path) -> None:
    shim = Shim(shim_folder, [compiled("right", translate(ptx_texts[kernel]), shim_folder)])
    assert is_right(shim, kernel)
    if kernel is ROW_LSE:
        with pytest.raises(RuntimeError, match="no PTX of this kernel"):
            shim.row_lse(torch.zeros(1, 4, dtype=torch.bfloat16))


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_seen(ptx_texts: dict[tuple[str, str], str], fault: str, shim_folder: Path) -> None:
    kernel, pattern, replacement, error = FAULTS[fault]
    text, times = re.subn(pattern, replacement, ptx_texts[kernel], count=1, flags=re.DOTALL)
    assert times == 1
    shim = Shim(shim_folder, [compiled("fault", translate(text), shim_folder)])
    if error is None:
        assert not is_right(shim, kernel)
    else:
        with pytest.raises(RuntimeError, match=error):
            is_right(shim, kernel)
