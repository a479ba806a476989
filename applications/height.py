"""Maps from images: the height of each pixel, or its land cover, by U-Net and U-Net++.

    python -m applications.height                                       synthetic terrain
    python -m applications.height --task landcover --fold all --seeds 3
    python -m applications.height --data tiles:DIR --holdout pur        AlphaEarth and a DSM
    python -m applications.height --data s2:DIR --batch-size 16         Sentinel-2 scenes

Height from AlphaEarth's 64 embeddings of each 10 m pixel follows Hamoudzadeh et al. (arXiv
2602.17250). One scene is cut into blocks (see blocks.py for DIR); a network learns some of them,
with a margin in sight, and is tested on blocks whose map it never saw: blocks here and there (pub)
or a region (pur). The baseline `pixel`, linear or logistic regression, knows each pixel by itself.
Maps and networks are written to OUT/height. StefaLand's encoder takes no part in this.

Axes: N blocks, B pieces of them in a batch, C channels, K outputs, H and W pixels.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn.functional import cross_entropy, interpolate, max_pool2d, mse_loss

from applications.blocks import MARGIN, SIZE, load, split
from applications.common import PENALTIES, converge
from applications.dynamic_world import DynamicWorld
from applications.values import class_metrics, value_scores
from data import check, command, folds, write_atomically
from finetune import tested_folds
from train import (apply_standardisation, autocast, descend, fit_standardisation, learning_rate,
                   save, shared_options)


class UNet(nn.Module):
    """U-Net (arXiv 1505.04597) or, nested, U-Net++ (1807.10165): (B, C, H, W) -> (B, K, H, W).

    On level i images are 2^i times smaller. A node of the way up reads what the nodes of its level
    gave so far and, twice as large, the latest of the level below. U-Net has one of them a level;
    U-Net++ has more on the higher levels, between the way down and the last.
    """

    def __init__(self, in_channels, out_channels, nested=False, width=16, depth=4):
        super().__init__()
        channels = [width * 2 ** i for i in range(depth)]   # of each level
        self.down = nn.ModuleList(map(two_convolutions, [in_channels, *channels[:-1]], channels))
        self.up = nn.ModuleDict()
        for j in range(1, depth):                           # the j-th node of the levels 0, 1 …
            for i in range(depth - j):
                if nested or i + j == depth - 1:
                    own = channels[i] * (j if nested else 1)
                    self.up[f"{i} {j}"] = two_convolutions(own + channels[i + 1], channels[i])
        self.output = nn.Conv2d(width, out_channels, 1)

    def forward(self, x):
        levels = []                                         # what the nodes of each level gave
        for i, node in enumerate(self.down):
            x = node(max_pool2d(x, 2) if i > 0 else x)      # (B, channels[i], H / 2^i, W / 2^i)
            levels.append([x])
        for place, node in self.up.items():
            level, below = levels[int(place[0])], levels[int(place[0]) + 1][-1]
            below = interpolate(below, level[0].shape[-2:], mode="bilinear")
            level.append(node(torch.cat([*level, below], 1)))
        return self.output(levels[0][-1])                                       # (B, K, H, W)


def two_convolutions(channels, width):
    """Twice 3x3 convolution, group norm, GELU: (B, channels, H, W) -> (B, width, H, W)."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(8, width), nn.GELU(),
        nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.GELU())


# channels C and outputs K -> network; of Dynamic World's the weights are random here
MODELS = {"unet": UNet, "unet++": partial(UNet, nested=True), "dynamicworld": DynamicWorld,
          "pixel": partial(nn.Conv2d, kernel_size=1)}


class Height:
    """Metres: squared error of heights standardised with mean and spread of the training blocks."""
    outputs, scores = 1, staticmethod(value_scores)     # R2; rmse, median difference, NMAD in m

    def __init__(self, target, training):
        self.centre = float(np.nanmean(target[training]))
        self.spread = float(np.nanstd(target[training]))

    def loss(self, output, truth):
        """Of each pixel: (B, 1, H, W), (B, H, W) -> (B, H, W)."""
        return mse_loss(output[:, 0], (truth - self.centre) / self.spread, reduction="none")

    def decide(self, output):
        """The map, m: (B, 1, H, W) -> (B, H, W)."""
        return output[:, 0] * self.spread + self.centre


