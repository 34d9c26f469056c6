"""The header of a .npy file, read without believing it: no pickles, and no number that the file does not hold."""

import io
from functools import lru_cache

import numpy as np

MOST_HEADER_BYTES = 12 + 10_000  # NumPy's own limit: what is longer may be slow or dangerous to parse


def read_header(data: bytes, size: int) -> tuple[np.dtype, int, int]:
    """The dtype of a 1-D .npy file, how many numbers it holds, and where in the file the first one is (in bytes).

    `data`: the first MOST_HEADER_BYTES of the file, or all of it; `size`: of the file, in bytes. `ValueError` says what
    is wrong with it.
    """
    width = 4 if data[6:7] == b"\2" else 2  # of the field that says how long the header is
    offset = 8 + width + int.from_bytes(data[8 : 8 + width], "little")
    shape, is_fortran, dtype = _parsed(data[:offset])
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are never unpickled: store numbers")
    if len(shape) != 1 or is_fortran:  # NumPy gives every 1-D array in C order
        raise ValueError(f"its shape is {shape}{', Fortran order' if is_fortran else ''}, expected one dimension")
    if shape[0] < 0 or offset + shape[0] * dtype.itemsize != size:
        raise ValueError(f"its header claims {shape[0]:,} numbers of {dtype}, not {size - offset:,} bytes")
    return dtype, int(shape[0]), offset


@lru_cache(maxsize=64)  # the headers of a data set are a few, again and again
def _parsed(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    stream = io.BytesIO(header)
    try:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            return np.lib.format.read_array_header_1_0(stream)
        if version == (2, 0):
            return np.lib.format.read_array_header_2_0(stream)
        raise ValueError(f"version {version}")
    except (ValueError, TypeError, LookupError, MemoryError, RecursionError) as error:
        raise ValueError(f"not a .npy file ({str(error)[:120]})") from None
