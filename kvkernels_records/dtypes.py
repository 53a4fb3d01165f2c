"""The dtypes of KV caches in numpy, which has no bfloat16 and no 8-bit floats.

Those are records of one field, whose name is the dtype's and which holds the bits. Such an array can be sliced, joined
and saved like any other, knows what it is, and refuses arithmetic, which its bits would get wrong.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

BFLOAT16 = np.dtype([("bfloat16", "<u2")])
FLOAT8_E4M3 = np.dtype([("float8_e4m3fn", "u1")])
FLOAT8_E5M2 = np.dtype([("float8_e5m2", "u1")])

#: Name, as torch has it, to dtype: all that captures hold.
DTYPES: dict[str, np.dtype[Any]] = {
    "bfloat16": BFLOAT16,
    "float8_e4m3fn": FLOAT8_E4M3,
    "float8_e5m2": FLOAT8_E5M2,
    **{
        name: np.dtype(name)
        for name in (
            "float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8",
            "bool",
        )
    },
}  # fmt: skip


def dtype_name(dtype: np.dtype[Any]) -> str:
    """A dtype's name in ``DTYPES``.

    Raises
    ------
    TypeError
        It is none of them.

    Examples
    --------
    >>> import numpy as np
    >>> dtype_name(np.dtype("<f2")), dtype_name(BFLOAT16)
    ('float16', 'bfloat16')
    """
    name = dtype.names[0] if dtype.names else dtype.name
    if DTYPES.get(name) != dtype.newbyteorder("="):
        raise TypeError(f"capture: dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    return name


def bits_of(array: Array) -> Array:
    """An array without records: the bits of those that are one."""
    return array[array.dtype.names[0]] if array.dtype.names else array


def as_float64(array: Array) -> npt.NDArray[np.float64]:
    """The values of an array of one of ``DTYPES``, exactly but for 64-bit integers.

    Examples
    --------
    >>> import numpy as np
    >>> as_float64(np.array([0x3FC0, 0x7F80], "<u2").view(BFLOAT16)).tolist()
    [1.5, inf]
    """
    name = dtype_name(array.dtype)
    if name == "bfloat16":
        wide = (bits_of(array).astype(np.uint32) << np.uint32(16)).view(np.float32)
        with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
            return np.asarray(wide.astype(np.float64))
    if name in _FLOAT8:
        values: npt.NDArray[np.float64] = _FLOAT8[name][bits_of(array)]
        return values
    with np.errstate(invalid="ignore"):
        found: npt.NDArray[np.float64] = array.astype(np.float64)
        return found


def _float8(exponent_bits: int, mantissa_bits: int, *, has_infinity: bool) -> npt.NDArray[np.float64]:
    """The value of each of the 256 bit patterns."""
    bias = (1 << (exponent_bits - 1)) - 1
    values = np.empty(256)
    for bits in range(256):
        mantissa = bits & ((1 << mantissa_bits) - 1)
        exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1)
        fraction = mantissa / (1 << mantissa_bits)
        value = fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias)
        if exponent == (1 << exponent_bits) - 1:
            if has_infinity:
                value = np.nan if mantissa else np.inf
            elif mantissa == (1 << mantissa_bits) - 1:
                value = np.nan
        values[bits] = -value if bits & 0x80 else value
    return values


_FLOAT8 = {
    "float8_e4m3fn": _float8(4, 3, has_infinity=False),
    "float8_e5m2": _float8(5, 2, has_infinity=True),
}
