"""Predict at sites without observations: frozen encoder, residual adapter, small head.

    python train.py && python finetune.py               streamflow: resconn and the LSTM, one fold
    python finetune.py --task soil                      or one of the other TASKS below
    python finetune.py --model resconn,lstm --labelled 60 --seeds 3 --fold all
    python finetune.py --data caravan:DIR --checkpoint out/pub{fold}/pretrained.pt --fold all
    python eval.py                                      the table over all runs

r_t = linear(conv1d(weather_t)); h = LSTM(E_t + r_t); y_t = linear(h_t), E_t from the encoder. No
site of the test fold is trained on, nor may the checkpoint have seen it. A run whose file is under
out/runs, with the same settings, is not repeated.
"""

import json
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
from eval import skill
from model import Dropout, DynamicWorld, StefaLand, UNet
from train import (Windows, day_slice, descend, fit_scaling, learning_rate, load_checkpoint,
                   option, parse, scale, setup, tile)


@dataclass
class Options:
    task: str = option("streamflow",
                       "one of streamflow, soil_moisture, soil, landslide, landcover, height")
    data: str = option("synthetic", "synthetic, or sources: caravan:DIR,camels:DIR")
    model: str = option("", "variants, joined by commas; empty: resconn and the task's baselines")
    target: str = option("clay", "what --task soil predicts: clay, silt, sand, another attribute")
    vectors: str = option("", "AlphaEarth vectors, csv or npz, for --model alphaearth")
    checkpoint: str = option("", "pretrained weights, {fold} = the fold; empty: those in --out")
    out: str = option("out", "folder of checkpoint, cache and runs")
    holdout: str = option("pub", "pub (random sites) or pur (regions)")
    folds: int = option(5, "number of folds")
    fold: str = option("0", "folds to test on, joined by commas, or all")
    recut: bool = option(False, "other folds for every seed (the encoder must know none of them)")
    seeds: int = option(1, "repetitions, with other weights, batches and labelled sites")
    seed: int = option(0, "the first seed")
    basins: str = option("", "file with a gauge per line: only these, after the folds are cut")
    labelled: int = option(0, "sites with observations, a seventh of them for validation; 0: all")
    missing: float = option(0.0, "share of the attribute groups hidden at test sites")
    train_period: str = option("", "FROM/TO, like 1989-10-01/1999-09-30; empty: 60 % of the days")
    test_period: str = option("", "FROM/TO; empty: the last 40 % of the days")
    static_only: bool = option(False, "attributes alone, also of gauges without a series")
    adapter: str = option("residual", "residual, feedforward, bottleneck, gated or experts")
    residual: str = option("weather", "what the residual path sees: weather, or all inputs")
    width: int = option(64, "hidden width of head and baseline")
    steps: int = option(600, "optimiser steps")
    batch_size: int = option(32, "windows per step")
    lr: float = option(2e-3, "peak learning rate")
    dropout: float = option(0.2, "before the head and before its output")
    warmup: int = option(120, "first days of a window that are not scored")
    buffer: int = option(2, "pixels at the edge of a block not learned from (landcover, height)")
    cache_gb: float = option(4.0, "encoded windows beyond this go to a memory map on disk")
    allow_overlap: bool = option(False, "test on sites the checkpoint has seen; the run says so")
    device: str = option("", "cuda, cpu …; empty: cuda if there is one")
    quick: bool = option(False, "the same path in under a minute, nothing learned")


