"""What several applications share: files of numpy arrays, a solver of linear maps, figures."""

from pathlib import Path

import numpy as np
import torch

from data import check, write_atomically

PENALTIES = 10.0 ** np.arange(-5, 1)        # to try in converge(), the best at validation is kept
LOOK = {"axes.titlesize": "medium", "axes.axisbelow": True, "date.converter": "concise",
        "grid.color": "0.85", "legend.fontsize": 9, "lines.linewidth": 1.2, "savefig.dpi": 90}


def one_file(folder, pattern):
    """The first file of a folder whose name fits, as in "*.npz"; FileNotFoundError if none does."""
    paths = sorted(Path(folder).glob(pattern))
    check(paths, f"{folder}: no file {pattern}", FileNotFoundError)
    return paths[0]


def read_npz(path, text=(), **axes):
    """The arrays of an npz, or the one of an npy: {name: array}; ValueError names file and array.

    read_npz(path, lat="n", vectors="nk"): these two must be there, with an axis for each letter, as
    long wherever the letter stands, and hold finite numbers or NaN; those in `text` texts or dates.
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
        check(name in text or not np.isinf(values).any(), f"{path}: {name} holds an infinite value")
    return arrays


def converge(x, loss, outputs=1, penalty=0.0):
    """The linear map of x (n, C) to (n, outputs) whose loss, plus the penalty on squared weights,
    does not fall any more (L-BFGS): weights (C, outputs), constants (outputs,)."""
    x = x.double()
    w = torch.zeros(x.shape[1], outputs, dtype=x.dtype, requires_grad=True)
    b = torch.zeros(outputs, dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([w, b], max_iter=2000, max_eval=4000, tolerance_grad=1e-8,
                                  tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        value = loss(x @ w + b) + penalty * w.square().sum()
        value.backward()
        return value
    optimizer.step(objective)
    return w.detach().float(), b.detach().float()


def new_figure(width, height):
    """An empty figure of so many inches; without matplotlib one line and the end."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("figures need matplotlib: pip install matplotlib") from None
    matplotlib.rcParams.update(LOOK)
    return Figure((width, height), layout="constrained")


def save_figure(figure, path):
    """Write a png and print where."""
    write_atomically(path, lambda file: figure.savefig(file, format="png"))
    print(path)
