"""The frozen embedding of every site as a table, to be used elsewhere: in sklearn, in a GIS.

    python -m applications.embeddings caravan:DIR [--out out] [--checkpoint FILE]

Writes out/embeddings/NAME.npz and .csv: id, lat, lon, the D values of the site token and the D of
the mean day of the first year of its record; and with matplotlib a map of their first three
principal components. Where streamflow is known it tells whether neighbours in the embedding are
alike in their runoff ratio, beside neighbours in attributes and on the map.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

import data
from applications import alphaearth, landslide, soil, soil_moisture  # noqa: for their readers
from model import StefaLand
from train import Windows, load_checkpoint


@torch.no_grad()
def embed(sites, model, scaling, before=False, size=64):
    """Site tokens and mean days, (N, D) each, after the network's layers or before them."""
    c, read = model.eval().config, model.embed if before else model.encode
    windows = Windows(sites, scaling, c.max_days, c.dynamic_names, c.static_names)
    start = np.minimum(windows.first, len(sites.dates) - c.max_days)            # (N,)
    tokens, days = [], []
    for i in np.array_split(np.arange(len(sites.ids)), len(sites.ids) // size + 1):
        e = read(*windows.get(i, start[i]))                                     # (B, L+1, D)
        tokens.append(e[:, -1])
        days.append(e[:, :-1].mean(1))
    return torch.cat(tokens).numpy(), torch.cat(days).numpy()


def components(vectors, k=3):
    """First principal components, (N, k), and the share of the variance of each."""
    centred = vectors - vectors.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    return u[:, :k] * s[:k], (s ** 2 / (s ** 2).sum())[:k]


def standardise(values):
    """(N, V) with mean 0 and deviation 1, missing ones 0."""
    spread = np.nanstd(values, 0)
    return np.nan_to_num((values - np.nanmean(values, 0)) / np.where(spread > 0, spread, 1))


def likeness(vectors, values, k=5):
    """The correlation of each site's value (N,) with the mean of its k nearest others'."""
    squares = (vectors ** 2).sum(1)
    distance = squares[:, None] + squares - 2 * vectors @ vectors.T             # (N, N)
    np.fill_diagonal(distance, np.inf)
    nearest = np.argpartition(distance, k, 1)[:, :k]                            # (N, k)
    return np.corrcoef(values, values[nearest].mean(1))[0, 1]


def runoff_ratio(sites):
    """Mean flow over mean precipitation of the days that have both, (N,)."""
    rain = sites.forcing[..., sites.dynamic_names.index("precipitation")]
    both = ~np.isnan(rain + sites.target)
    return (np.where(both, sites.target, 0).sum(1)
            / np.maximum(np.where(both, rain, 0).sum(1), 1e-9))


def compare_neighbours(sites, embeddings):
    """Print how alike neighbours are in runoff ratio, by each idea of what a neighbour is."""
    ratio = runoff_ratio(sites)
    known = ~np.isnan(sites.target).all(1) & ~np.isnan(sites.latlon).any(1)
    known &= (ratio > 0) & (ratio < 2)                      # a ratio beyond is a wrong area
    place = data.on_sphere(sites.latlon)
    weather = np.ma.masked_invalid(sites.forcing).mean(1).filled(np.nan)        # (N, C)
    views = embeddings | {"attributes": sites.static, "place": place,
                          "attributes, mean weather and place":
                          np.hstack([sites.static, weather, place])}
    print(f"correlation of the runoff ratio with that of the 5 nearest of {known.sum()} sites")
    for name, vectors in views.items():
        print(f"  by {name:<36}{likeness(standardise(vectors[known]), ratio[known]):.3f}")


def draw(path, sites, vectors):
    """A map of each of the first three principal components."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no map: it needs matplotlib")
        return
    scores, shares = components(vectors)
    figure = Figure((11, 3.6), layout="constrained")
    for k, axis in enumerate(figure.subplots(1, 3, sharey=True)):
        limit = np.percentile(abs(scores[:, k]), 95)
        axis.scatter(sites.latlon[:, 1], sites.latlon[:, 0], 12, scores[:, k], cmap="RdBu",
                     vmin=-limit, vmax=limit, edgecolors="0.4", linewidths=0.2)
        axis.set(title=f"component {k + 1}, {100 * shares[k]:.0f} % of the variance",
                 xlabel="longitude (degrees)", ylabel="" if k else "latitude (degrees)")
    data.write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=90))
    print(path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="the sites: csv:DIR, caravan:DIR …")
    parser.add_argument("--out", default="out", help="folder of pretrained.pt and embeddings [out]")
    parser.add_argument("--checkpoint", default="", help="empty: pretrained.pt in --out")
    o = parser.parse_args(argv)
    sites = data.load(o.data, cache=Path(o.out, "cache"))
    model, saved = load_checkpoint(o.checkpoint or Path(o.out, "pretrained.pt"))
    tokens, days = embed(sites, model, saved["scaling"])
    kind, _, folder = o.data.partition(":")
    path = Path(o.out, "embeddings", "-".join(filter(None, (kind, Path(folder).name))))
    arrays = dict(ids=sites.ids, latlon=sites.latlon, site=tokens, mean_day=days)
    data.write_atomically(Path(f"{path}.npz"), lambda file: np.savez(file, **arrays))
    names = [f"{part}_{d:03d}" for part in ("site", "day") for d in range(tokens.shape[1])]
    lines = [",".join(["id", "lat", "lon", *names])]
    for site, *values in zip(sites.ids, sites.latlon, tokens, days):
        lines.append(",".join([site, *[f"{x:.6g}" for x in np.concatenate(values)]]))
    text = "\n".join(lines) + "\n"
    data.write_atomically(Path(f"{path}.csv"), lambda file: file.write(text.encode()))
    print(f"{path}.csv, {path}.npz: {len(sites.ids)} sites, twice {tokens.shape[1]} values")
    if not np.isnan(sites.target).all():
        torch.manual_seed(0)
        untrained, scaling = StefaLand(model.config), saved["scaling"]
        compare_neighbours(sites, {
            "embedding of the site": tokens, "embedding of the mean day": days,
            "the site before the layers": embed(sites, model, scaling, before=True)[0],
            "the site by an untrained network": embed(sites, untrained, scaling)[0]})
    draw(Path(f"{path}.png"), sites, tokens)


if __name__ == "__main__":
    data.command(main)
