"""Dynamic World: what covers the land, nine classes from a Sentinel-2 scene, month by month.

    python -m applications.dynamic_world                                    a synthetic year
    python -m applications.dynamic_world SCENES --weights DIR --plot        real scenes, a figure

SCENES is a folder with an npz of dated scenes (see read_scenes). DIR is the folder model/forward of
github.com/google/dynamicworld (Apache-2.0), of which variables/ is enough; without it the network
is initialised at random. Printed are the shares of the classes by month, for clear pixels and, for
comparison, for all of them: the network takes clouds for snow and crops. --plot draws
OUT/landcover.png. Network and normalisation: Brown et al. 2022, doi 10.1038/s41597-022-01307-4.

This file needs torch and numpy only (matplotlib for --plot) and can be copied alone:

    network = DynamicWorld.from_release(DIR)                # (B, 9, H, W) -> logits (B, 9, H, W)
    x = torch.from_numpy(normalize(reflectance))            # (H, W, 9), reflectance x 10,000
    classes = network(x.permute(2, 0, 1)[None]).argmax(1)   # (1, H, W), numbered as CLASSES

Axes: B scenes in a batch, T dates, H W pixels, 9 bands or classes.
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

CLASSES = ("water", "trees", "grass", "flooded vegetation", "crops", "shrub & scrub", "built",
           "bare", "snow & ice")
# as Dynamic World draws them
COLOURS = "#419bdf #397d49 #88b053 #7a87c6 #e49635 #dfc35a #c4281b #a59b8f #b39fe1".split()
BANDS = {  # in the network's order: offset and scale of the logarithm of the reflectance
    "B02": (1.7417268007636313, 2.023298706048351), "B03": (1.7261204997060209, 2.038905204308012),
    "B04": (1.6798346251414997, 2.179592821212937), "B05": (1.7734969472909623, 2.2890068333026603),
    "B06": (2.289154079164943, 2.6171674549378166), "B07": (2.382939712192371, 2.773418590375327),
    "B08": (2.3828939530384052, 2.7578332604178284), "B11": (2.1952484264967844, 2.789092484314204),
    "B12": (1.554812948247501, 2.4140534947492487)}


class DynamicWorld(nn.Module):
    """Brown et al.'s network: a stem, then three residual blocks at half the resolution."""

    def __init__(self, in_channels=9, out_channels=9):
        super().__init__()
        self.stem = unit(in_channels, 64, 3)
        self.side = nn.Sequential(unit(64, 48, 1), unit(48, 48, 3, groups=48))
        self.block1, self.block2, self.block3 = Block(64, 96), Block(96, 144), Block(192, 144)
        self.output = nn.Conv2d(144, out_channels, 1)

    def forward(self, x):
        """(B, 9, H, W) as from normalize() -> logits of CLASSES (B, 9, H, W); H, W at least 2."""
        H, W = x.shape[-2:]
        x = self.stem(x)                                                        # (B, 64, H, W)
        x = F.interpolate(x, (H // 2, W // 2), mode="bilinear", antialias=True)
        x = torch.cat([self.block2(self.block1(x)), self.side(x)], 1)           # (B, 192, H/2, W/2)
        x = F.interpolate(self.block3(x), (H, W), mode="bilinear")              # (B, 144, H, W)
        return self.output(F.normalize(x, dim=1))                               # (B, 9, H, W)

    @classmethod
    def from_release(cls, path):
        """Google's released network, ready to predict; path: its folder, with variables/ in it.

        FileNotFoundError if the file of weights is not there, ValueError if it is cut short.
        """
        file = Path(path, "variables", "variables.data-00000-of-00001")
        model = cls().eval()
        tensors = model.tensors_as_released()
        sizes = [tensor.numel() for tensor in tensors]
        values = np.fromfile(file, "<f4", sum(sizes))       # the weights come first in the file
        if len(values) != sum(sizes):
            raise ValueError(f"{file}: holds {len(values)} values, expected {sum(sizes)}")
        for tensor, part in zip(tensors, torch.from_numpy(values).split(sizes)):
            if tensor.dim() == 4:                           # stored with the channels last
                tensor = tensor.permute(2, 3, 1, 0)                             # (kh, kw, in, out)
            tensor.copy_(part.view(tensor.shape))
        return model

    def tensors_as_released(self):
        """The network's own tensors in the order in which the release stores their values."""
        layers = nn.Sequential(
            self.stem, *self.block1.path[:5], *self.block1.last_layers(),
            *self.block2.path[:5], self.side[0], *self.block2.last_layers(), self.side[1],
            *self.block3.path[:5], *self.block3.last_layers(), self.output)
        # all but the counters of batch norm, which are scalars
        return [tensor for tensor in layers.state_dict().values() if tensor.dim() > 0]


class Block(nn.Module):
    """Residual block: [1x1 unit, depthwise 3x3 unit] three times, plus a 1x1 unit on the input."""

    def __init__(self, channels, width):
        super().__init__()
        self.path = nn.Sequential()
        for inputs in (channels, width, width):
            self.path.extend([unit(inputs, width, 1), unit(width, width, 3, groups=width)])
        self.shortcut = unit(channels, width, 1)

    def forward(self, x):
        return self.path(x) + self.shortcut(x)                                  # (B, width, H, W)

    def last_layers(self):
        """The path's last unit and the shortcut, which the release stores interleaved."""
        last, shortcut = self.path[5], self.shortcut        # each: convolution, batch norm, Mish
        return last[0], shortcut[0], last[1], shortcut[1]


def unit(channels, width, size, groups=1):
    """Convolution -> batch norm -> Mish, height and width kept; depthwise with groups = width."""
    conv = nn.Conv2d(channels, width, size, padding=size // 2, groups=groups)
    return nn.Sequential(conv, nn.BatchNorm2d(width, eps=1e-3), nn.Mish())


def normalize(reflectance):
    """The network's input from L1C reflectance x 10,000, bands as BANDS: (..., 9) -> (..., 9)."""
    offset, scale = np.array([*BANDS.values()]).T                               # (9,) each
    values = (np.log(0.005 * np.asarray(reflectance) + 1) - offset) / scale
    return (1 / (1 + np.exp(1 - 5 * values))).astype(np.float32)                # (..., 9)


@torch.no_grad()
def classify(network, scenes):
    """The likeliest class of every pixel: scenes (T, H, W, 9) x 10,000 -> 0..8 (T, H, W)."""
    classes = []
    for scene in scenes:
        # a pixel without data (NaN) becomes what the convolutions see beyond the border: zeros
        x = torch.from_numpy(np.nan_to_num(normalize(scene))).permute(2, 0, 1)  # (9, H, W)
        classes.append(network(x[None])[0].argmax(0).numpy())                   # (H, W)
    return np.stack(classes)                                                    # (T, H, W)


def monthly(classes, clear, dates):
    """{month: shares of the 9 classes among its clear pixels and, last, the share that is clear}.

    classes, clear (T, H, W), dates (T,) -> (10,) each; NaN for a month without a clear pixel. The
    last row, "all", is the mean of the months: a cloudy month weighs as much as a clear one.
    """
    months, month_of = {}, dates.astype("datetime64[M]")
    for month in np.unique(month_of):
        at = month_of == month                                                  # (T,)
        seen = classes[at][clear[at]]                                           # (clear pixels,)
        counts = np.bincount(seen, minlength=len(CLASSES))                      # (9,)
        share = counts / len(seen) if len(seen) else np.full(len(CLASSES), np.nan)
        months[str(month)] = np.append(share, clear[at].mean())                 # (10,)
    rows = np.ma.masked_invalid([*months.values()])         # (months, 10), NaN left out of the mean
    return months | {"all": rows.mean(0).filled(np.nan)}


def read_scenes(folder):
    """Scenes by date from a folder's npz: dates (T,), scenes (T, H, W, 9), clear (T, H, W).

    Arrays as eo-learn names them: reflectance s2_l1c (T, H, W, K), s2_bands (K,), s2_dates (T,) and
    perhaps cloud masks clm (0 = clear) of ndvi_dates; a scene that has no mask counts as clear.
    Scenes come x 10,000, NaN without data. FileNotFoundError, or ValueError on what is not so.
    """
    paths = sorted(Path(folder).glob("*.npz"))
    if not paths:
        raise FileNotFoundError(f"{folder}: no file *.npz, expected one of dated scenes")
    path, arrays = paths[0], read_npz(paths[0])
    reflectance = take(arrays, path, "s2_l1c", ("T", "H", "W", "K"))
    T, H, W, K = reflectance.shape
    bands = take(arrays, path, "s2_bands", (K,), text=True)
    times = take(arrays, path, "s2_dates", (T,), text=True)
    if not set(BANDS) <= set(bands):
        raise ValueError(f"{path}: s2_bands is {bands}, expected {[*BANDS]} among them")
    scenes = 1e4 * reflectance[..., [bands.index(band) for band in BANDS]]      # (T, H, W, 9)
    clear = (scenes > -1).all(-1)                           # neither NaN nor a number that means it
    scenes[~clear] = np.nan
    if "clm" in arrays:
        mask_times = take(arrays, path, "ndvi_dates", ("U",), text=True)
        masks = take(arrays, path, "clm", (len(mask_times), H, W))
        for time, mask in zip(mask_times, masks):
            clear[np.array(times) == time] &= mask == 0     # the scene of that time, if any
    dates = np.array([to_date(time, path) for time in times], "datetime64[D]")
    order = np.argsort(dates, kind="stable")
    return dates[order], scenes[order], clear[order]


def read_npz(path):
    """{name: array} of an npz; ValueError if it is damaged or none."""
    try:
        with np.load(path) as arrays:
            return dict(arrays)
    except Exception as error:                              # a damaged file may raise anything
        raise ValueError(f"{path} is no npz, or damaged: {error}") from error


def take(arrays, path, name, shape, text=False):
    """arrays[name], as a list of strings if text; ValueError if it is not there or does not fit.

    shape: the length expected of every axis, or its letter where any will do.
    """
    if name not in arrays:
        raise ValueError(f"{path}: no array {name}, it has {[*arrays]}")
    values = arrays[name]
    fits = [isinstance(n, str) or n == length for n, length in zip(shape, values.shape)]
    if values.ndim != len(shape) or values.size == 0 or not all(fits):
        raise ValueError(f"{path}: {name} has the shape {values.shape}, expected {shape}")
    if text:
        return values.astype(str).tolist()
    if values.dtype.kind not in "biuf" or np.isinf(values).any():
        raise ValueError(f"{path}: {name} is {values.dtype} with text or infinities, not numbers")
    return values


def to_date(text, path):
    """The date that a time such as 2015-08-20T10:07:28 or 2015/08/20 begins with."""
    try:
        return date.fromisoformat(text[:10].replace("/", "-"))
    except ValueError:
        raise ValueError(f"{path}: s2_dates has '{text}', expected such as 2015-08-20") from None


def synthetic_scenes(rng, size=64):
    """A year of a lake, a wood and fields, a cloud in every month: what read_scenes returns."""
    water, trees, crops, soil, snow, cloud = np.array([     # reflectance in BANDS, (9,) each
        (0.09, 0.07, 0.05, 0.04, 0.03, 0.03, 0.03, 0.02, 0.01),    # water
        (0.08, 0.07, 0.04, 0.07, 0.20, 0.25, 0.27, 0.13, 0.06),    # trees
        (0.09, 0.10, 0.07, 0.13, 0.30, 0.38, 0.40, 0.22, 0.12),    # crops
        (0.12, 0.12, 0.14, 0.17, 0.20, 0.22, 0.24, 0.30, 0.25),    # soil
        (0.85, 0.85, 0.85, 0.84, 0.82, 0.80, 0.78, 0.12, 0.09),    # snow
        (0.55, 0.52, 0.52, 0.55, 0.58, 0.60, 0.60, 0.45, 0.35)])   # cloud
    dates = np.arange("2024-01", "2025-01", dtype="datetime64[M]").astype("datetime64[D]") + 14
    fields = np.stack([snow] * 2 + [soil] * 2 + [crops] * 5 + [soil] * 2 + [snow])      # (12, 9)
    rows, columns = np.indices((size, size)) / size                             # (H, W) each
    wood, lake = columns < 0.5, np.hypot(rows - 0.4, columns - 0.4) < 0.25      # (H, W)
    scenes = np.where(wood[..., None], trees, fields[:, None, None])            # (12, H, W, 9)
    scenes = np.where(lake[..., None], water, scenes)
    north, west = rng.random((2, 12, 1, 1))
    clear = np.hypot(rows - north, columns - west) > 0.3                        # (12, H, W)
    scenes = np.where(clear[..., None], scenes, cloud) * rng.uniform(0.9, 1.1, scenes.shape)
    return dates, 1e4 * scenes, clear


def print_months(title, months):
    """Print the rows of monthly() as a table."""
    print(f"{title:<24}" + "".join(f"{name[:11]:>12}" for name in (*CLASSES, "seen")))
    for month, shares in months.items():
        print(f"{month:<24}" + "".join(f"{share:>12.1%}" for share in shares))


def draw(path, months, dates, classes, clear):
    """Write a png: the rows of monthly() as bars, then a map of each scene's classes (T, H, W)."""
    try:
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from None
    rows = 1 + len(dates) // 6                              # of six panels, the bars are the first
    figure = Figure((18, 3 * rows + 0.5), layout="constrained")
    bars = figure.add_subplot(rows, 6, 1, title="share of clear pixels")
    shares = np.array([*months.values()]).T                                     # (10, months)
    for k, name in enumerate(CLASSES):
        bars.bar([*months], shares[k], bottom=shares[:k].sum(0), color=COLOURS[k], label=name)
    bars.tick_params(axis="x", rotation=90)
    for t, day in enumerate(dates):
        title = f"{day}, {clear[t].mean():.0%} clear"
        axis = figure.add_subplot(rows, 6, 2 + t, xticks=[], yticks=[], title=title)
        axis.imshow(classes[t], ListedColormap(COLOURS), vmin=0, vmax=8, interpolation="nearest")
    figure.legend(loc="outside lower center", ncols=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")         # renamed when whole: never half a file
    figure.savefig(temporary, format="png", dpi=80)
    temporary.replace(path)


def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("scenes", nargs="?", metavar="SCENES", help="folder of an npz of scenes")
    parser.add_argument("--weights", metavar="DIR", help="folder of the released weights")
    parser.add_argument("--plot", action="store_true", help="draw landcover.png (with matplotlib)")
    parser.add_argument("--out", default="out", help="folder that the figure goes to")
    o = parser.parse_args(argv)
    rng = np.random.default_rng(0)
    dates, scenes, clear = read_scenes(o.scenes) if o.scenes else synthetic_scenes(rng)
    if not o.scenes:
        print("no SCENES given: a synthetic year of a lake, a wood and fields")
    torch.manual_seed(0)
    network = DynamicWorld.from_release(o.weights) if o.weights else DynamicWorld().eval()
    if not o.weights:
        print("no --weights given: the network is initialised at random, its classes mean nothing")
    classes = classify(network, scenes)                                         # (T, H, W)
    measured = ~np.isnan(scenes[..., 0])                                        # (T, H, W)
    months = monthly(classes, clear, dates)
    print_months("clear pixels", months)
    print_months("all pixels, clouds too", monthly(classes, measured, dates))
    if o.plot:
        draw(Path(o.out, "landcover.png"), months, dates, classes, clear)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
