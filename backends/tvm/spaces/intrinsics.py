"""Dot products of bytes as instructions: lanes of 32 bits, to each of which four products of bytes are added.

TVM has these, but of VNNI in a form that its LLVM no longer takes (operands are <64 x i8> there now), and for sums in
memory only; ours are in registers ("local"). See Intel's Software Developer's Manual, VPDPBUSD, and Arm's ARM, SDOT
(by element). An Arm core without SDOT multiplies bytes into 16 bits (SMULL) and adds pairs to 32 bits (SADALP), an x86
one without VNNI widens bytes to 16 bits and multiplies and adds pairs (VPMADDWD). All of them are exact: VPMADDUBSW,
which saturates, is not among them.
"""
# The bodies are TVMScript, which Python parses and TVM reads: they are never run.
# mypy: ignore-errors

from __future__ import annotations

import functools

VNNI, VNNI_256, MADD = "edgec_dot_16x4_vnni", "edgec_dot_8x4_vnni", "edgec_dot_8x4_madd"
SDOT, SMULL = "edgec_dot_4x4_sdot", "edgec_dot_4x4_smull"


@functools.cache
def register() -> None:
    """Make the instructions known to TVM, once in a process."""
    from tvm.s_tir import TensorIntrin
    from tvm.script import tirx as T

    @T.prim_func(s_tir=True)
    def sdot(
        A: T.Buffer((4,), "int8", offset_factor=1),
        B: T.Buffer((4, 4), "int8", offset_factor=1),
        C: T.Buffer((4,), "int32", offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:4], A[0:4], B[0:4, 0:4])
            T.writes(C[0:4])
            C[T.ramp(T.int32(0), 1, 4)] = T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id("llvm.aarch64.neon.sdot.v4i32.v16i8"),
                C.vload([0], dtype="int32x4"),
                T.reinterpret(T.broadcast(T.reinterpret(A.vload([0], "int8x4"), dtype="int32"), 4), dtype="int8x16"),
                B.vload([0, 0], dtype="int8x16"),
                dtype="int32x4",
            )

    @T.prim_func(s_tir=True)
    def smull(
        A: T.Buffer((4,), "int8", offset_factor=1),
        B: T.Buffer((4, 4), "int8", offset_factor=1),
        C: T.Buffer((4,), "int32", offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:4], A[0:4], B[0:4, 0:4])
            T.writes(C[0:4])
            # the first two of each lane's four bytes, then the other two: a shuffle of pairs, once for a whole tile
            for half in T.unroll(2):
                C[T.ramp(T.int32(0), 1, 4)] = C.vload([0], dtype="int32x4") + T.call_llvm_pure_intrin(
                    T.llvm_lookup_intrinsic_id("llvm.aarch64.neon.saddlp.v4i32.v8i16"),
                    T.call_llvm_pure_intrin(
                        T.llvm_lookup_intrinsic_id("llvm.aarch64.neon.smull.v8i16"),
                        T.reinterpret(
                            T.broadcast(T.reinterpret(A.vload([2 * half], "int8x2"), dtype="int16"), 4), dtype="int8x8"
                        ),
                        T.reinterpret(
                            T.Shuffle(
                                [T.reinterpret(B.vload([0, 0], dtype="int8x16"), dtype="int16x8")],
                                [half, 2 + half, 4 + half, 6 + half],
                            ),
                            dtype="int8x8",
                        ),
                        dtype="int16x8",
                    ),
                    dtype="int32x4",
                )

    @T.prim_func(s_tir=True)
    def madd(
        A: T.Buffer((4,), "uint8", offset_factor=1),
        B: T.Buffer((8, 4), "int8", offset_factor=1),
        C: T.Buffer((8,), "int32", offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:8], A[0:4], B[0:8, 0:4])
            T.writes(C[0:8])
            # pairs of bytes as pairs of 16 bits, in two halves like SMULL's
            for half in T.unroll(2):
                C[T.ramp(T.int32(0), 1, 8)] = C.vload([0], dtype="int32x8") + T.call_llvm_pure_intrin(
                    T.llvm_lookup_intrinsic_id("llvm.x86.avx2.pmadd.wd"),
                    T.reinterpret(
                        T.broadcast(T.reinterpret(T.cast(A.vload([2 * half], "uint8x2"), "int16x2"), dtype="int32"), 8),
                        dtype="int16x16",
                    ),
                    T.cast(
                        T.reinterpret(
                            T.Shuffle(
                                [T.reinterpret(B.vload([0, 0], dtype="int8x32"), dtype="int16x16")],
                                [half, 2 + half, 4 + half, 6 + half, 8 + half, 10 + half, 12 + half, 14 + half],
                            ),
                            dtype="int8x16",
                        ),
                        "int16x16",
                    ),
                    dtype="int32x8",
                )

    TensorIntrin.register(MADD, _wanted(8, "uint8"), madd, override=True)
    for name, lanes in ((VNNI, 16), (VNNI_256, 8)):
        TensorIntrin.register(name, _wanted(lanes, "uint8"), _vnni(lanes), override=True)
    TensorIntrin.register(SDOT, _wanted(4, "int8"), sdot, override=True)
    TensorIntrin.register(SMULL, _wanted(4, "int8"), smull, override=True)


def _wanted(lanes: int, activations: str):
    """Return what an instruction of so many lanes computes."""
    from tvm.script import tirx as T

    @T.prim_func(s_tir=True)
    def wanted(
        A: T.Buffer((4,), activations, offset_factor=1),
        B: T.Buffer((lanes, 4), "int8", offset_factor=1),
        C: T.Buffer((lanes,), "int32", offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:4], B[0:lanes, 0:4])
            T.writes(C[0:lanes])
            for i, k in T.grid(lanes, 4):
                with T.sblock("update"):
                    vi, vk = T.axis.remap("SR", [i, k])
                    C[vi] = C[vi] + T.cast(A[vk], "int32") * T.cast(B[vi, vk], "int32")

    return wanted


def _vnni(lanes: int):
    """Return VPDPBUSD on 512 or 256 bits."""
    from tvm.script import tirx as T

    sums, four, wide = f"int32x{lanes}", f"int8x{4 * lanes}", f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"

    @T.prim_func(s_tir=True)
    def vnni(
        A: T.Buffer((4,), "uint8", offset_factor=1),
        B: T.Buffer((lanes, 4), "int8", offset_factor=1),
        C: T.Buffer((lanes,), "int32", offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:4], B[0:lanes, 0:4])
            T.writes(C[0:lanes])
            C[T.ramp(T.int32(0), 1, lanes)] = T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id(wide),
                C.vload([0], dtype=sums),
                T.reinterpret(T.broadcast(T.reinterpret(A.vload([0], "uint8x4"), dtype="int32"), lanes), dtype=four),
                B.vload([0, 0], dtype=four),
                dtype=sums,
            )

    return vnni
