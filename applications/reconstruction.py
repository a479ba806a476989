"""How well does the pretrained network fill in what is hidden, beside what plain statistics can?

    python train.py && python -m applications.reconstruction [--out out]

Hides one group of variables after the other at the validation sites of out/pretrained.pt, which it
was never trained on: attributes altogether, weather for 60 days of a year. The yardstick is ridge
regression on the attributes left visible, or the mean of the day of the year at training sites.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

import data
from model import NEVER_HIDDEN, Masks
from train import Windows, apply_standardisation, load_checkpoint, split


def reconstruction(folder, spec="", windows_per_site=4, most=250):
    """[(kind, group, R2, R2 of the yardstick)] at no more than `most` validation sites."""
    model, saved = load_checkpoint(Path(folder, "pretrained.pt"))
    options, config = argparse.Namespace(**saved["options"]), model.config
    sites = data.load(spec or options.data, cache=Path(folder, "cache"), quick=options.quick)
    training, validation = split(options, sites)
    data.check(len(validation), f"{folder}/pretrained.pt has no validation sites")
    windows = Windows(sites, saved["scaling"], config.max_days, config.dynamic_names,
                      config.static_names)
    site = np.repeat(validation[:most], windows_per_site)
    batch = windows.get(site, windows.starts(site, np.random.default_rng(0)))
    forcing, static, _, day_of_year = batch                 # (B, L, C), (B, S), (B, 2), (B, L)
    rows = []

    fitted = ridge_yardstick(windows.static.numpy(), config.static_groups, training, site)
    for group in sorted(set(config.static_groups) - {NEVER_HIDDEN}):
        member = torch.tensor([name == group for name in config.static_groups])     # (S,)
        hidden = Masks(static=member.expand(static.shape))
        _, guess = decode(model, batch, hidden)
        rows.append(("static", group, r_squared(static, guess, hidden.static),
                     r_squared(static, fitted, hidden.static)))

    mean_year = climatology(windows, training)                                  # (366, C)
    inside = torch.zeros(windows.days, 1, dtype=torch.bool)                     # (L, 1)
    inside[windows.days // 2:][:60] = True
    for group in sorted(set(config.dynamic_groups)):
        member = torch.tensor([name == group for name in config.dynamic_groups])    # (C,)
        hidden = Masks(dynamic=(inside & member).expand(forcing.shape))
        guess, _ = decode(model, batch, hidden)
        rows.append(("dynamic", group, r_squared(forcing, guess, hidden.dynamic),
                     r_squared(forcing, mean_year[day_of_year.long() - 1], hidden.dynamic)))
    return rows, len(set(site))


@torch.no_grad()
def decode(model, batch, hidden, size=64):
    """What the network puts at (B, L, C) and (B, S), in parts of the batch to bound the memory."""
    dynamic, static = [], []
    for first in range(0, len(batch[0]), size):
        part = [x[first:first + size] for x in batch]
        masks = [mask if mask is False else mask[first:first + size] for mask in hidden]
        guess = model.eval().decode(model.encode(*part, Masks(*masks)))
        dynamic.append(guess[0])
        static.append(guess[1])
    return torch.cat(dynamic), torch.cat(static)


def ridge_yardstick(table, groups, training, site):
    """(N, S) attributes -> each at the sites (B,) by ridge regression on those of other groups."""
    fitted = np.zeros((len(site), len(groups)))
    for v, group in enumerate(groups):
        x = table[:, np.array(groups) != group]                                 # (N, S')
        fitted[:, v] = ridge(x[training], table[training, v], x[site])
    return torch.from_numpy(fitted)                                             # (B, S)


def ridge(x, y, x_new):
    """Ridge regression with generalised cross-validation; missing x = mean, missing y left out."""
    x, x_new, y = np.nan_to_num(x[~np.isnan(y)]), np.nan_to_num(x_new), y[~np.isnan(y)]
    u, s, vt = np.linalg.svd(x - x.mean(0), full_matrices=False)
    shrink = s ** 2 / (s ** 2 + np.logspace(-2, 5, 30)[:, None])                # (penalties, S)
    fits = shrink * (u.T @ (y - y.mean())) @ u.T                                # (penalties, N)
    error = ((y - y.mean() - fits) ** 2).sum(1) / (len(y) - 1 - shrink.sum(1)) ** 2
    weights = vt.T @ (shrink[error.argmin()] / s * (u.T @ (y - y.mean())))      # (S,)
    return y.mean() + (x_new - x.mean(0)) @ weights


def climatology(windows, training):
    """Mean of every day of the year over 500 training sites: (366, C), standardised."""
    past = apply_standardisation(windows.sites.forcing[training[:500]], windows.scaling)
    past = torch.from_numpy(past).nanmean(0)                                    # (T, C)
    return torch.stack([past[windows.day_of_year == day].nanmean(0) for day in range(1, 367)])


def r_squared(truth, guess, where):
    """1 - SSE/SST over observed entries in `where`, mean over the variables (last axis) it has."""
    y = torch.where(where, truth, torch.nan).double().flatten(0, -2)            # (n, V)
    sse = (y - guess.flatten(0, -2)).square().nansum(0)                         # (V,)
    sst = (y - y.nanmean(0)).square().nansum(0)
    return (1 - sse / sst)[sst > 1e-9].mean().item()        # NaN if it has none


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out", help="folder of pretrained.pt [out]")
    parser.add_argument("--data", default="", help="sources; empty: those of the pretraining")
    o = parser.parse_args(argv)
    rows, n = reconstruction(o.out, o.data)
    print(f"\nR2 at {n} validation sites, mean over the variables of a hidden group\n"
          f"{'group':<24}{'StefaLand':>10}{'yardstick':>11}")
    for kind, group, ours, theirs in rows:
        print(f"{kind + ' ' + group:<24}{ours:>10.3f}{theirs:>11.3f}")


if __name__ == "__main__":
    data.command(main)