class LandCover:
    """Classes 0, 1, 2 …: cross-entropy weighted by how rare a class is in the training blocks."""

    def __init__(self, target, training):
        known = target[training][~np.isnan(target[training])].astype(int)       # (pixels,)
        self.outputs = int(np.nanmax(target)) + 1
        count = torch.from_numpy(known).bincount(minlength=self.outputs)        # (K,)
        self.rarity = len(known) / count.clamp(min=1) / self.outputs

    def loss(self, output, truth):
        """Of each pixel: (B, K, H, W), (B, H, W) -> (B, H, W)."""
        return cross_entropy(output, truth.long(), self.rarity.to(output.device), reduction="none")

    def decide(self, output):
        """The map, the likeliest class: (B, K, H, W) -> (B, H, W)."""
        return output.argmax(1)

    @staticmethod
    def scores(obs, sim):
        """Balanced accuracy (mean recall of the classes), accuracy, F1 of each class observed."""
        obs, sim = obs[~np.isnan(obs)], sim[~np.isnan(obs)]
        each = {int(k): class_metrics(obs == k, sim == k) for k in np.unique(obs)}
        recall, accuracy = [of_class["recall"] for of_class in each.values()], np.mean(obs == sim)
        f1 = {f"f1 {k}": of_class["f1"] for k, of_class in each.items()}
        return {"balanced": np.mean(recall), "accuracy": accuracy} | f1


TASKS = {"height": Height, "landcover": LandCover}          # of the best first score is kept
# what is not learned from: the margin and 2 pixels within, as those beyond them look the same
EDGE = np.pad(np.zeros((SIZE - 4, SIZE - 4), bool), MARGIN + 2, constant_values=True)   # (H, W)


def crop(target, image, rng, size=32):
    """A random piece of maps (B, H, W) and images (B, C, H, W), turned and flipped together."""
    both = torch.cat([target[:, None], image], 1)                               # (B, 1+C, H, W)
    i, j = rng.integers(image.shape[-1] - size + 1, size=2)
    both = both[..., i:i + size, j:j + size].rot90(rng.integers(4), (2, 3))
    both = both.flip(2) if rng.random() < 0.5 else both
    return both[:, 0], both[:, 1:]                          # (B, size, size), (B, C, size, size)


