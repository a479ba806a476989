"""Maps from images: the height of each pixel, or its land cover, by U-Net and U-Net++.

    python -m applications.height                                       synthetic terrain
    python -m applications.height --task landcover --fold all --seeds 3
    python -m applications.height --data tiles:DIR --holdout pur        AlphaEarth and a DSM
    python -m applications.height --data s2:DIR --batch-size 16         Sentinel-2 scenes

Height from AlphaEarth's 64 embeddings of each 10 m pixel follows Hamoudzadeh et al. (arXiv
2602.17250). One scene is cut into blocks (see blocks.py for DIR); a network learns some of them,
with a margin in sight, and is tested on blocks whose map it never saw. The baseline `pixel` knows
each pixel by itself. Predictions and networks are written to out/height. StefaLand's encoder takes
no part in this.

Axes: N blocks, B pieces of them in a batch, C channels, K outputs, H and W pixels.
"""

import json
import math
import time
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from applications.blocks import MARGIN, load, split
from applications.common import PENALTIES, converge
from applications.dynamic_world import DynamicWorld
from data import check, command, folds, write_atomically
from eval import SCORINGS, class_metrics, mean_scores
from train import (apply_standardisation, descend, fit_standardisation, learning_rate, option,
                   parse, setup, tested_folds)


@dataclass
class Options:
    task: str = option("data", "height", "height (m) or landcover (classes)")
    data: str = option("data", "synthetic", "synthetic, tiles:DIR or s2:DIR")
    out: str = option("data", "out", "predictions and networks go to its folder height")
    holdout: str = option("hold-out", "pub", "pub (blocks here and there) or pur (a region)")
    folds: int = option("hold-out", 5, "number of folds", least=1)
    fold: str = option("hold-out", "0", "folds to test on, joined by commas, or all")
    buffer: int = option("hold-out", 2, "pixels at the edge of a block that are not learned from")
    model: str = option("model", "unet,unet++,pixel", "unet, unet++, dynamicworld, pixel")
    steps: int = option("training", 600, "optimiser steps", least=1)
    batch_size: int = option("training", 32, "pieces of blocks per step", least=1)
    lr: float = option("training", 2e-3, "peak learning rate")
    seeds: int = option("training", 1, "repetitions: other weights, validation blocks", least=1)
    seed: int = option("training", 0, "the first seed")
    device: str = option("training", "", "cuda, cpu …; empty: cuda if there is one")
    quick: bool = option("training", False, "the same path in under a minute, nothing learned")


class UNet(nn.Module):
    """U-Net (arXiv 1505.04597) or, nested, U-Net++ (1807.10165): (B, C, H, W) -> (B, K, H, W).

    Node i, j works on images 2^i times smaller. The nodes i, 0 are the way down. Any other reads
    all earlier nodes of its level, i, 0 to i, j-1, and, twice as large, the node i+1, j-1 below.
    U-Net has only those of the way up, i + j = depth - 1; U-Net++ has all that lie between, too.
    """

    def __init__(self, in_channels, out_channels, nested=False, width=16, depth=4):
        super().__init__()
        self.depth, self.places, self.nodes = depth, [], nn.ModuleList()
        channels = [width * 2 ** i for i in range(depth)]   # of the nodes of level i
        for j in range(depth):
            for i in range(depth - j):
                if j == 0:
                    read = channels[i - 1] if i > 0 else in_channels
                elif nested or i + j == depth - 1:
                    # the earlier nodes of its level, U-Net has but one, and the node below
                    read = (j if nested else 1) * channels[i] + channels[i + 1]
                else:
                    continue
                self.places.append((i, j))
                self.nodes.append(two_convolutions(read, channels[i]))
        self.output = nn.Conv2d(width, out_channels, 1)

    def forward(self, x):
        """ValueError unless H and W are multiples of 2^(depth - 1)."""
        (H, W), stride = x.shape[-2:], 2 ** (self.depth - 1)
        check(H % stride == W % stride == 0, f"an image of {H} x {W}, not multiples of {stride}")
        levels = [[] for _ in range(self.depth)]            # what the nodes of each level gave
        for (i, j), node in zip(self.places, self.nodes):
            if j > 0:
                below = F.interpolate(levels[i + 1][-1], scale_factor=2, mode="bilinear")
                x = torch.cat([*levels[i], below], 1)
            elif i > 0:
                x = F.max_pool2d(levels[i - 1][0], 2)
            levels[i].append(node(x))                       # (B, channels[i], H / 2^i, W / 2^i)
        return self.output(levels[0][-1])                                       # (B, K, H, W)


