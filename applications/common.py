"""What several applications share: files of numpy arrays, checked."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from data import check


def one_file(folder, pattern):
    """The first file of a folder whose name fits, as in "*.npz"; FileNotFoundError if none does."""
    paths = sorted(Path(folder).glob(pattern))
    if not paths:
        raise FileNotFoundError(f"{folder}: no file {pattern}")
    return paths[0]


def read_npz(path, text=(), **axes):
    """The arrays of an npz, or the one of an npy: {name: array}.

    read_npz(path, lat="n", vectors="nk"): these two must be there, with an axis for each letter, as
    long wherever the letter stands; they hold finite numbers or NaN, those named in `text` strings
    or dates. ValueError names file and array, what was found and what was expected.
    """
    try:
        loaded = np.load(path)                              # no pickles: runs no code
        arrays = {Path(path).stem: loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: {error}") from None
    lengths = {}                                            # letter -> length of its axes
    for name, letters in axes.items():
        check(name in arrays, f"{path}: no array {name} among {', '.join(arrays)}")
        values = arrays[name]
        found = f"{path}: {name} has the shape {values.shape}"
        check(values.ndim == len(letters), f"{found}, expected the axes '{letters}'")
        check(values.size > 0, f"{found}: it is empty")
        for letter, length in zip(letters, values.shape):
            expected = lengths.setdefault(letter, length)
            check(length == expected, f"{found}, expected '{letters}' with {letter} = {expected}")
        kinds, wanted = ("UM", "text") if name in text else ("biuf", "numbers")
        check(values.dtype.kind in kinds, f"{path}: {name} holds {values.dtype}, not {wanted}")
        check(values.dtype.kind != "f" or not np.isinf(values).any(),
              f"{path}: {name} holds an infinite value")
    return arrays
