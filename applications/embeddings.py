"""The frozen embedding of every site as a table, to be used elsewhere: in sklearn, in a GIS.

    python -m applications.embeddings caravan:DIR [--out out] [--checkpoint FILE] [--map]

Writes out/embeddings/NAME.npz and .csv: id, lat, lon, the D values of the site token and the D of
the mean day of the first year of its record. Where streamflow is known it tells whether neighbours
in the embedding are alike in their runoff ratio, beside neighbours in attributes and on the map.
--map draws the first three principal components, which needs matplotlib.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
import torch

import data
from applications.common import new_figure, save_figure
from applications.values import embed
from train import arrange, load_checkpoint


def likeness(vectors, values, k=5):
    """The correlation of each site's value (N,) with the mean of its k nearest others', nearest
    in vectors (N, V) that are standardised, what is missing being the mean."""
    x = np.ma.masked_invalid(vectors).astype(float)
    x = torch.from_numpy(((x - x.mean(0)) / x.std(0).clip(1e-9)).filled(0))
    distance = torch.cdist(x, x).fill_diagonal_(np.inf)                         # (N, N)
    nearest = distance.topk(k, largest=False).indices.numpy()                   # (N, k)
    return np.corrcoef(values, values[nearest].mean(1))[0, 1]


def compare_neighbours(sites, views):
    """Print how alike neighbours are in mean flow over mean precipitation, in each of the views,
    {name: (N, V)}."""
    rain = arrange(sites.forcing, sites.dynamic_names, ("precipitation",))[..., 0]  # (N, T)
    both = ~np.isnan(rain + sites.target)
    ratio = sites.target.sum(1, where=both) / rain.sum(1, where=both).clip(1e-9)    # (N,)
    known = (ratio > 0) & (ratio < 2) & ~np.isnan(sites.latlon).any(1)  # beyond: a wrong area
    if known.sum() > 5:
        print(f"correlation of the runoff ratio with that of the 5 nearest of {known.sum()} sites")
        for name, vectors in views.items():
            print(f"  by {name:<12}{likeness(vectors[known], ratio[known]):.3f}")


def draw(path, sites, vectors):
    """A map of each of the first three principal components of vectors (N, D)."""
    u, s, _ = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    shares, figure = s ** 2 / (s ** 2).sum(), new_figure(12, 3.4)
    for k, axis in enumerate(figure.subplots(1, 3, sharey=True)):
        dots = axis.scatter(sites.latlon[:, 1], sites.latlon[:, 0], 12, u[:, k] / u[:, k].std(),
                            cmap="RdBu", vmin=-2, vmax=2, edgecolors="0.4", linewidths=0.2)
        figure.colorbar(dots, ax=axis, extend="both", label="standard deviations")
        axis.set(title=f"component {k + 1}, {shares[k]:.0%} of the variance",
                 xlabel="longitude (degrees)", ylabel="latitude (degrees)")
    save_figure(figure, path)


def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("data", help="the sites: csv:DIR, caravan:DIR …")
    parser.add_argument("--out", default="out", help="folder of pretrained.pt and embeddings [out]")
    parser.add_argument("--checkpoint", default="", help="empty: pretrained.pt in --out")
    parser.add_argument("--map", action="store_true", help="draw it, too (matplotlib)")
    o = parser.parse_args(argv)
    sites = data.load(o.data, cache=Path(o.out, "cache"))
    model, saved = load_checkpoint(o.checkpoint or Path(o.out, "pretrained.pt"))
    _, _, days, tokens = embed(model, saved["scaling"], sites).numpy().swapaxes(0, 1)   # (N, D)
    kind, _, folder = o.data.partition(":")
    path = Path(o.out, "embeddings", "-".join([kind, *Path(folder).parts[-1:]]))
    arrays = dict(ids=sites.ids, latlon=sites.latlon, site=tokens, mean_day=days)
    data.write_atomically(Path(f"{path}.npz"), lambda file: np.savez(file, **arrays))
    keys = [f"{part}_{d:03d}" for part in ("site", "day") for d in range(tokens.shape[1])]
    rows = np.column_stack([sites.ids, np.hstack([sites.latlon, tokens, days]).astype(str)])
    data.write_atomically(Path(f"{path}.csv"), lambda file: np.savetxt(
        file, rows, "%s", ",", header="id,lat,lon," + ",".join(keys), comments="", encoding="utf8"))
    print(f"{path}.csv, {path}.npz: {len(sites.ids)} sites, twice {tokens.shape[1]} values")
    compare_neighbours(sites, {"embedding": tokens, "mean day": days, "attributes": sites.static,
                               "place": data.on_sphere(sites.latlon)})
    if o.map:
        draw(Path(f"{path}.png"), sites, tokens)


if __name__ == "__main__":
    data.command(main)
