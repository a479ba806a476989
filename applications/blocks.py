"""An image and its map in blocks, each a unit of hold-out: what applications/height.py learns from.

    load("synthetic", "height")     load("tiles:DIR", "height")     load("s2:DIR", "landcover")

tiles:DIR holds an image x.npy (C, H, W) and its map y.npy (H, W); s2:DIR an npz of Sentinel-2
scenes (see dynamic_world.read_scenes) with the maps `dem`, m, and `lulc`, classes.

Axes: N blocks, T scenes, C channels, H and W pixels. NaN = not known.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from applications.common import one_file, read_npz
from applications.dynamic_world import normalize, read_scenes
from data import check

SIZE, MARGIN = 20, 10                       # pixels along a block, and seen round it
MARGINS = np.pad(np.zeros((SIZE, SIZE), bool), MARGIN, constant_values=True)    # (H, W)


@dataclass
class Blocks:
    """Squares of an image, H = W = 40: a block of 20 x 20 pixels and the margin seen round it."""
    ids: np.ndarray        # (N,) "block_ii_jj", row and column
    latlon: np.ndarray     # (N, 2) degrees; not where they are, but how they lie, to cut regions
    image: np.ndarray      # (N, C, H, W) float32
    target: np.ndarray     # (N, H, W) float32, m or class; NaN in the margin and where not known


def load(spec, task):
    """"synthetic", "tiles:DIR" or "s2:DIR", to learn height or landcover -> Blocks."""
    kind, _, folder = spec.partition(":")
    check(kind in READERS, f"--data {spec}: expected synthetic, tiles:DIR or s2:DIR")
    check(Path(folder).is_dir(), f"--data {spec}: no folder '{folder}'", FileNotFoundError)
    image, target = READERS[kind](Path(folder), task)
    if task == "landcover":
        wrong = target[(target < 0) | (target % 1 > 0)]
        check(len(wrong) == 0, f"--data {spec}: the class {wrong[:1]}, expected 0, 1, 2 and so on; "
                               "no data is NaN or below -998")
    blocks = cut(image, target, spec)
    print(f"{spec}: an image of {image.shape} channels and pixels, {np.isfinite(target).sum()} of "
          f"known {task}, in {len(blocks.ids)} blocks")
    return blocks


def cut(image, target, name):
    """An image (C, H, W) and its map (H, W) -> Blocks; ValueError names the source."""
    check(image.shape[1:] == target.shape,
          f"{name}: an image of {image.shape[1:]} pixels, a map of {target.shape}")
    check(not np.isnan(image).any(), f"{name}: the image has pixels without data (NaN)")
    check(not np.isnan(target).all(), f"{name}: no pixel of the map is known")
    # a margin all round, and what the last blocks lack on the right and below
    pad = [(MARGIN, MARGIN + -length % SIZE) for length in target.shape]
    image = np.pad(image.astype(np.float32), [(0, 0), *pad], mode="edge")
    target = np.pad(target.astype(np.float32), pad, constant_values=np.nan)
    both, side = np.concatenate([image, target[None]]), SIZE + 2 * MARGIN       # (C+1, …)
    both = sliding_window_view(both, (side, side), (1, 2))[:, ::SIZE, ::SIZE]
    places = [*np.ndindex(both.shape[1:3])]                 # row and column of each block
    both = np.moveaxis(both, 0, 2).reshape(len(places), -1, side, side)         # (N, C+1, H, W)
    target = np.where(MARGINS, np.float32(np.nan), both[:, -1])                 # (N, H, W)
    ids = np.array([f"block_{i:02d}_{j:02d}" for i, j in places])
    latlon = np.float32(np.array(places) * (-0.002, 0.002))     # 20 pixels of 10 m: 0.0018 degrees
    latlon[:, 1] = (latlon[:, 1] + 180) % 360 - 180         # rounded as by data.assemble
    return Blocks(ids, latlon, both[:, :-1], target)


def split(blocks, fold_of, fold, rng):
    """Indices of training, validation and test blocks, all with known pixels; test is the fold."""
    known = ~np.isnan(blocks.target).all((1, 2))                                # (N,)
    test = np.flatnonzero(known & (fold_of == fold))
    others = rng.permutation(np.flatnonzero(known & (fold_of != fold)))
    n_validation = max(len(others) // 7, 1)
    training, validation = np.sort(others[n_validation:]), np.sort(others[:n_validation])
    check(len(test) > 0 and len(training) > 0,
          f"fold {fold}: {len(test)} test and {len(training)} training blocks")
    return training, validation, test


def read_tiles(folder, task):
    """x.npy and y.npy; no data: NaN, below -998, or AlphaEarth's -128.

    int8 is what AlphaEarth's files hold: the square of value / 127.5, with its sign, is meant
    (developers.google.com/earth-engine/guides/aef_on_gcs_readme). Both arrays must lie alike: some
    copies of these files begin in the south.
    """
    x = read_npz(one_file(folder, "x.npy"), x="chw")["x"]
    y = read_npz(one_file(folder, "y.npy"), y="hw")["y"]
    if x.dtype == np.int8:
        x = np.where(x == -128, np.nan, np.sign(x) * (x / 127.5) ** 2)
    return np.where(x < -998, np.nan, x), np.where(y < -998, np.nan, y)


def read_s2(folder, task):
    """The cloudless scenes one upon the other, (T * 9, H, W), and `dem` or `lulc`.

    The classes of `lulc` that cover at least 100 pixels are renumbered from 0, others left out.
    """
    _, scenes, clear = read_scenes(folder)
    path, cloudless = one_file(folder, "*.npz"), clear.all((1, 2))              # (T,)
    check(cloudless.any(), f"{path}: clouds in each of {len(clear)} scenes, expected one without")
    image = np.concatenate(normalize(scenes[cloudless]).transpose(0, 3, 1, 2))  # (T * 9, H, W)
    maps = read_npz(path, dem="hw", lulc="hw")
    if task == "height":
        return image, maps["dem"]
    lulc = maps["lulc"]
    codes, pixels = np.unique(lulc[lulc > 0], return_counts=True)
    codes = codes[pixels >= 100]
    print(f"{path}: classes {codes.astype(int)}, from now on 0 to {len(codes) - 1}")
    return image, np.where(np.isin(lulc, codes), np.searchsorted(codes, lulc), np.nan)


def synthetic_tile(folder, task, seed=0, size=200):
    """Terrain that rises to the east, m, or its four classes by height and wetness; no folder.

    Seen as 64 embeddings that mix both (height), or as 9 bands in three seasons, a tenth of the
    pixels cloudy (landcover).
    """
    rng, (rows, columns) = np.random.default_rng(seed), np.indices((size, size)) / size

    def field(scale):                       # a smooth random field, (H, W)
        waves = np.stack([rows, columns], -1) @ (scale * rng.standard_normal((2, 64)))
        return np.cos(waves + rng.uniform(0, 2 * np.pi, 64)).sum(-1) / 5.7

    height = 300 + 80 * field(12) + 15 * field(40) + 120 * columns              # m
    slope, wet = np.hypot(*np.gradient(height, 10.0)), field(15)
    classes = np.select([wet > 1, height > 420, wet < -0.3], [0, 1, 2], 3)      # (H, W)
    if task == "height":
        is_class = classes == np.arange(4)[:, None, None]                       # (4, H, W)
        latents = np.stack([height / 100 - 3.5, 3 * slope, wet, *is_class])
        mixed = np.einsum("chw,ck->khw", latents, rng.standard_normal((7, 64)))
        return np.tanh(mixed + 0.3 * rng.standard_normal(mixed.shape)), height  # (64, H, W)
    spectra = rng.uniform(0.1, 0.9, (3, 4, 9))[:, classes]                      # (3, H, W, 9)
    seen = spectra + 0.25 * rng.standard_normal(spectra.shape)
    seen[rng.random(seen.shape[:3]) < 0.1] = 1                                  # cloud
    return np.concatenate(seen.transpose(0, 3, 1, 2)), classes                  # (27, H, W)


READERS = {"synthetic": synthetic_tile, "tiles": read_tiles, "s2": read_s2}
