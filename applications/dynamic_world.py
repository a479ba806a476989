"""Dynamic World: what covers the land, nine classes from a Sentinel-2 scene, month by month.

    python -m applications.dynamic_world                                    a synthetic year
    python -m applications.dynamic_world SCENES --weights DIR --plot        real scenes, a figure
    python -m applications.dynamic_world SCENES --weights DIR --offset -0.1     of 2022 and later

SCENES is a folder with an npz of dated scenes (see read_scenes). Since January 2022 (processing
baseline 04.00) the numbers of Sentinel-2 products are 1,000 higher than before, reflectance 0.1:
--offset -0.1 takes that off, unless it was done already, as in harmonised collections. DIR is the
folder model/forward of github.com/google/dynamicworld (Apache-2.0), of which variables/ is enough;
without it the network is initialised at random. Printed are the shares of the classes by month, for
clear pixels and, for comparison, for all of them: the network takes clouds for snow and crops.
--plot draws OUT/landcover.png. Network and normalisation: Brown et al. 2022, doi
10.1038/s41597-022-01307-4.

This file needs torch and numpy only (matplotlib for --plot) and can be copied alone:

    network = DynamicWorld.from_release(DIR)                # (B, 9, H, W) -> logits (B, 9, H, W)
    x = torch.from_numpy(normalize(reflectance))            # (H, W, 9), reflectance x 10,000
    classes = network(x.permute(2, 0, 1)[None]).argmax(1)   # (1, H, W), numbered as CLASSES

Axes: B scenes in a batch, T dates, H W pixels, 9 bands or classes.
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

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
        x = nn.functional.interpolate(x, (H // 2, W // 2), mode="bilinear", antialias=True)
        x = torch.cat([self.block2(self.block1(x)), self.side(x)], 1)           # (B, 192, H/2, W/2)
        x = nn.functional.interpolate(self.block3(x), (H, W), mode="bilinear")     # (B, 144, H, W)
        return self.output(nn.functional.normalize(x, dim=1))                   # (B, 9, H, W)

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
        check(len(values) == sum(sizes), f"{file}: {len(values)} values, expected {sum(sizes)}")
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
    # a pixel without data (NaN) becomes what the convolutions see beyond the border: zeros
    images = [torch.from_numpy(np.nan_to_num(normalize(scene))) for scene in scenes]    # (H, W, 9)
    return torch.cat([network(x.permute(2, 0, 1)[None]).argmax(1) for x in images]).numpy()


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


def read_scenes(folder, offset=0.0):
    """Scenes by date from a folder's npz: dates (T,), scenes (T, H, W, 9), clear (T, H, W).

    Arrays as eo-learn names them: reflectance s2_l1c (T, H, W, K), s2_bands (K,), s2_dates (T,) and
    perhaps cloud masks clm (U, H, W), 0 = clear, of ndvi_dates (U,). Scenes come x 10,000, NaN
    where nothing was seen: NaN, infinite, negative, or 0 in all bands. `offset` is added to the
    reflectance. FileNotFoundError, or ValueError on what is not so.
    """
    path = min(Path(folder).glob("*.npz"), default=None)    # the first by name
    check(path, f"{folder}: no file *.npz, expected one of dated scenes", FileNotFoundError)
    try:
        arrays = dict(np.load(path))
    except Exception as error:                              # a damaged file may raise anything
        raise ValueError(f"{path} is no npz, or damaged: {error}") from None
    wanted = ["s2_l1c", "s2_bands", "s2_dates"]
    check({*wanted} <= {*arrays}, f"{path}: the arrays {[*arrays]}, expected {wanted} among them")
    x, bands, times = [arrays[name] for name in wanted]
    check(x.dtype.kind in "iuf" and x.ndim == 4 and x.shape[::3] == times.shape + bands.shape,
          f"{path}: s2_l1c holds {x.dtype} {x.shape}, s2_bands {bands.shape}, s2_dates "
          f"{times.shape}; expected numbers (T, H, W, K), (K,) and (T,)")
    bands, times = bands.astype(str).tolist(), to_times(times, f"{path}: s2_dates")
    check({*BANDS} <= {*bands}, f"{path}: s2_bands is {bands}, expected {[*BANDS]} among them")
    x = x[..., [bands.index(band) for band in BANDS]]                           # (T, H, W, 9)
    seen = (np.isfinite(x) & (x > -1e-4)).all(-1) & (x != 0).any(-1)            # (T, H, W)
    check(seen.any(), f"{path}: s2_l1c has no pixel that is neither 0, nor negative, nor NaN")
    check(np.median(x[seen]) <= 2, f"{path}: the median of s2_l1c is {np.median(x[seen]):g}, that "
          "of digital numbers; expected reflectance: divide by 10,000")
    scenes = 1e4 * np.where(seen[..., None], np.maximum(x + offset, 0), np.nan)
    clear = seen & ~cloudy(arrays, path, times, x.shape[1:3])
    order = np.argsort(times, kind="stable")
    return times[order].astype("datetime64[D]"), scenes[order], clear[order]


def cloudy(arrays, path, times, size):
    """Where a mask shows clouds in the scenes of these times: (T, H, W).

    A mask belongs to the scene of the same second, or of the same day if either is a date alone.
    Printed is how many scenes and masks have no match, and the first three.
    """
    mask_times, masks = times[:0], np.zeros((0, *size))                         # (U,), (U, H, W)
    if "clm" in arrays:
        masks = arrays["clm"]
        mask_times = to_times(arrays.get("ndvi_dates", mask_times), f"{path}: ndvi_dates")
    check(masks.shape == (len(mask_times), *size), f"{path}: clm has the shape {masks.shape}, "
          f"expected {(len(mask_times), *size)} as ndvi_dates and scenes have")
    days, mask_days = times.astype("datetime64[D]"), mask_times.astype("datetime64[D]")
    date_alone = (times == days)[:, None] | (mask_times == mask_days)           # midnight, (T, U)
    match = (times[:, None] == mask_times) | (days[:, None] == mask_days) & date_alone
    unmasked, unused = times[~match.any(1)], mask_times[~match.any(0)]
    print(f"{path}: {len(unmasked)} of {len(times)} scenes without a cloud mask, taken as clear "
          f"{unmasked[:3]}; {len(unused)} of {len(masks)} masks without a scene {unused[:3]}")
    return np.stack([(masks[of_scene] != 0).any(0) for of_scene in match])


def to_times(values, where):
    """Times as texts or as datetime64, (n,), with or without Z -> datetime64[s] (n,), all UTC."""
    texts = [text.replace("/", "-").removesuffix("Z") for text in values.astype(str).ravel()]
    try:
        for text in texts:
            check(text[4:8:3] == "--", f"no date in '{text}'")
        return np.array(texts, "datetime64[s]")             # whole seconds
    except ValueError as error:
        raise ValueError(f"{where}: {error}, expected 2015-08-20T10:07:28 or 2015-08-20") from None


def check(fine, complaint, error=ValueError):
    """Raise error(complaint) unless all is fine."""
    if not fine:
        raise error(complaint)


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
    north, west = rng.random((2, 12, 1, 1))
    clear = np.hypot(rows - north, columns - west) > 0.3                        # (12, H, W)
    scenes = np.select([~clear[..., None], lake[..., None], wood[..., None]],
                       [cloud, water, trees], fields[:, None, None])            # (12, H, W, 9)
    return dates, 1e4 * (scenes * rng.uniform(0.9, 1.1, scenes.shape)), clear


def print_months(title, months):
    """Print the rows of monthly() as a table."""
    print(f"{title:<24}" + "".join(f"{name[:11]:>12}" for name in (*CLASSES, "seen")))
    for month, shares in months.items():
        print(f"{month:<24}" + "".join(f"{share:>12.1%}" for share in shares))


def draw(path, months, dates, classes, clear):
    """Write a png: the rows of monthly() as bars, then a map of each scene's classes (T, H, W)."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    rows = 1 + len(dates) // 6                              # of six panels, the bars are the first
    figure = Figure((18, 3 * rows + 0.5), layout="constrained")
    bars = figure.add_subplot(rows, 6, 1, title="share of clear pixels")
    shares = np.array([*months.values()]).T                                     # (10, months)
    for k, name in enumerate(CLASSES):
        bars.barh([*months], shares[k], left=shares[:k].sum(0), color=COLOURS[k], label=name)
    for t, day in enumerate(dates):
        axis = figure.add_subplot(rows, 6, 2 + t, title=f"{day}, {clear[t].mean():.0%} clear")
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
    parser.add_argument("--offset", type=float, default=0, help="added to reflectance: 0 or -0.1")
    parser.add_argument("--plot", action="store_true", help="draw landcover.png (with matplotlib)")
    parser.add_argument("--out", default="out", help="folder that the figure goes to [out]")
    o = parser.parse_args(argv)
    check(-1 < o.offset <= 0, f"--offset {o.offset:g}: expected 0 or -0.1")
    print("scenes: ", o.scenes or "a synthetic year of a lake, a wood and fields")
    print("weights:", o.weights or "none, the network is initialised at random: no class is right")
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    dates, scenes, clear = read_scenes(o.scenes, o.offset) if o.scenes else synthetic_scenes(rng)
    network = DynamicWorld.from_release(o.weights) if o.weights else DynamicWorld().eval()
    classes = classify(network, scenes)                                         # (T, H, W)
    months = monthly(classes, clear, dates)
    print_months("clear pixels", months)
    print_months("all pixels, clouds too", monthly(classes, ~np.isnan(scenes[..., 0]), dates))
    if o.plot:
        draw(Path(o.out, "landcover.png"), months, dates, classes, clear)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:     # of matplotlib
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