def two_convolutions(channels, width):
    """Twice 3x3 convolution, group norm, GELU: (B, channels, H, W) -> (B, width, H, W)."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(8, width), nn.GELU(),
        nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.GELU())


MODELS = {  # channels C and outputs K -> network
    "unet": UNet,
    "unet++": partial(UNet, nested=True),
    "dynamicworld": DynamicWorld,           # the network alone, its weights are random
    "pixel": partial(nn.Conv2d, kernel_size=1),     # linear or logistic regression of each pixel
}


class Height:
    """Metres: squared error of heights standardised with mean and spread of the training blocks."""
    outputs, scoring = 1, "value"           # eval's: R2; rmse, median difference and NMAD in m

    def __init__(self, target, training):
        self.centre = float(np.nanmean(target[training]))
        self.spread = float(np.nanstd(target[training]))

    def loss(self, output, truth):
        """Of each pixel: (B, 1, H, W), (B, H, W) -> (B, H, W)."""
        return F.mse_loss(output[:, 0], (truth - self.centre) / self.spread, reduction="none")

    def decide(self, output):
        """The map, m: (B, 1, H, W) -> (B, H, W)."""
        return output[:, 0] * self.spread + self.centre


class LandCover:
    """Classes 0, 1, 2 …: cross-entropy weighted by how rare a class is in the training blocks."""
    scoring = "class map"

    def __init__(self, target, training):
        known = target[training][~np.isnan(target[training])].astype(int)       # (pixels,)
        self.outputs = int(np.nanmax(target)) + 1
        count = torch.from_numpy(known).bincount(minlength=self.outputs)        # (K,)
        self.rarity = len(known) / count.clamp(min=1) / self.outputs

    def loss(self, output, truth):
        """Of each pixel: (B, K, H, W), (B, H, W) -> (B, H, W)."""
        return F.cross_entropy(output, truth.long(), self.rarity.to(output.device),
                               reduction="none")

    def decide(self, output):
        """The map, the likeliest class: (B, K, H, W) -> (B, H, W)."""
        return output.argmax(1)


def class_map_scores(obs, sim):
    """Balanced accuracy (mean recall of the classes), accuracy, and F1 of each class observed."""
    known = ~np.isnan(obs)
    obs, sim = obs[known], sim[known]
    each = {int(k): class_metrics(obs == k, sim == k) for k in np.unique(obs)}
    result = {"balanced": np.mean([scores["recall"] for scores in each.values()]),
              "accuracy": np.mean(obs == sim)}
    return result | {f"f1 {k}": scores["f1"] for k, scores in each.items()}


SCORINGS["class map"] = class_map_scores    # the first score is the one to stop early by
TASKS = {"height": Height, "landcover": LandCover}


def crop(target, image, buffer, rng, size=32):
    """A random piece of maps (B, H, W) and images (B, C, H, W), turned and flipped together.

    Pixels within `buffer` of the edge of their block become NaN: what lies on its other side looks
    nearly the same, and may be in a test block.
    """
    both = torch.cat([inner(target, buffer)[:, None], image], 1)                # (B, 1+C, H, W)
    i, j = rng.integers(image.shape[-1] - size + 1, size=2)
    both = both[..., i:i + size, j:j + size].rot90(rng.integers(4), (2, 3))
    if rng.random() < 0.5:
        both = both.flip(2)
    return both[:, 0], both[:, 1:]                          # (B, size, size), (B, C, size, size)


def inner(target, buffer):
    """Maps (B, H, W) of which only what is `buffer` pixels inside the blocks is known."""
    result, inside = torch.full_like(target, math.nan), slice(MARGIN + buffer, -MARGIN - buffer)
    result[:, inside, inside] = target[:, inside, inside]
    return result


@torch.no_grad()
def predict(model, task, image):
    """Maps by the mean output of four turns of each image: (N, C, H, W) -> (N, H, W)."""
    model.eval()
    maps, device = [], next(model.parameters()).device
    for part in np.array_split(image, len(image) // 128 + 1):
        x = torch.from_numpy(part).to(device)                                   # (B, C, H, W)
        turns = [model(x.rot90(k, (2, 3))).rot90(-k, (2, 3)) for k in range(4)]
        maps.append(task.decide(torch.stack(turns).mean(0)).cpu().numpy())
    return np.concatenate(maps)


def fit(o, model, task, training, validation, rng):
    """Train; keep the weights with the best first score at the validation blocks, looked at ten
    times. Returns that score."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), o.lr, weight_decay=1e-2)
    best, kept = math.nan, None
    for step in range(o.steps):
        model.train()
        i = rng.choice(len(training.ids), o.batch_size)
        target, image = torch.from_numpy(training.target[i]), torch.from_numpy(training.image[i])
        target, image = crop(target, image, o.buffer, rng)  # (B, 32, 32), (B, C, 32, 32)
        known = ~target.isnan()
        if not known.any():                                 # few labels, and none in these
            continue
        error = task.loss(model(image.to(device)), target.nan_to_num().to(device))
        loss = error[known.to(device)].mean()
        descend(optimizer, loss, o.lr * learning_rate(step / o.steps), clip=1.0,
                where=f"step {step} of {o.task}")
        if (step + 1) % max(o.steps // 10, 1) == 0:         # early stopping
            sim = predict(model, task, validation.image)                        # (n, H, W)
            scores = SCORINGS[task.scoring](validation.target, sim)
            score = next(iter(scores.values()))
            if kept is None or math.isnan(best) or score > best:
                best, kept = score, {k: x.clone() for k, x in model.state_dict().items()}
    model.load_state_dict(kept)
    return best


def fit_pixels(o, model, task, training, validation, rng):
    """In place of fit, for `pixel`: its weights are solved for, with the penalty that is best at
    the validation blocks."""
    target = inner(torch.from_numpy(training.target), o.buffer)                 # (n, H, W)
    known = ~target.isnan()
    x = torch.from_numpy(training.image).movedim(1, -1)[known]                  # (pixels, C)
    y = target[known][:, None, None]                                            # (pixels, 1, 1)

    def loss(output):
        return task.loss(output.float()[..., None, None], y).mean()
    best, kept = math.nan, None
    for penalty in PENALTIES:
        weights, constants = converge(x, loss, task.outputs, penalty)
        model.load_state_dict({"weight": weights.T[..., None, None], "bias": constants})
        scores = SCORINGS[task.scoring](validation.target, predict(model, task, validation.image))
        score = next(iter(scores.values()))
        if kept is None or math.isnan(best) or score > best:
            best, kept = score, (weights, constants)
    model.load_state_dict({"weight": kept[0].T[..., None, None], "bias": kept[1]})
    return best


FITS = {"pixel": fit_pixels}                                # all others: fit


def run(o, name, blocks, fold_of, fold, seed):
    """Train one network with one fold held out, print its scores, write its maps and its weights.

    Returns what the npz holds: fold, seed, scoring, and of the n test blocks `ids` (n,), target
    `obs` and map `sim` (n, 20, 20). The .pt beside it has weights and standardisation.
    """
    began, rng = time.time(), np.random.default_rng([seed, fold])
    torch.manual_seed(seed)
    training, validation, test = split(blocks, fold_of, fold, rng)
    image = np.moveaxis(blocks.image, 1, -1)                                    # (N, H, W, C)
    scaling = fit_standardisation(image[training])
    image = np.moveaxis(apply_standardisation(image, scaling), -1, 1)           # (N, C, H, W)
    blocks = replace(blocks, image=np.ascontiguousarray(image))
    task = TASKS[o.task](blocks.target, training)
    left = inner(torch.from_numpy(blocks.target[training]), o.buffer)
    check(not left.isnan().all(), f"--buffer {o.buffer} leaves no pixel to learn from")
    model = MODELS[name](image.shape[1], task.outputs).to(setup(o.device)[2])
    best = FITS.get(name, fit)(o, model, task, blocks.take(training), blocks.take(validation), rng)

    maps = predict(model, task, blocks.image)                                   # (N, H, W)
    line = f"fold {fold} seed {seed} {name:<12} {len(training)} + {len(validation)} blocks, "
    line += f"validation {best:.3f}"
    for area, at in (("test", test), ("training", training)):
        scores = SCORINGS[task.scoring](blocks.target[at], maps[at])
        line += f"; {area} " + ", ".join(f"{key} {score:.3f}" for key, score in scores.items())
    print(f"{line}; {time.time() - began:.0f} s", flush=True)

    inside = slice(MARGIN, -MARGIN)
    result = dict(about=json.dumps(vars(o)), fold=fold, seed=seed, scoring=task.scoring,
                  ids=blocks.ids[test], obs=blocks.target[test][:, inside, inside],
                  sim=maps[test][:, inside, inside])
    saved = dict(model=name, scaling=scaling, task=vars(task), weights=model.state_dict())
    setting = f"{o.task} {o.data.partition(':')[0]} {o.holdout}{o.folds}"
    path = Path(o.out, "height", f"{setting}, {name}, fold {fold}, seed {seed}.npz")
    write_atomically(path, lambda file: np.savez_compressed(file, **result))
    write_atomically(path.with_suffix(".pt"), lambda file: torch.save(saved, file))
    return result


def table(runs):
    """Print each network's scores over all test pixels ± standard error over the folds.

    runs: {name: what run() gave for each seed and fold}.
    """
    for name, of_model in runs.items():
        folds = sorted({run["fold"] for run in of_model})
        of_folds = [mean_scores([run for run in of_model if run["fold"] == k]) for k in folds]
        line = f"{name:<12}"
        for key, score in mean_scores(of_model).items():
            line += f"  {key} {score:.3f}"
            if len(folds) > 1:                              # a class may be absent from a fold
                spread = np.nanstd([scores.get(key, math.nan) for scores in of_folds])
                line += f" ± {spread / math.sqrt(len(folds) - 1):.3f}"
        print(line)


def main(argv=None):
    o = parse(Options, __doc__, argv)
    check(o.task in TASKS, f"--task {o.task}: expected one of {', '.join(TASKS)}")
    names = o.model.split(",")
    for name in names:
        check(name in MODELS, f"--model {name}: expected one of {', '.join(MODELS)}")
    Path(o.out, "height").mkdir(parents=True, exist_ok=True)    # or fail now, not after training
    if o.quick:
        o.steps, o.batch_size = min(o.steps, 10), 8
    blocks = load(o.data, o.task)
    fold_of = folds(blocks, o.holdout, o.folds)
    tested = tested_folds(o)
    runs = {name: [] for name in names}
    for seed, fold, name in product(range(o.seed, o.seed + o.seeds), tested, names):
        runs[name].append(run(o, name, blocks, fold_of, fold, seed))
    print(f"\n{o.task}, {o.data}: {len(tested)} {o.holdout} folds at once, mean of {o.seeds} seeds")
    table(runs)


if __name__ == "__main__":
    command(main)
