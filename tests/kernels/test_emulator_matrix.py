"""The emulator's matrix instructions: fragments, swizzles and the order of asynchronous products.

Matrices of small integers, whose products and sums are exact, laid out as the PTX manual draws them.
"""

import numpy as np
import pytest
from emulator.errors import EmulationError
from emulator.memory import RaceReport
from emulator_probes import execute

LANE = np.arange(32)


def bfloat16(x: np.ndarray) -> np.ndarray:
    """Bits of small integers."""
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def half_bits(x: np.ndarray, kind: str) -> np.ndarray:
    return bfloat16(x) if kind == "bf16" else x.astype(np.float16).view(np.uint16)


def load_registers(first: int, count: int, address: str) -> str:
    """%r{first} … of 32 tensors of 4 bytes each after the other: entry [register, thread]."""
    return "\n".join(f"ld.global.b32 %r{first + i}, [{address} + {128 * i}];" for i in range(count))


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_and_stmatrix(transposed):
    """Four matrices with entry 64i + 8r + c: lane 4g + t holds columns 2t, 2t + 1 of row g, or the transposed."""
    way = ".trans" if transposed else ""
    body = f"""
        shl.b32 %r1, %r0, 4;
        ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%rd9];
        st.shared.v4.b32 [%r1], {{%r2, %r3, %r4, %r5}};
        ldmatrix.sync.aligned.m8n8.x4{way}.shared.b16 {{%r6, %r7, %r8, %r9}}, [%r1];
        st.global.b32 [%rd1], %r6;
        st.global.b32 [%rd1 + 128], %r7;
        st.global.b32 [%rd1 + 256], %r8;
        st.global.b32 [%rd1 + 384], %r9;
        stmatrix.sync.aligned.m8n8.x4{way}.shared.b16 [%r1 + 512], {{%r6, %r7, %r8, %r9}};
        ld.shared.v4.b32 {{%r2, %r3, %r4, %r5}}, [%r1 + 512];
        st.global.v4.b32 [%rd9], {{%r5, %r4, %r3, %r2}};
    """
    body = "ld.param.b64 %rd8, [probe_param_0];\nmad.wide.u32 %rd9, %r0, 16, %rd8;\n" + body
    entries = np.arange(256, dtype=np.uint16)
    (back, held), _ = execute(body, entries.view(np.uint32), np.zeros(128, np.uint32), shared=1024)
    group, place = LANE // 4, LANE % 4
    for i in range(4):
        for low in range(2):
            row, column = (2 * place + low, group) if transposed else (group, 2 * place + low)
            got = held.view(np.uint16).reshape(4, 32, 2)[i, :, low]
            assert (got == 64 * i + 8 * row + column).all()
    assert (back.reshape(32, 4)[:, ::-1] == entries.view(np.uint32).reshape(32, 4)).all()


