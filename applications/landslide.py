"""Does a slope slide? A CNN on the terrain round a point, and the embedding of its site.

    python train.py && python -m applications.landslide                     the synthetic world
    python -m applications.landslide --data landslide:DIR --holdout pur --fold all --steps 300

DIR holds labelled points (csv: x, y, lslpts and terrain values) and a raster stack (npz: ta (K, H,
W), xmin, ymax, res), as in the Ecuador set (doi 10.1016/j.geomorph.2011.10.033), both in UTM zone
17 south. Such points have no weather: an encoder of attributes alone suits them (applications/
soil.py). Baselines: `cnn`, the patch alone; `glm`, logistic regression on the attributes alone.
"""

from dataclasses import replace

import numpy as np
import torch.nn as nn
import torch.nn.functional as F

import data
import finetune
from applications import common

SIZE = 17                                                   # cells along the side of a patch
ATTRIBUTES = {"slope": "slope", "cplan": "plan_curvature", "cprof": "profile_curvature",
              "elev": "elevation", "log10_carea": "upslope_area"}       # column -> our name
LABELS = {"TRUE": 1, "1": 1, "FALSE": 0, "0": 0}


class PatchHead(nn.Module):
    """Features of the patch join those of the site: (1, B, width), [(B, K, H, W)] -> (1, B)."""

    def __init__(self, width, dropout, shapes):
        super().__init__()
        layers = shapes["patch"]
        self.mlp = common.MLPHead(width, dropout, shapes)
        self.cnn = nn.Sequential(
            nn.BatchNorm2d(layers, affine=False, momentum=None),    # scales as training patches
            nn.Conv2d(layers, width // 4, 3, padding=1), nn.GELU(), nn.MaxPool2d(2),
            nn.Conv2d(width // 4, width, 3, padding=1), nn.GELU())

    def forward(self, x, extra):
        features = self.cnn(extra[0]).mean((2, 3))                              # (B, width)
        return self.mlp(x + features, extra)                                    # (1, B)


def read_landslide(folder):
    """Points with their attributes, label and patch (K, SIZE, SIZE) of the raster."""
    path = common.one_file(folder, "*.csv")
    raster_path = common.one_file(folder, "*.npz")
    raster = common.read_npz(raster_path, ta="khw", xmin="", ymax="", res="")
    maps, left, top, cell = (raster[name] for name in ("ta", "xmin", "ymax", "res"))
    data.check(cell > 0 and np.isfinite(left + top),
               f"{raster_path}: cells of {cell} m from {left}, {top}")
    table = data.Table(path, ["x", "y", "lslpts", *ATTRIBUTES])
    attributes = {name: table.numbers(column) for column, name in ATTRIBUTES.items()}
    x, y, labels = table.numbers("x"), table.numbers("y"), table.columns["lslpts"]
    table.refuse("x", table.columns["x"], np.isnan(x))
    table.refuse("y", table.columns["y"], np.isnan(y))
    table.refuse("lslpts", labels, [label.upper() not in LABELS for label in labels])
    lat = (y - 1e7) / 110_578                               # degrees, right to some 100 m
    lon = -81 + (x - 5e5) / (111_276 * np.cos(np.deg2rad(lat)))
    for i, label in enumerate(labels):
        row = int((top - y[i]) // cell) - SIZE // 2
        column = int((x[i] - left) // cell) - SIZE // 2
        patch = maps[:, max(row, 0):row + SIZE, max(column, 0):column + SIZE]
        if patch.shape[1:] != (SIZE, SIZE) or np.isnan(patch).any():
            print(f"{path}, line {table.lines[i]}: skipped, its patch leaves the raster")
            continue
        static = {name: values[i] for name, values in attributes.items()}
        extra = {"patch": patch, "landslide": LABELS[label.upper()]}
        yield data.Record(f"point_{i:04d}", path, (lat[i], lon[i]), static, {}, extra)


def add_synthetic_slopes(sites, options):
    """For the synthetic world: 10 m maps of height and slope, (N, 2, 17, 17), and where it slid."""
    if "patch" in sites.extra:
        return sites
    data.check("latents" in sites.extra,
               "these sites have no patches: expected --data synthetic or landslide:DIR")
    rng, N = np.random.default_rng(0), len(sites.ids)
    relief, wet, _, _, _, growth, depth, _ = sites.extra["latents"].T           # (N,) each
    waves = np.cos(np.pi * np.arange(4)[:, None] * (np.arange(SIZE) + 0.5) / SIZE)  # (4, SIZE)
    height = np.einsum("nij,ih,jw->nhw", rng.standard_normal((N, 4, 4)), waves, waves)
    height *= 3 * np.exp(0.5 * relief)[:, None, None]                           # (N, H, W) m
    slope = np.rad2deg(np.arctan(np.hypot(*np.gradient(height, 10.0, axis=(1, 2)))))
    patch = np.stack([height, slope], 1).astype(np.float32)                     # (N, 2, H, W)
    roots = logistic(6 * (growth - 0.55) + 0.8 * np.log(depth))                 # share of forest
    steepness = 0.12 * (slope[:, SIZE // 2, SIZE // 2] - 14)
    slid = steepness + 1.5 * wet - 2 * roots + 0.7 * rng.standard_normal(N) > 0     # (N,)
    return replace(sites, target=slid.astype(np.float32), extra=sites.extra | {"patch": patch})


def logistic(x, sites=None):
    return 1 / (1 + np.exp(-x))


data.READERS["landslide"] = read_landslide
finetune.VARIANTS["cnn"] = finetune.Variant("", inputs=(), needs=PatchHead)
finetune.TASKS["landslide"] = finetune.Task(
    "landslide", models="resconn,cnn,glm", baseline="cnn", inputs=("static",), head=PatchHead,
    extra=("patch",), loss=F.binary_cross_entropy_with_logits, standardised=False,
    inverse=logistic, scoring="class", prepare=add_synthetic_slopes)

if __name__ == "__main__":
    common.main("landslide", __doc__)
