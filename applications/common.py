"""What several applications share: their command line, values per site, files of numpy arrays."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

import finetune
import train
from data import check, command, groups
from eval import SCORINGS
from model import Dropout


def main(task, description, options_class=finetune.Options, argv=None, without=""):
    """The command line of an application: `train …` is train.py's, all else finetune.py's.

    train.py by itself knows no application; called from here, it knows the readers of this one,
    and leaves out the groups `without`.
    """
    if argv is None:                            # bad input then ends in one line
        return command(partial(main, task, description, options_class, sys.argv[1:], without))
    if argv[:1] == ["train"]:
        train.main([*["--without", without][:2 * bool(without)], *argv[1:]])
    else:
        finetune.main(argv, options_class, description, defaults={"task": task})


class MLPHead(nn.Module):
    """Two layers, for tasks with one value per site: (L, B, width) -> (L, B)."""

    def __init__(self, width, dropout, shapes):
        super().__init__()
        self.dropout, self.output = Dropout(dropout), nn.Linear(width, 1)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())

    def forward(self, x, extra):
        x = self.mlp(self.dropout(x))                                           # (L, B, width)
        return self.output(self.dropout(x))[..., 0]                             # (L, B)


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


PENALTIES = 10.0 ** np.arange(-5, 1)


@torch.no_grad()
def fit_linear(model, o, samples, validation, learned, rng):
    """In place of finetune.fit: one linear map of the attributes, solved; the rest hands it on.

    Of the penalties the one with the best first score at the validation sites.
    """
    check(samples.length == 1, "glm is for tasks with a value per site")
    s, task, score = model.settings, model.task, SCORINGS[model.task.scoring]
    x = finetune.fill_and_flag(samples.head_windows.static[samples.site])       # (n, 2 S)
    y = (learned[samples.site] - s["centre"]) / s["spread"]                     # (n, 1)
    y, obs = torch.from_numpy(y).double(), validation.sites.target[validation.chosen]
    best, kept = np.nan, None
    for penalty in PENALTIES:
        with torch.enable_grad():
            w, b = converge(x, partial(task.loss, target=y), penalty=penalty)
        for weights in model.parameters():
            weights.zero_()
        model.conv.weight[0, :, 1], model.conv.bias[0] = w[:, 0].to(samples.device), b[0]
        model.mix.weight[0, 0] = model.head.output.weight[0, 0] = 1
        value = next(iter(score(obs, validation.predict()).values()))
        if kept is None or np.isnan(best) or value > best:
            best, kept = value, {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(kept)
    return best


# the attributes without an encoder; glm is ridge or, by the task's loss, logistic regression
finetune.VARIANTS["mlp"] = finetune.Variant("", inputs=("static",), needs=MLPHead)
finetune.VARIANTS["glm"] = finetune.Variant(
    "", inputs=("static",), head=finetune.LinearHead, fit=fit_linear)


def attribute_as_target(name, sites, options):
    """`sites` with an attribute as their target, (N,), and its whole group missing as inputs.

    options: None where a trained model predicts, at sites that need not have the attribute.
    """
    names, target = sites.static_names, np.full(len(sites.ids), np.nan, np.float32)
    hidden = np.array(groups(names)) == groups((name,))[0]                      # (S,)
    check(name in names or not options,
          f"the sites have no attribute {name}, only {', '.join(names)}")
    if name in names:
        target = sites.static[:, names.index(name)]                             # (N,)
    static = np.where(hidden, np.float32(np.nan), sites.static)                 # (N, S)
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