def fragments(kind: str, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Registers [n, 32] of both factors, place by place as the PTX manual draws them."""
    group, place = LANE // 4, LANE % 4
    if kind == "tf32":
        first = [a[group, place], a[group + 8, place], a[group, place + 4], a[group + 8, place + 4]]
        second = [b[place, group], b[place + 4, group]]
        return np.stack(first).astype(np.float32).view(np.uint32), np.stack(second).astype(np.float32).view(np.uint32)
    pairs_a = [(group, 0), (group + 8, 0), (group, 8), (group + 8, 8)]
    first = [[a[row, 2 * place + at], a[row, 2 * place + at + 1]] for row, at in pairs_a]
    second = [[b[2 * place + at, group], b[2 * place + at + 1, group]] for at in (0, 8)]
    packed = [half_bits(np.stack([np.stack(pair, 1) for pair in x]), kind) for x in (first, second)]
    return tuple(np.ascontiguousarray(x).view(np.uint32)[..., 0] for x in packed)


def multiply_by_warp(kind: str, a: np.ndarray, b: np.ndarray, c: np.ndarray, swap: bool = False) -> np.ndarray:
    """a @ b + c by mma.sync; `swap`: with two registers of the first factor in each other's place."""
    first, second = fragments(kind, a, b)
    group, place = LANE // 4, LANE % 4
    third = np.stack([c[group + 8 * (i // 2), 2 * place + i % 2] for i in range(4)]).astype(np.float32)
    tensors = [np.concatenate([first, second, third.view(np.uint32)]).reshape(-1), np.zeros(128, np.uint32)]
    names = ["%r1", "%r3", "%r2", "%r4"] if swap else ["%r1", "%r2", "%r3", "%r4"]
    form = "m16n8k8.row.col.f32.tf32.tf32" if kind == "tf32" else f"m16n8k16.row.col.f32.{kind}.{kind}"
    body = load_registers(1, 10, "%rd0") + f"""
        mma.sync.aligned.{form}.f32 {{%r20, %r21, %r22, %r23}}, {{{", ".join(names)}}}, {{%r5, %r6}},
            {{%r7, %r8, %r9, %r10}};
    """  # fmt: skip
    body += "\n".join(f"st.global.b32 [%rd1 + {128 * i}], %r{20 + i};" for i in range(4))
    (_, out), _ = execute(body, *tensors)
    result = np.zeros((16, 8), np.float32)
    for i, values in enumerate(out.view(np.float32).reshape(4, 32)):
        result[group + 8 * (i // 2), 2 * place + i % 2] = values
    return result


def small_integers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(np.float32)


@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
def test_mma(kind):
    """Products and sums of small integers are exact."""
    depth = 8 if kind == "tf32" else 16
    a, b, c = small_integers(16, depth), small_integers(depth, 8, seed=1), small_integers(16, 8, seed=2)
    assert (multiply_by_warp(kind, a, b, c) == a @ b + c).all()
    assert (multiply_by_warp(kind, a, b, c, swap=True) != a @ b + c).any()


def test_a_tensor_core_ignores_the_low_bits_of_tf32():
    a, b = np.zeros((16, 8), np.float32), np.eye(8, dtype=np.float32)
    a[0, 0] = 1 + 2**-10 + 2**-11
    assert multiply_by_warp("tf32", a, b, np.zeros((16, 8)))[0, 0] == 1 + 2**-10


PITCH_MODES = {128: 1, 64: 2, 32: 3}


def swizzled(matrix: np.ndarray, pitch: int) -> np.ndarray:
    """Bytes of a matrix [rows, K] whose rows are cut into pieces of `pitch` bytes, each piece a block of all rows; the
    16-byte chunks of a row are exchanged by the number of the row: by each row, every second or every fourth."""
    rows, per_chunk = len(matrix), 16 // matrix.itemsize
    pieces = matrix.reshape(rows, -1, pitch // 16, per_chunk).transpose(1, 0, 2, 3)
    out = np.zeros_like(pieces)
    for row in range(rows):
        for chunk in range(pitch // 16):
            out[:, row, chunk ^ (row // (128 // pitch) % (pitch // 16))] = pieces[:, row, chunk]
    return out.reshape(-1)


def descriptor(start: int, leading: int, stride: int, pitch: int) -> int:
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | PITCH_MODES[pitch] << 62


# Of each: shared memory → registers; 128 threads.
WGMMA = """
    ld.param.b64 %rd8, [probe_param_0];
    {copies}
    {fence}
    bar.sync 0;
    {zeros}
    {factor}
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n16{form} {{%r100, %r101, %r102, %r103, %r104, %r105, %r106, %r107}},
        {first}, {second}, {keep}, 1, 1{transposed};
    wgmma.commit_group.sync.aligned;
    {early}
    wgmma.wait_group.sync.aligned 0;
"""


def multiply_by_group(
    a_bytes: np.ndarray,
    b_bytes: np.ndarray,
    a_descriptor: int,
    b_descriptor: int,
    form: str,
    transposed: str = "",
    fence: str = "fence.proxy.async;",
    early: str = "",
    keep: str = "0",
    registers: bool = False,
) -> tuple[np.ndarray, RaceReport]:
    """[64, 16] by wgmma, both factors in shared memory, the second one after the first."""  # fmt: skip
    content = np.concatenate([a_bytes.view(np.uint8), b_bytes.view(np.uint8)]).view(np.uint32)
    threads = 128
    content = np.pad(content, (0, -len(content) % threads))
    copies = "\n".join(
        f"ld.global.b32 %r1, [%rd0 + {at}];\nshl.b32 %r2, %r0, 2;\nst.shared.b32 [%r2 + {at}], %r1;"
        for at in range(0, 4 * len(content), 4 * threads)
    )
    zeros = "\n".join(f"mov.b32 %r{100 + i}, 0f3F800000;" for i in range(8))
    factor, first = "", str(a_descriptor)
    if registers:  # row 16w + g (+ 8) and columns 2t, 2t + 1 (+ 8) of an unswizzled copy behind both
        first = "{%r10, %r11, %r12, %r13}"
        factor = "\n".join(f"ld.global.b32 %r{10 + i}, [%rd2 + {512 * i}];" for i in range(4))
    body = WGMMA.format(
        copies=copies, fence=fence, zeros=zeros, factor=factor, form=form, first=first, second=b_descriptor, keep=keep,
        transposed=transposed, early=early,
    )  # fmt: skip
    body += "\n".join(f"st.global.b32 [%rd1 + {512 * i}], %r{100 + i};" for i in range(8))
    tensors = [content, np.zeros(8 * threads, np.uint32)]
    if registers:
        a = a_bytes.reshape(64, 16)
        rows, place = 16 * (np.arange(threads) // 32) + np.arange(threads) % 32 // 4, np.arange(threads) % 4
        parts = [(rows, 0), (rows + 8, 0), (rows, 8), (rows + 8, 8)]
        packed = np.stack([np.stack([a[r, 2 * place + at], a[r, 2 * place + at + 1]], 1) for r, at in parts])
        tensors.append(np.ascontiguousarray(packed).view(np.uint32).reshape(-1))
    after, report = execute(body, *tensors, threads=threads, shared=4 * len(content) + 4096)
    out = after[1].view(np.float32).reshape(8, threads)
    result = np.zeros((64, 16), np.float32)
    group, place = np.arange(threads) % 32 // 4, np.arange(threads) % 4
    for i in range(8):
        result[16 * (np.arange(threads) // 32) + group + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * place + i % 2] = out[i]
    return result, report


@pytest.mark.parametrize("pitch", [128, 64, 32])
@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
def test_wgmma_with_both_factors_in_shared_memory(kind, pitch):
    """Rows as wide as the swizzle; their depth is contiguous. The second product's columns: a start in mid-row."""
    size = 4 if kind == "tf32" else 2
    depth = pitch // size
    a, b = small_integers(64, depth), small_integers(16, depth, seed=1)
    form = ".k8.f32.tf32.tf32" if kind == "tf32" else f".k16.f32.{kind}.{kind}"
    bits = [x.view(np.uint32) if kind == "tf32" else half_bits(x, kind) for x in (a, b)]
    data = [swizzled(x, pitch) for x in bits]
    flags = "" if kind == "tf32" else ", 0, 0"
    for start in range(0, depth, 32 // size):
        at = [descriptor(place + size * start, 16, 8 * pitch, pitch) for place in (0, 64 * pitch)]
        got, report = multiply_by_group(*data, *at, form[1:], flags)
        columns = slice(start, start + 32 // size)
        assert (got == a[:, columns] @ b[:, columns].T).all()
        assert not report.races
        other = {128: 64, 64: 32, 32: 64}[pitch]
        wrong = [descriptor(place + size * start, 16, 8 * pitch, other) for place in (0, 64 * pitch)]
        assert (multiply_by_group(*data, *wrong, form[1:], flags)[0] != got).any()


def test_wgmma_with_transposed_factors():
    """[16, 64] and [16, 16]: the rows' axis is contiguous."""
    a, b = small_integers(16, 64), small_integers(16, 16, seed=1)
    data = [swizzled(bfloat16(a), 128), swizzled(bfloat16(b), 32)]
    at = [descriptor(0, 2048, 1024, 128), descriptor(2048, 512, 256, 32)]
    got, _ = multiply_by_group(*data, *at, "k16.f32.bf16.bf16", ", 1, 1")
    assert (got == a.T @ b).all()


def test_wgmma_with_a_factor_in_registers_adds_to_the_accumulator():
    a, b = small_integers(64, 16), small_integers(16, 16, seed=1)
    data = [bfloat16(a).reshape(-1), swizzled(bfloat16(b), 32)]
    at = descriptor(2048, 16, 256, 32)
    got, _ = multiply_by_group(*data, 0, at, "k16.f32.bf16.bf16", ", 0", keep="1", registers=True)
    assert (got == a @ b.T + 1).all()


def simple_product(**changes: str) -> tuple[np.ndarray, RaceReport]:
    data = [swizzled(bfloat16(small_integers(rows, 16)), 32) for rows in (64, 16)]
    at = [descriptor(place, 16, 256, 32) for place in (0, 2048)]
    return multiply_by_group(*data, *at, "k16.f32.bf16.bf16", ", 0, 0", **changes)


def test_a_result_is_not_read_before_it_is_waited_for():
    with pytest.raises(EmulationError, match="%r100 is read before the wgmma.wait_group"):
        simple_product(early="add.f32 %r3, %r100, %r100;")


def test_a_factor_is_not_written_before_it_is_waited_for():
    _, report = simple_product(early="st.shared.b32 [%r2], 0;")
    assert "write of what a product still reads" in {what for _, _, what, _ in report.races}


def test_a_missing_proxy_fence_is_reported():
    assert not simple_product()[1].races
    _, report = simple_product(fence="")
    assert {what for _, _, what, _ in report.races} == {"product reads what no fence.proxy.async follows"}