TASKS = {  # head, target -> what is learned, outputs -> target, loss, models compared by default
    "streamflow": ("lstm", lambda y: np.sqrt(np.maximum(y, 0)), lambda y: np.maximum(y, 0) ** 2,
                   F.mse_loss, "resconn,lstm"),
    "soil_moisture": ("lstm", np.asarray, np.asarray, F.mse_loss, "resconn,lstm"),
    "soil": ("mlp", np.asarray, np.asarray, F.mse_loss, "resconn,mlp,glm"),
    "landslide": ("cnn", np.asarray, lambda y: 1 / (1 + np.exp(-y)),
                  F.binary_cross_entropy_with_logits, "resconn,cnn,glm"),
    "landcover": ("map", np.asarray, lambda y: y.argmax(1), F.cross_entropy, "unet,pixel"),
    "height": ("map", np.asarray, np.asarray, F.mse_loss, "unet,unet++,pixel"),
}
IMAGE_NETS = {  # variants of the last two: channels in and out -> network
    "unet": partial(UNet, width=16),
    "unet++": partial(UNet, nested=True, width=16),
    "dynamicworld": DynamicWorld,
    "pixel": partial(nn.Conv2d, kernel_size=1),     # linear or logistic regression of each pixel
}
VARIANTS = {  # where E comes from, what the residual path sees, the head if not the task's own
    "resconn": ("frozen", "weather", ""),
    "noresconn": ("frozen", "", ""),
    "linear": ("frozen", "", "linear"),
    "scratch": ("random", "weather", ""),
    "direct": ("direct", "", ""),
    "alphaearth": ("vectors", "", ""),
    "alphaearth-resconn": ("vectors", "weather", ""),
    "lstm": ("", "all", ""),        # the same baseline under the name of the task's head
    "mlp": ("", "all", ""),
    "cnn": ("", "", ""),            # patches alone
    "glm": ("", "all", "linear"),   # linear or logistic regression
}
ADAPTERS = {  # what is added to x = E + r
    "residual": lambda d: None,
    "feedforward": lambda d: nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.Linear(d, d)),
    "bottleneck": lambda d: nn.Sequential(nn.Linear(d, d // 8), nn.GELU(), nn.Linear(d // 8, d)),
    "gated": lambda d: nn.Sequential(nn.Linear(d, 2 * d), nn.GLU()),
    "experts": lambda d: Experts(d, 4),
}


class Predictor(nn.Module):
    """Tokens of the encoder and residual path -> adapter -> head: a number per day, (B, L).

    Where a site has a single value, L = 1, and the residual path sees the attributes.
    """

    def __init__(self, variant, sites, encoder, o):
        super().__init__()
        (use, reads, head), d = VARIANTS[variant], o.width
        self.head = head or TASKS[o.task][0]
        c, n = len(sites.dynamic_names), len(sites.dynamic_names + sites.static_names)
        reads = reads and ((o.residual if use else reads) if sites.target.ndim == 2 else "static")
        self.reads = {"": range(0), "weather": range(c), "static": range(2 * c, 2 * n),
                      "all": range(2 * n)}[reads]
        if use:
            wide = encoder.config.d_model if encoder else sites.vectors.shape[1]
            self.norms = nn.ModuleList([nn.LayerNorm(wide), nn.LayerNorm(wide)])
            self.gain = nn.Parameter(torch.ones(2))
            self.expand = nn.Linear(wide, d) if wide != d else nn.Identity()
        if self.reads:
            self.conv, self.mix = nn.Conv1d(len(self.reads), d, 3, padding=1), nn.Linear(d, d)
        self.adapter = ADAPTERS[o.adapter](d) if use else None
        self.dropout, self.output = Dropout(o.dropout), nn.Linear(d, 1)
        if self.head == "lstm":
            self.lstm = nn.LSTM(d, d, batch_first=True)
        if self.head == "cnn":
            self.cnn = nn.Sequential(
                nn.Conv2d(sites.patches.shape[1], d // 4, 3, padding=1), nn.GELU(), nn.MaxPool2d(2),
                nn.Conv2d(d // 4, d, 3, padding=1), nn.GELU())
        if self.head in ("mlp", "cnn"):
            self.mlp = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, d), nn.GELU())
        self.encoder = StefaLand(encoder.config) if use == "random" else None

    def forward(self, encoded, forcing, static, patch):
        """encoded (B, L+1, D): E of each day and of the site, or None; patch (B, K, H, W)."""
        x = 0
        if encoded is not None:
            day, site = self.norms[0](encoded[:, :-1]), self.norms[1](encoded[:, -1:])
            x = self.expand(self.gain[0] * day + self.gain[1] * site)           # (B, L, width)
            x = x.expand(-1, forcing.shape[1], -1)          # AlphaEarth's L is 1
        if self.reads:
            static = static[:, None].expand(-1, forcing.shape[1], -1)           # (B, L, S)
            r = torch.cat([forcing.nan_to_num(), forcing.isnan(),
                           static.nan_to_num(), static.isnan()], -1)            # (B, L, 2 C + 2 S)
            x = x + self.mix(self.conv(r[..., self.reads].mT).mT)               # (B, L, width)
        if self.adapter is not None:
            x = x + self.adapter(x)
        if self.head == "cnn":
            x = x + self.cnn(patch).mean((2, 3))[:, None]                       # (B, 1, width)
        if self.head != "linear":
            x = self.dropout(x)
            x = self.dropout(self.lstm(x)[0] if self.head == "lstm" else self.mlp(x))
        return self.output(x)[..., 0]                                           # (B, L)


class Experts(nn.Module):
    """Mixture of n linear experts, softly gated: (B, L, d) -> (B, L, d)."""

    def __init__(self, d, n):
        super().__init__()
        self.gate, self.experts = nn.Linear(d, n), nn.Linear(d, n * d)

    def forward(self, x):
        weight = self.gate(x).softmax(-1)[..., None]                            # (B, L, n, 1)
        return (self.experts(x).unflatten(-1, (-1, x.shape[-1])) * weight).sum(-2)


def widen(pretrained):
    """The pretrained network with one more daily variable, "target", whose weights are new."""
    c = pretrained.config
    model = StefaLand(replace(c, dynamic_names=(*c.dynamic_names, "target"),
                              dynamic_groups=(*c.dynamic_groups, "target")))
    for new, old in zip(model.state_dict().values(), pretrained.state_dict().values()):
        new[tuple(map(slice, old.shape))] = old             # the new variable comes last
    return model


def load_encoder(o, fold, sites, test):
    """The frozen network of --checkpoint, windows of `sites` for it, number of test sites seen.

    ValueError if it has seen test sites, unless --allow-overlap: they would leak into the score.
    """
    path = (o.checkpoint or f"{o.out}/pretrained.pt").replace("{fold}", str(fold))
    model, saved = load_checkpoint(path)
    overlap = len({*map(data.gauge, sites.ids[test])} & {*map(data.gauge, saved["ids"])})
    data.check(o.allow_overlap or not overlap,
               f"{path} has seen {overlap} of the {len(test)} test sites; pretrain "
               f"with --holdout {o.holdout} --folds {o.folds} --fold {fold}")
    if saved["step"] < saved["options"]["steps"]:
        print(f"{path}: pretrained for {saved['step']} of {saved['options']['steps']} steps only")
    lack = max(model.config.max_days - len(sites.dates), 0)     # sites without weather: all missing
    arranged = {"dates": sites.dates[0] + np.arange(len(sites.dates) + lack)}
    for field, kind, pad in (("forcing", "dynamic_names", [(0, 0), (0, lack), (0, 1)]),
                             ("static", "static_names", [(0, 0), (0, 1)])):
        own, known = getattr(sites, kind), getattr(model, kind)
        absent, extra = [n for n in known if n not in own], [n for n in own if n not in known]
        if absent or extra:
            print(f"{field}: fed to the encoder as missing {absent}, unknown to it {extra}")
        values = np.pad(getattr(sites, field), pad, constant_values=np.nan)
        columns = [own.index(n) if n in own else -1 for n in known]     # the last one is missing
        arranged |= {field: values[..., columns], kind: known}
    windows = Windows(replace(sites, **arranged), saved["scaling"], model.config.max_days)
    return model.to(setup(o.device)[2]).eval().requires_grad_(False), windows, overlap


@torch.no_grad()
def encode_windows(model, windows, site, start, daily, o):
    """The frozen encoder's tokens() for fixed windows, once: (n, L+1, D) half, on disk if large."""
    shape = (len(site), windows.days + 1 if daily else 2, model.config.d_model)
    fits = np.prod(shape) * 2 <= o.cache_gb * 1e9
    store = np.empty(shape, np.float16) if fits else np.memmap(
        tempfile.TemporaryFile(dir=o.out), np.float16, "w+", shape=shape)
    for i in np.array_split(np.arange(len(site)), len(site) // 64 + 1):
        store[i] = tokens(model, windows, site[i], start[i], daily).cpu()
    return torch.from_numpy(store)


def tokens(model, windows, site, start, daily):
    """E of each day and of the site, (B, L+1, D); not daily: of the mean day and of the site."""
    encoded = model.encode(*windows.get(site, start, model.position.device))
    return encoded if daily else torch.stack([encoded[:, :-1].mean(1), encoded[:, -1]], 1)


def choose_sites(o, sites, fold_of, fold, rng):
    """Indices of training, validation and test sites, all with targets; test is the fold."""
    wanted = ~np.isnan(sites.target.reshape(len(sites.ids), -1)).all(1)
    if o.basins:
        wanted &= np.isin([*map(data.gauge, sites.ids)], Path(o.basins).read_text().split())
    test = np.flatnonzero(wanted & (fold_of == fold))
    pool = rng.permutation(np.flatnonzero(wanted & (fold_of != fold)))[:o.labelled or None]
    validation, training = map(np.sort, np.split(pool, [max(len(pool) // 7, 1)]))
    data.check(len(test) and len(training),
               f"fold {fold}: {len(test)} test and {len(training)} training sites")
    return training, validation, test


def predict_attribute(sites, target):
    """`sites` with an attribute as target, hidden as an input with all of clay, silt and sand."""
    names = sites.static_names
    data.check(target in names, f"--target {target}: the sites have only {names}")
    hidden = np.isin(names, (target, "clay", "silt", "sand"))
    return replace(sites, target=sites.static[:, names.index(target)],
                   static=np.where(hidden, np.float32(np.nan), sites.static))


def hide_groups(sites, at, share, rng):
    """`sites` with a share of the attribute groups hidden at the sites `at`."""
    groups = np.array([data.GROUP.get(n, n) for n in sites.static_names])
    static = sites.static.copy()
    for group in sorted({*groups} - {"context"}):
        static[np.ix_(at[rng.random(len(at)) < share], groups == group)] = np.nan
    return replace(sites, static=static)


def goal(sites, task, training, past):
    """What is learned, (N, T); errors(guess, truth, site), weighted; undo(outputs) -> target.

    Errors of a series are weighted as in the NSE, those of a class by how rare it is.
    """
    _, forth, back, loss, _ = TASKS[task]
    learned, centre, spread = forth(sites.target.reshape(len(sites.ids), -1)), 0.0, 1.0
    known, weight = learned[training, past], torch.ones(len(learned), 1)
    if loss is F.mse_loss:
        centre, spread = np.nanmean(known), np.nanstd(known)
    if sites.target.ndim == 2:
        deviation = np.nanstd(known, 1, keepdims=True) / spread
        weight[training] = torch.from_numpy(1 / (deviation + 0.1) ** 2).float()
    if loss is F.cross_entropy:
        label = torch.from_numpy(known[~np.isnan(known)])
        data.check(bool(((label >= 0) & (label % 1 == 0)).all()),
                   f"{task}: classes must be 0, 1, 2 and so on")
        count = label.long().bincount(minlength=int(np.nanmax(learned)) + 1)
        rarity = label.numel() / count.clamp(min=1) / len(count)

    def errors(guess, truth, site):                         # (B, L), (B, L), (B,) -> (B, L)
        if loss is F.cross_entropy:
            return loss(guess, truth.long(), rarity.to(guess.device), reduction="none")
        return loss(guess, truth, reduction="none") * weight[site].to(guess.device)

    return (torch.from_numpy((learned - centre) / spread).float(), errors,
            lambda outputs: back(outputs * spread + centre))


def prepare(o, variant, sites, windows, sets, encoder, inputs):
    """A model, and predict(key, i, patch): its output (B, L) for the windows i of the set `key`.

    windows, inputs: the sites as the head and as the encoder read them. Classes: (B, kinds, L).
    """
    device, daily = setup(o.device)[2], sites.target.ndim == 2
    use = VARIANTS.get(variant, [""])[0]
    vectors = torch.tensor(sites.vectors, device=device).nan_to_num()           # (N, 64)
    if variant in IMAGE_NETS:
        kinds = int(np.nanmax(sites.target)) + 1 if o.task == "landcover" else 1
        model = IMAGE_NETS[variant](sites.patches.shape[1], kinds)
    elif use == "direct":
        model = widen(encoder)
    else:
        model = Predictor(variant, sites, encoder, o)
    model.to(device)
    if use == "frozen":
        coded = {key: encode_windows(encoder, inputs, *x, daily, o) for key, x in sets.items()}

    def predict(key, i, patch):
        patch, (site, start) = patch.to(device), (x[i] for x in sets[key])
        if variant in IMAGE_NETS:                           # mean of four turns, but in training
            turns = range(1 if model.training else 4)
            out = [model(patch.rot90(k, (2, 3))).rot90(-k, (2, 3)) for k in turns]
            return torch.stack(out).mean(0).flatten(2).squeeze(1)               # (B, H W)
        if use == "direct":                                 # the target: always hidden
            forcing, *rest = inputs.get(site, start, device)
            forcing = F.pad(forcing, (0, 1), value=torch.nan)                   # (B, L, C+1)
            return model.decode(model.encode(forcing, *rest))[0][..., -1]
        encoded = {"frozen": lambda: coded[key][i].to(device, torch.float32), "": lambda: None,
                   "random": lambda: tokens(model.encoder, inputs, site, start, daily),
                   "vectors": lambda: vectors[site][:, None].expand(-1, 2, -1)}[use]()
        forcing, static, *_ = windows.get(site, start, device)
        return model(encoded, forcing, static, patch)

    return model, predict


def crop(truth, patch, buffer, rng, size=32):
    """A random part of a batch of maps (B, H W) and patches (B, K, H, W), turned and flipped.

    Pixels nearer than `buffer` to the edge of their block are not learned from.
    """
    truth = truth.view(-1, 1, *patch.shape[2:])                                 # (B, 1, H, W)
    near = F.max_pool2d(truth.isnan().float(), 2 * buffer + 1, 1, buffer) > 0
    both = torch.cat([truth.masked_fill(near, torch.nan), patch], 1)
    i, j = rng.integers(patch.shape[-1] - size + 1, size=2)
    both = both[..., i:i + size, j:j + size].rot90(rng.integers(4), (2, 3))
    both = both.flip(2) if rng.random() < 0.5 else both                         # (B, 1+K, 32, 32)
    return both[:, 0].flatten(1), both[:, 1:]


def run(o, variant, sites, fold_of, fold, seed):
    """Train one model on one fold. Returns what the run's file holds."""
    device, began, rng = setup(o.device)[2], time.time(), np.random.default_rng([seed, fold])
    torch.manual_seed(seed)
    training, validation, test = choose_sites(o, sites, fold_of, fold, rng)
    sites, daily = hide_groups(sites, test, o.missing, rng), sites.target.ndim == 2
    observed = sites.target.reshape(len(sites.ids), -1)     # (N, T); T = 1, or the pixels of a map

    encoder, inputs, overlap = None, None, 0
    if VARIANTS.get(variant, [""])[0] in ("frozen", "random", "direct"):
        encoder, inputs, overlap = load_encoder(o, fold, sites, test)
    span, warmup = observed.shape[1], 0
    past = future = slice(0, span)
    if daily:
        past = day_slice(o.train_period, sites.dates, (0, 0.6))
        future = day_slice(o.test_period, sites.dates, (0.6, 1))
        span, warmup = inputs.days if inputs else min(365, span), o.warmup
    data.check(span > warmup, f"windows of {span} days, of which --warmup {warmup} are not scored")

    target, errors, undo = goal(sites, o.task, training, past)
    scaling = {"forcing": fit_scaling(sites.forcing[training, past]),
               "static": fit_scaling(sites.static[fold_of != fold])}
    windows = Windows(sites, scaling, span if daily else 1)
    maps = np.moveaxis(sites.patches, 1, -1)                                    # (N, H, W, K)
    maps = scale(maps, fit_scaling(maps[training]))
    patches = torch.tensor(np.moveaxis(maps, -1, 1))                            # (N, K, H, W)
    parts = {"training": (training, past), "validation": (validation, past), "test": (test, future)}
    sets = {key: tile(*part, span, warmup) for key, part in parts.items()}
    model, predict = prepare(o, variant, sites, windows, sets, encoder, inputs)

    @torch.no_grad()
    def simulate(key):
        """Observed and simulated values, (sites, days) each; of maps, (pixels, 1)."""
        result = np.full(observed.shape, np.nan, np.float32)
        site, start = sets[key]
        late_first = np.argsort(-start, kind="stable")      # warmed-up days overwrite the others
        model.eval()
        for i in np.array_split(late_first, len(site) // 128 + 1):
            out = predict(key, i, patches[site[i]]).cpu().numpy()
            for j, y in zip(i, undo(out)):
                skip = warmup if start[j] else 0
                result[site[j], start[j] + skip:start[j] + span] = y[skip:]
        model.train()
        obs, sim = observed[parts[key]], result[parts[key]]
        known = ~np.isnan(obs)
        return (obs, sim) if daily else (obs[known, None], sim[known, None])

    def loss():
        i = rng.choice(len(sets["training"][0]), o.batch_size)
        site, start = (x[i] for x in sets["training"])
        truth, patch = target.unfold(1, span, 1)[site, start], patches[site]    # (B, L)
        if variant in IMAGE_NETS:
            truth, patch = crop(truth, patch, o.buffer, rng)
        scored = ~truth[:, warmup:].isnan()
        guess, truth = predict("training", i, patch), truth.nan_to_num().to(device)     # (B, L)
        return errors(guess, truth, site)[:, warmup:][scored].mean()

    best, seconds = fit(model, o, loss, lambda: skill(*simulate("validation")))
    obs, sim = simulate("test")
    owner = test if daily else test[np.nonzero(~np.isnan(observed[test]))[0]]   # site of each row
    scores = {"test": skill(obs, sim)}
    if variant in IMAGE_NETS:
        scores["training"] = skill(*simulate("training"))
    epoch = seconds / o.steps * len(sets["training"][0]) / o.batch_size
    print(f"fold {fold} seed {seed} {variant:<10} {len(training)} + {len(validation)} sites, "
          f"validation {best:.3f}; "
          + "; ".join(f"{key} " + ", ".join(f"{k} {v:.3f}" for k, v in [*s.items()][:3])
                      for key, s in scores.items())
          + f"; {epoch:.1f} s an epoch, {time.time() - began:.0f} s in all", flush=True)
    return dict(ids=sites.ids[owner], latlon=sites.latlon[owner], dates=sites.dates[future],
                obs=obs, sim=sim, overlap=overlap, validation=best)


def fit(model, o, loss, scores):
    """Train on loss(); keep the weights with the best first one of scores(), looked at ten times.

    Returns this score and the seconds of training.
    """
    optimizer = torch.optim.AdamW(model.parameters(), o.lr, weight_decay=1e-2)
    best, kept, seconds = -np.inf, None, 0.0
    for step in range(o.steps):
        tick = time.time()
        rate = o.lr * learning_rate(step / o.steps)
        descend(optimizer, loss(), rate, clip=1.0, where=f"step {step} of {o.task}")
        seconds += time.time() - tick
        if (step + 1) % max(o.steps // 10, 1) == 0:         # early stopping on validation sites
            score = next(iter(scores().values()))
            if kept is None or score > best:
                best, kept = score, {k: x.clone() for k, x in model.state_dict().items()}
    model.load_state_dict(kept)
    return best, seconds


def main(argv=None):
    o = parse(Options, __doc__, argv)
    data.check(o.task in TASKS, f"--task '{o.task}': expected one of {', '.join(TASKS)}")
    o.model = o.model or TASKS[o.task][-1]
    Path(o.out, "runs").mkdir(parents=True, exist_ok=True)  # or fail now, not after training
    known = IMAGE_NETS if TASKS[o.task][0] == "map" else VARIANTS
    for name, known in [(o.adapter, ADAPTERS), *((name, known) for name in o.model.split(","))]:
        data.check(name in known, f"'{name}': expected one of {', '.join(known)}")
    if o.quick:
        o.steps, o.batch_size = min(o.steps, 10), 8
    target = "streamflow" if o.task == "soil" else o.task
    sites = data.load(o.data, target, cache=Path(o.out) / "cache", static_only=o.static_only,
                      quick=o.quick)
    changed = {key: value for key, value in vars(o).items() if value != getattr(Options, key)}
    if o.task == "soil":
        sites, changed["target"] = predict_attribute(sites, o.target), o.target
    if o.vectors:
        sites = data.join_vectors(sites, o.vectors)
    setting = f"{o.task} {o.data.partition(':')[0]} {o.holdout}{o.folds}" + "".join(
        f", {key} {changed[key]}" for key in ("target", "recut", "missing", "labelled")
        if key in changed)
    folds = range(o.folds) if o.fold == "all" else [*map(int, o.fold.split(","))]
    for seed, fold, variant in product(range(o.seed, o.seed + o.seeds), folds, o.model.split(",")):
        name = " ".join([variant, *(changed[key] for key in ("adapter", "residual")
                                    if key in changed and variant != "lstm")])
        path = Path(o.out, "runs", f"{setting}, {name}, fold {fold}, seed {seed}.npz")
        settings = json.dumps(vars(o) | dict(setting=setting, name=name, model=variant,
                                             fold=fold, seed=seed, seeds=1))
        if path.exists() and str(np.load(path)["settings"]) == settings:
            print(f"{path}: done before")
            continue
        fold_of = data.folds(sites, o.holdout, o.folds, seed if o.recut else 0)
        arrays = run(o, variant, sites, fold_of, fold, seed)
        data.write_atomically(
            path, lambda file: np.savez_compressed(file, settings=settings, **arrays))


if __name__ == "__main__":
    main()
