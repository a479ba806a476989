"""Does a slope slide? A CNN on the terrain round a point, and the embedding of its site.

    python train.py && python -m applications.landslide                     the synthetic world
    python -m applications.landslide --data landslide:DIR --holdout pur --fold all --steps 300

DIR holds labelled points (csv: x, y, lslpts and terrain values) and a raster stack (npz: ta (K, H,
W), xmin, ymax, res), as in the Ecuador set (doi 10.1016/j.geomorph.2011.10.033), both in UTM zone
17 south. Such points have no weather: an encoder of attributes alone suits them (applications/
soil.py). Baselines: `cnn`, the patch alone; `glm`, logistic regression on the attributes alone.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch.nn as nn

import data
import train
from applications import soil, values
from applications.common import one_file, read_npz

SIZE = 17                                                   # cells along the side of a patch
# x and y, of the group "landslide", are hidden with the target; lslpts is read as text, as ids
COLUMNS = {name: (name, 1) for name in ("slope", "cplan", "cprof", "log10_carea")} | {
    "x": ("landslide_x", 1), "y": ("landslide_y", 1), "lslpts": ("id", 1), "elev": ("elevation", 1)}
LABELS = {"TRUE": 1, "1": 1, "FALSE": 0, "0": 0}


def terrain(layers, height, cells, width):
    """A network of the features of a patch: (B, K, H, W) -> (B, width)."""
    return nn.Sequential(
        nn.BatchNorm2d(layers, affine=False, momentum=None),    # scales as training patches
        nn.Conv2d(layers, width // 4, 3, 1, 1), nn.GELU(), nn.MaxPool2d(2),
        nn.Conv2d(width // 4, width, 3, 1, 1), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


values.LAYERS["patch"] = terrain
VARIANTS = {"resconn": ("embedding", "attributes", "patch"), "cnn": ("patch",),
            "glm": ("attributes",)}


def read(folder):
    """Points with label, terrain and place, which are attributes until one is made the target."""
    path = one_file(folder, "*.csv")
    table = data.read_table(path, "id", columns=COLUMNS)
    table["landslide"] = np.array([LABELS.get(text.upper(), np.nan) for text in table.pop("id")])
    x, y = table.get("landslide_x", np.nan), table.get("landslide_y", np.nan)   # (N,) m
    bad = np.flatnonzero(np.isnan(table["landslide"] + x + y))
    data.check(not len(bad), f"{path}, line {bad[:1] + 2}: expected TRUE or FALSE, x and y")
    lat = (y - 1e7) / 110_578                               # degrees, right to some 100 m
    lon = -81 + (x - 5e5) / (111_276 * np.cos(np.deg2rad(lat)))
    for i, place in enumerate(zip(lat, lon)):
        static = {name: column[i] for name, column in table.items()}
        yield data.Record(f"point_{i:04d}", path, place, static, np.array([], "datetime64[D]"), {})


def read_patches(folder, x, y):
    """The raster round points at x, y (N,): (N, K, SIZE, SIZE), with NaN where it ends."""
    raster = read_npz(one_file(folder, "*.npz"), ta="khw", xmin="", ymax="", res="")
    left, top, cell = raster["xmin"], raster["ymax"], raster["res"]
    data.check(cell > 0 and np.isfinite(left + top), f"{folder}: cells of {cell} m, {left}, {top}")
    maps = np.pad(np.float32(raster["ta"]), [(0, 0)] + 2 * [(SIZE, SIZE)], constant_values=np.nan)
    around = np.lib.stride_tricks.sliding_window_view(maps, (SIZE, SIZE), (1, 2))
    row = np.clip((top - y) // cell + SIZE // 2 + 1, 0, around.shape[1] - 1).astype(int)
    column = np.clip((x - left) // cell + SIZE // 2 + 1, 0, around.shape[2] - 1).astype(int)
    return around[:, row, column].swapaxes(0, 1)


def load_sites(o):
    """Sites with extra["patch"] (N, K, SIZE, SIZE) and the target (N, 1): 1 where it slid."""
    if o.data == "synthetic":
        return add_synthetic_slopes(data.load(quick=o.quick))
    sites = data.load(o.data, cache=Path(o.out, "cache"))
    places = train.arrange(sites.static, sites.static_names, ("landslide_x", "landslide_y"))
    patch = read_patches(o.data.partition(":")[2], *places.T)
    outside = np.isnan(patch).any((1, 2, 3))                                    # (N,)
    data.tell(f"{o.data}: points left out, their patch leaves the raster", sites.ids[outside])
    sites = soil.attribute_as_target(sites, "landslide")
    sites.target[outside] = np.nan
    return replace(sites, extra={"patch": np.nan_to_num(patch)})


def add_synthetic_slopes(sites):
    """For the synthetic world: 10 m maps of height and slope, (N, 2, 17, 17), and where it slid."""
    rng, N = np.random.default_rng(0), len(sites.ids)
    relief, wet, _, _, _, growth, depth, _ = sites.extra["latents"].T           # (N,) each
    waves = np.cos(np.pi * np.arange(4)[:, None] * (np.arange(SIZE) + 0.5) / SIZE)  # (4, SIZE)
    height = np.einsum("nij,ih,jw->nhw", rng.standard_normal((N, 4, 4)), waves, waves)
    height *= 3 * np.exp(0.5 * relief)[:, None, None]                           # (N, H, W) m
    slope = np.rad2deg(np.arctan(np.hypot(*np.gradient(height, 10.0, axis=(1, 2)))))
    patch = np.stack([height, slope], 1).astype(np.float32)                     # (N, 2, H, W)
    roots = 1 / (1 + np.exp(-6 * (growth - 0.55) - 0.8 * np.log(depth)))        # share of forest
    steepness = 0.12 * (slope[:, SIZE // 2, SIZE // 2] - 14)
    slid = steepness + 1.5 * wet - 2 * roots + 0.7 * rng.standard_normal(N) > 0     # (N,)
    return replace(sites, target=slid[:, None].astype(np.float32), extra={"patch": patch})


def main(argv=None):
    values.main(__doc__, load_sites, argv, VARIANTS, classes=True, target="landslide")


if __name__ == "__main__":
    data.command(main)
