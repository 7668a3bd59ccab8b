"""Buffers: bytes lie as documented, sizes and addresses are checked, slices are views."""

import numpy as np
import pytest

from course_lib.chip.core import BufferOverflow, IllegalPath, Misaligned, WrongOperand, empty, launch, tensor

SIZES = {"float16": 2, "float32": 4, "int8": 1}


def kernel_of(action: object) -> object:
    def kernel(core: object) -> None:
        action(core)

    return kernel


def refused(error: type, text: str, action: object, unit: str = "AIC") -> None:
    with pytest.raises(error, match=text):
        launch(kernel_of(action), "ascend-910b2", unit=unit, numerics=True)


def matrix(rows: int, cols: int, dtype: str) -> np.ndarray:
    return (np.arange(rows * cols).reshape(rows, cols) % 100).astype(dtype)


@pytest.mark.parametrize("dtype", SIZES)
def test_fractals_lie_as_documented(dtype: str) -> None:
    rows, cols, size = 64, 96, SIZES[dtype]
    c0 = 32 // size
    x = matrix(rows, cols, dtype)

    def kernel(core: object, x: object) -> None:
        l1 = core.LocalTensor("L1", x.shape, dtype)
        core.DataCopy(l1, x)
        core.SetFlag("MTE2_MTE1")
        core.WaitFlag("MTE2_MTE1")
        core.LoadData(core.LocalTensor("L0A", x.shape, dtype), l1)
        core.LoadData(core.LocalTensor("L0B", x.shape, dtype), l1)

    left = launch(kernel, "ascend-910b2", x).buffers["AIC"]
    memory = {name: left[name].memory[: x.nbytes].view(dtype) for name in ("L1", "L0A", "L0B")}
    for r in range(rows):
        for c in range(cols):
            zn = (c // c0) * rows * c0 + r * c0 + c % c0
            zz = (r // 16) * 16 * cols + (c // c0) * 16 * c0 + r % 16 * c0 + c % c0
            nz = (r // c0) * c0 * cols + (c // 16) * 16 * c0 + c % 16 * c0 + r % c0
            assert (memory["L1"][zn], memory["L0A"][zz], memory["L0B"][nz]) == (x[r, c],) * 3


def test_results_lie_in_fractals_of_16_columns() -> None:
    x = matrix(32, 32, "float16")

    def kernel(core: object, x: object) -> None:
        l1 = core.LocalTensor("L1", x.shape, x.dtype)
        a, b = core.LocalTensor("L0A", x.shape, x.dtype), core.LocalTensor("L0B", x.shape, x.dtype)
        core.DataCopy(l1, x)
        core.PipeBarrier("ALL")
        core.LoadData(a, l1)
        core.LoadData(b, l1)
        core.PipeBarrier("ALL")
        core.Mmad(core.LocalTensor("L0C", x.shape, "float32"), a, b)

    memory = launch(kernel, "ascend-910b2", x).buffers["AIC"]["L0C"].memory[: 32 * 32 * 4].view(np.float32)
    product = x.astype(np.float32) @ x.astype(np.float32)
    for r in range(32):
        for c in range(32):
            assert memory[(c // 16) * 32 * 16 + r * 16 + c % 16] == product[r, c]


def test_a_transposed_load() -> None:
    x = matrix(32, 48, "float16")

    def kernel(core: object, x: object) -> None:
        l1 = core.LocalTensor("L1", x.shape, x.dtype)
        core.DataCopy(l1, x)
        core.PipeBarrier("ALL")
        b = core.LocalTensor("L0B", (48, 32), x.dtype)
        core.LoadData(b, l1, transpose=True)
        kept.append(b)

    kept: list = []
    launch(kernel, "ascend-910b2", x)
    np.testing.assert_array_equal(kept[0].numpy(), x.T)


def test_what_a_tile_lacks_becomes_zero() -> None:
    x = matrix(5, 7, "float16")

    def kernel(core: object, x: object) -> None:
        l1 = core.LocalTensor("L1", (16, 16), x.dtype)
        core.DataCopy(l1, x)
        kept.append(l1)

    kept: list = []
    launch(kernel, "ascend-910b2", x)
    want = np.zeros((16, 16), np.float32)
    want[:5, :7] = x
    np.testing.assert_array_equal(kept[0].numpy(), want)


def test_shapes_grow_to_whole_fractals() -> None:
    shapes = {}

    def kernel(core: object) -> None:
        for name in ("L1", "L0A", "L0B"):
            shapes[name] = core.LocalTensor(name, (17, 40), "int8").shape

    launch(kernel, "ascend-910b2")
    assert shapes == {"L1": (32, 64), "L0A": (32, 64), "L0B": (32, 48)}


def test_a_buffer_overflows() -> None:
    refused(
        BufferOverflow,
        "L0A holds 65536 B: 32768 are taken, and float16 128 × 256 needs 65536, 32768 too many; use a smaller tile",
        lambda core: [core.LocalTensor("L0A", (128, cols), "float16") for cols in (128, 256)],
    )
    refused(BufferOverflow, "UB holds 196608 B", lambda core: core.LocalTensor("UB", 1 << 20, "int8"), "AIV")


def test_a_buffer_is_filled_to_the_last_byte() -> None:
    launch(kernel_of(lambda core: core.LocalTensor("UB", 196608, "int8")), "ascend-910b2", unit="AIV")
    launch(kernel_of(lambda core: core.LocalTensor("L0C", (128, 256), "float32")), "ascend-910b2")
    launch(kernel_of(lambda core: core.LocalTensor("L0C", (256, 256), "float32")), "ascend-950dt")


def test_misaligned() -> None:
    refused(Misaligned, "UB: 15 elements of float16 are no multiple of 32 B", lambda core: core.LocalTensor("UB", 15, "float16"), "AIV")
    refused(Misaligned, "address 16 is no multiple of 32 B", lambda core: core.LocalTensor("UB", 16, "float16", address=16), "AIV")
    refused(Misaligned, "address -32", lambda core: core.LocalTensor("UB", 16, "float16", address=-32), "AIV")
    refused(Misaligned, "address 32 is no multiple of 512 B", lambda core: core.LocalTensor("L1", (16, 16), "float16", address=32))
    refused(Misaligned, "L1: 8:24 is not made of whole fractals of 16", lambda core: core.LocalTensor("L1", (32, 32), "float16")[8:24])
    refused(Misaligned, "bytes 8:40 of a row", lambda core: core.LocalTensor("UB", 64, "float16")[4:20], "AIV")


def test_shapes_that_cannot_be() -> None:
    refused(WrongOperand, "L1 holds matrices in fractals", lambda core: core.LocalTensor("L1", 64, "float16"))
    refused(WrongOperand, "not empty", lambda core: core.LocalTensor("UB", 0, "float16"), "AIV")
    refused(WrongOperand, "a vector or a matrix", lambda core: core.LocalTensor("UB", (2, 2, 16), "float16"), "AIV")
    refused(WrongOperand, "no dtype named 'half'", lambda core: core.LocalTensor("UB", 16, "half"), "AIV")
    refused(WrongOperand, "L0A is read whole", lambda core: core.LocalTensor("L0A", (32, 32), "float16")[:16])
    refused(WrongOperand, "slices are start:stop", lambda core: core.LocalTensor("UB", 64, "float16")[::2], "AIV")
    refused(WrongOperand, "the slice 64:80 lies outside", lambda core: core.LocalTensor("UB", 64, "float16")[64:80], "AIV")
    refused(IllegalPath, "an AIV of Ascend 910B2 has no L0A; its buffers are UB", lambda core: core.LocalTensor("L0A", (16, 16), "float16"), "AIV")
    refused(IllegalPath, "has no L1; its buffers are UB; an AIC has it", lambda core: core.LocalTensor("L1", (16, 16), "float16"), "AIV")
    for shape in ((), (0,), (4, 0), (2, 2, 2)):
        with pytest.raises(WrongOperand, match="not empty"):
            empty(*shape)
    with pytest.raises(WrongOperand, match="no values of dtype 'float64'"):
        tensor(np.zeros(4))


def test_slices_are_views_of_the_same_bytes(random: np.random.Generator) -> None:
    x = random.standard_normal((8, 64)).astype(np.float32)
    out = np.zeros_like(x)

    def kernel(core: object, x: object, out: object) -> None:
        table = core.LocalTensor("UB", (8, 64), "float32")
        core.DataCopy(table, x)
        core.PipeBarrier("ALL")
        core.Muls(table[2:5, 16:32], table[2:5, 16:32], 2.0)
        core.Adds(table[0:1][:, 8:24], table[0:1][:, 8:24], 1.0)
        core.PipeBarrier("ALL")
        core.DataCopy(out, table)

    launch(kernel, "ascend-910b2", x, out, unit="AIV")
    x[2:5, 16:32] *= 2
    x[0, 8:24] += 1
    np.testing.assert_array_equal(out, x)


def test_as_shape_lays_the_same_place_out_anew() -> None:
    def kernel(core: object) -> None:
        a = core.LocalTensor("L0A", (128, 64), "float16")
        small = a.as_shape(32, 48)
        assert (small.shape, small.start, a.as_shape(32, 48) is small, a.as_shape(128, 64) is a) == ((32, 48), a.start, True, True)
        with pytest.raises(BufferOverflow, match="has 16384 B"):
            a.as_shape(256, 64)
        with pytest.raises(WrongOperand, match="is a slice"):
            core.LocalTensor("L1", (32, 32), "float16")[:16].as_shape(16, 16)

    launch(kernel, "ascend-910b2")


def test_values_of_a_program_that_was_only_timed() -> None:
    with pytest.raises(WrongOperand, match="only timed"):
        empty(4).numpy()