@torch.no_grad()
def predict(model, task, image):
    """Maps by the mean output of four turns of each image: (N, C, H, W) -> array (N, H, W)."""
    maps, device = [], next(model.eval().parameters()).device
    for part in image.tensor_split(len(image) // 128 + 1):
        x = part.to(device)                                                     # (B, C, H, W)
        turns = [model(x.rot90(k, (2, 3))).rot90(-k, (2, 3)) for k in range(4)]
        maps.append(task.decide(torch.stack(turns).mean(0)).cpu().numpy())
    return np.concatenate(maps)


def fit(o, model, task, images, targets, rng):
    """Train on images (n, C, H, W) and their maps (n, H, W); yields ten times, when the weights are
    worth a look."""
    optimizer = torch.optim.AdamW(model.parameters(), o.lr, weight_decay=1e-2)
    for step in range(o.steps):
        i = rng.choice(len(images), o.batch_size)
        target, image = crop(targets[i].to(o.device), images[i].to(o.device), rng)
        known = ~target.isnan()                                                 # (B, 32, 32)
        if known.any():                                     # labels may be few
            with autocast(target.device, o.dtype):
                output = model.train()(image)                                   # (B, K, 32, 32)
            loss = task.loss(output.float(), target.nan_to_num())[known].mean()
            descend(optimizer, loss, o.lr * learning_rate(step / o.steps), clip=1.0)
        if (step + 1) % max(o.steps // 10, 1) == 0:
            yield


def solve(o, model, task, images, targets, rng):
    """In place of fit, for `pixel`: solves for the weights; yields after each penalty."""
    known = ~targets.isnan()                                                    # (n, H, W)
    x, y = images.movedim(1, -1)[known], targets[known]                         # (pixels, C)

    def loss(output):
        return task.loss(output.float()[..., None, None], y[:, None, None]).mean()
    for penalty in PENALTIES:
        weights, constants = converge(x, loss, task.outputs, penalty)
        model.load_state_dict({"weight": weights.T[..., None, None], "bias": constants})
        yield


def run(o, name, blocks, fold_of, fold, seed):
    """Train one network with one fold held out, print its scores, write its maps and its weights.

    Returns truth and map of the n test blocks, (2, n, 20, 20). The npz has `ids` (n,), `obs` and
    `sim` (n, 20, 20); the .pt beside it weights, standardisation and options.
    """
    rng = np.random.default_rng([seed, fold])
    torch.manual_seed(seed)
    training, validation, test = split(blocks, fold_of, fold, rng)
    image = np.moveaxis(blocks.image, 1, -1)                                    # (N, H, W, C)
    scaling = fit_standardisation(image[training])
    image = torch.from_numpy(apply_standardisation(image, scaling)).movedim(-1, 1).contiguous()
    task = TASKS[o.task](blocks.target, training)
    target = torch.from_numpy(np.where(EDGE, np.float32(np.nan), blocks.target[training]))
    model = MODELS[name](image.shape[1], task.outputs).to(o.device)
    learn, best, kept = solve if name == "pixel" else fit, -np.inf, model.state_dict()
    for _ in learn(o, model, task, image[training], target, rng):
        scores = task.scores(blocks.target[validation], predict(model, task, image[validation]))
        score = np.nan_to_num(next(iter(scores.values())), nan=-1e9)            # the first counts
        if score > best:
            best, kept = score, {key: x.clone() for key, x in model.state_dict().items()}
    model.load_state_dict(kept)

    setting = f"{o.task} {o.data.partition(':')[0]} {o.holdout}{o.folds}, {name}"
    path = Path(o.out, "height", f"{setting}, fold {fold}, seed {seed}.npz")
    print(f"{path.stem}: {len(training)} + {len(validation)} blocks, validation {best:.3f}")
    inside = slice(MARGIN, -MARGIN)
    obs, sim = blocks.target[:, inside, inside], predict(model, task, image)[:, inside, inside]
    for area, at in (("test", test), ("training", training)):
        scores = task.scores(obs[at], sim[at])
        print(f"  {area}: " + ", ".join(f"{key} {score:.3f}" for key, score in scores.items()))
    arrays = dict(ids=blocks.ids[test], obs=obs[test], sim=sim[test])
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))
    save(path.with_suffix(".pt"), model=name, options=vars(o), scaling=scaling, task=vars(task),
         weights=kept)
    return np.stack([obs[test], sim[test]])


def row(name, runs, scores):
    """A line of scores of all test pixels ± standard error over folds; runs[seed][fold]: run()."""
    line, of_folds = f"{name:<12}", [[scores(*maps) for maps in of_seed] for of_seed in runs]
    pooled = [scores(*np.concatenate(of_seed, 1)) for of_seed in runs]          # a dict a seed
    for key in pooled[0]:
        line += f"  {key} {np.mean([of_seed[key] for of_seed in pooled]):.3f}"
        if len(runs[0]) > 1:                                # a class may be absent from a fold
            table = [[scored.get(key, np.nan) for scored in of_seed] for of_seed in of_folds]
            line += f" ± {np.nanstd(np.mean(table, 0)) / (len(runs[0]) - 1) ** 0.5:.3f}"
    return line


def main(argv=None):
    parser = shared_options(__doc__, steps=600, batch_size=32, lr=2e-3, dtype="float32")
    parser.add_argument("--task", default="height", choices=TASKS, help="height, m, or classes")
    parser.add_argument("--model", default="unet,unet++,pixel", help=f"some of {', '.join(MODELS)}")
    parser.add_argument("--fold", default="0", help="folds to test on: 0,1 or all")
    parser.add_argument("--seeds", type=int, default=1, help="repetitions with other weights [1]")
    o = parser.parse_args(argv)
    names, tested, rows = o.model.split(","), tested_folds(o), []
    check({*names} <= {*MODELS}, f"--model {o.model}: expected some of {', '.join(MODELS)}")
    if o.quick:
        o.steps, o.batch_size = min(o.steps, 10), 8
    blocks = load(o.data, o.task)
    fold_of, seeds = folds(blocks, o.holdout, o.folds), range(o.seed, o.seed + o.seeds)
    for name in names:
        runs = [[run(o, name, blocks, fold_of, fold, seed) for fold in tested] for seed in seeds]
        rows.append(row(name, runs, TASKS[o.task].scores))
    print(f"\n{o.task}, {o.data}: {len(tested)} {o.holdout} folds at once, mean of {o.seeds} seeds")
    print("\n".join(rows))


if __name__ == "__main__":
    command(main)
