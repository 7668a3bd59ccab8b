"""How fast the emulated core and the cost of operators are on this machine: ``make bench``. Figures, no test: machines are noisy."""

import random
import time
from collections.abc import Callable

import numpy as np

from course_lib.chip.core import empty, launch
from course_lib.chip.core.kernels.matmul import k_split, matmul
from course_lib.chip.cost import Matmul, Work, cost
from course_lib.chip.spec import load_chip

REPEATS = 3


def best(call: Callable[[], object]) -> float:
    """Seconds of the fastest of a few runs."""
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def timed(n: int, chip: str = "ascend-910b2", cores: int = 1) -> Callable[[], object]:
    """An n × n × n product in float16, without values."""
    kernel = k_split if cores == 1 else matmul
    return lambda: launch(kernel, chip, empty(n, n), empty(n, n), empty(n, n, dtype="float32"), blocks=cores)


def computed(n: int) -> Callable[[], object]:
    """The same with values."""
    a, b = np.random.default_rng(0).standard_normal((2, n, n)).astype(np.float16)
    return lambda: launch(k_split, "ascend-910b2", a, b, np.zeros((n, n), np.float32))


def priced(new: bool) -> float:
    """Seconds of `cost` for a product, mean over shapes that it sees for the first time, or again."""
    chip, rng = load_chip("ascend-910b2"), random.Random(0)
    works = [Work((Matmul(1, *(rng.randrange(1, 9999) for _ in range(3)), "bfloat16"),)) for _ in range(500)]
    cost(chip, works[0])
    for known in (False, True):
        began = time.perf_counter()
        for work in works[1:]:
            cost(chip, work)
        took = (time.perf_counter() - began) / len(works[1:])
        if known != new:
            return took
    raise AssertionError


def main() -> None:
    print(f"matmul 4096³, one core, timed only        {best(timed(4096)):6.2f} s   (to reach: 2)")
    print(f"matmul 1024³, one core, with numbers      {best(computed(1024)):6.2f} s   (to reach: 2)")
    print(f"matmul 6144³, 24 cores, timed only        {best(timed(6144, 'ascend-910c-die', 24)):6.2f} s")
    print(f"cost of a new shape                       {1e3 * priced(new=True):6.2f} ms  (to reach: 1)")
    print(f"cost of a known shape                     {1e6 * priced(new=False):6.2f} µs  (to reach: 2)")


if __name__ == "__main__":
    main()
