"""What several applications share: their command line, values per site, files of numpy arrays."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch.nn as nn

import finetune
import train
from data import check
from model import Dropout


def main(task, description, options_class=finetune.Options, argv=None):
    """The command line of an application: `train …` is train.py's, all else finetune.py's.

    train.py by itself knows no application; called from here, it knows the readers of this one.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:
        train.main(argv[1:])
    else:
        finetune.main(argv, options_class, description, defaults={"task": task})


class MLPHead(nn.Module):
    """Two layers, for tasks with one value per site: (B, L, width) -> (B, L)."""

    def __init__(self, width, dropout, shapes):
        super().__init__()
        self.dropout, self.output = Dropout(dropout), nn.Linear(width, 1)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())

    def forward(self, x, extra):
        x = self.mlp(self.dropout(x))                                           # (B, L, width)
        return self.output(self.dropout(x))[..., 0]                             # (B, L)


# the attributes without an encoder; glm is a linear or, by the task's loss, logistic regression
finetune.VARIANTS["mlp"] = finetune.Variant("", inputs=("static",))
finetune.VARIANTS["glm"] = finetune.Variant("", inputs=("static",), head=finetune.LinearHead)


def attribute_as_target(name, hidden, sites, options):
    """`sites` with an attribute as their target, (N,), and those in `hidden` missing as inputs.

    options: None where a trained model predicts, at sites that need not have the attribute.
    """
    names, target = sites.static_names, np.full(len(sites.ids), np.nan, np.float32)
    check(name in names or not options,
          f"the sites have no attribute {name}, only {', '.join(names)}")
    if name in names:
        target = sites.static[:, names.index(name)]                             # (N,)
    static = np.where(np.isin(names, hidden), np.float32(np.nan), sites.static)     # (N, S)
    return replace(sites, target=target, static=static)


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
    except Exception as error:                              # a damaged file may raise anything
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
