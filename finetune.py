"""Predict at sites without observations: frozen encoder, residual adapter, small head.

    python train.py && python finetune.py               streamflow: resconn and the LSTM, one fold
    python finetune.py --model resconn,lstm --labelled 60 --seeds 3 --fold all
    python finetune.py --data caravan:DIR --checkpoint out/pub{fold}/pretrained.pt --fold all
    python eval.py                                      the table over all runs

r_t = linear(conv1d(weather_t)); h = LSTM(E_t + r_t); y_t = linear(h_t). E_t: what the pretrained
network makes of the day and of the site, before its layers and, at first at 0.3, after them. No
site of the test fold is trained on, nor may the checkpoint have seen it. A run leaves predictions
in out/runs/*.npz and its model beside them: load("….pt").predict(sites). Other tasks plug in from
applications/ by a Task, if need be Variants and a reader, and main().
"""

import hashlib
import json
import multiprocessing
import os
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn as nn

import data
from eval import SCORINGS
from model import Config, Dropout, StefaLand
from train import (Windows, apply_standardisation, autocast, cover_with_windows, day_slice, descend,
                   fastest_dtype, fit_standardisation, learning_rate, load_checkpoint, load_file,
                   option, parse, save, setup, tested_folds)


@dataclass
class Options:
    task: str = option("data", "streamflow", "one of finetune.TASKS")
    data: str = option("data", "synthetic", "or caravan:DIR, camels:DIR, csv:DIR; several: a,b")
    out: str = option("data", "out", "folder of checkpoint, cache and runs")
    basins: str = option("data", "", "file with a gauge a line: only these, once folds are cut")
    train_period: str = option("data", "", "FROM/TO, as 1989-10-01/1999-09-30; empty: first 60 %%")
    test_period: str = option("data", "", "FROM/TO; empty: the last 40 %%")
    holdout: str = option("hold-out", "pub", "pub (random sites), pur (regions), or none: for use")
    folds: int = option("hold-out", 5, "number of folds", least=1)
    fold: str = option("hold-out", "0", "folds to test on, joined by commas, or all")
    reshuffle_folds: bool = option("hold-out", False, "other folds for every seed")
    draw: int = option("hold-out", -1, "labelled and validation sites are this draw for every "
                       "seed, as for an ensemble; -1: others for each", least=-1)
    labelled: int = option("hold-out", 0, "sites with observations, 1/7 to validate; 0: all")
    missing: float = option("hold-out", 0.0, "share of attribute groups hidden at test sites")
    allow_overlap: bool = option("hold-out", False, "test sites may be known to the checkpoint")
    model: str = option("model", "", "of finetune.VARIANTS, joined by commas; empty: the task's")
    checkpoint: str = option("model", "", "pretrained weights, {fold} = the fold; empty: in --out")
    width: int = option("model", 64, "hidden width of head and baseline", least=1)
    dropout: float = option("model", 0.2, "before the head and before its output")
    bound: float = option("model", np.inf, "attributes reach the residual path and a baseline as "
                          "no more than this many standard deviations from their mean")
    warmup: int = option("model", 120, "first days of a window that are not scored")
    steps: int = option("training", 600, "optimiser steps", least=1)
    batch_size: int = option("training", 32, "windows per step", least=1)
    lr: float = option("training", 2e-3, "peak learning rate")
    seeds: int = option("training", 1, "repetitions: other weights, batches, labels", least=1)
    seed: int = option("training", 0, "the first seed")
    jobs: int = option("training", 1, "runs side by side, each with a share of the cores", least=1)
    device: str = option("training", "", "cuda, cpu …; empty: cuda if there is one")
    dtype: str = option("training", "auto", "float32, bfloat16, or auto: what is faster here")
    quick: bool = option("training", False, "the same path in under a minute, nothing learned")


class LSTMHead(nn.Module):
    """One LSTM over the days: (L, B, width) -> (L, B)."""

    def __init__(self, width, dropout, shapes):
        super().__init__()
        self.dropout, self.output = Dropout(dropout), nn.Linear(width, 1)
        self.lstm = nn.LSTM(width, width)

    def forward(self, x, extra):
        x, _ = self.lstm(self.dropout(x))                                       # (L, B, width)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 has but three digits
            return self.output(self.dropout(x.float()))[..., 0]


class LinearHead(nn.Module):
    """Each day by itself: (L, B, width) -> (L, B)."""

    def __init__(self, width, dropout, shapes):
        super().__init__()
        self.output = nn.Linear(width, 1)

    def forward(self, x, extra):
        return self.output(x)[..., 0]


def unchanged(values, _):
    return values


def square_root(y, sites):
    return np.sqrt(np.maximum(y, 0))


def square(y, sites):
    return np.maximum(y, 0) ** 2


@dataclass
class Task:
    """What is predicted, and how it is learned and scored."""
    target: str                         # a daily series, or an entry of Sites.extra: a value a site
    unit: str = ""                      # of the target
    models: str = "resconn,lstm"        # variants compared by default
    baseline: str = "lstm"              # the one that the table measures gains against
    inputs: tuple = ("forcing",)        # what the residual path reads
    head: type = LSTMHead               # head(width, dropout, shapes), forward(x, extra) -> (L, B)
    extra: tuple = ()                   # entries of Sites.extra that forward gets, as a list
    loss: Callable = nn.functional.mse_loss     # of what is learned, with reduction="none"
    standardised: bool = True           # what is learned has mean 0 and deviation 1
    transform: Callable = unchanged     # target (N, T), sites -> what is learned, (N, T)
    inverse: Callable = unchanged       # and back
    fit: Callable = None                # in place of fit(), but for variants that have their own
    scoring: str = "series"             # of eval.SCORINGS; by the first score the best is kept
    shown: tuple = ()                   # the scores that are printed; empty: all
    prepare: Callable = unchanged       # loaded sites, options (None: in predict) -> sites


@dataclass
class Variant:
    """A network: where E comes from, and what else reaches the head."""
    embedding: str = "frozen"           # of ENCODED; or an entry of Sites.extra; or "": no E
    inputs: tuple = None                # what the residual path reads; None: as the task says
    head: type = None                   # in place of the task's; may begin with another adapter
    needs: type = None                  # the task's head must be this one for the name to be true
    network: type = None                # in place of Predictor
    encoder: type = StefaLand           # of its Config: another has no weights to take over
    fit: Callable = None                # in place of fit()
    transform: Callable = None          # in place of the task's, and its inverse
    inverse: Callable = None
    standardised: bool = None           # in place of the task's
    weather: Callable = None            # forcing in its units (B, L, C), names -> last in extra


TASKS = {"streamflow": Task("streamflow", "mm/d", transform=square_root, inverse=square)}
VARIANTS = {
    "resconn": Variant(),
    "noresconn": Variant(inputs=()),
    "linear": Variant(inputs=(), head=LinearHead),
    "scratch": Variant("random"),
    "direct": Variant("tuned", inputs=()),      # a target that is always hidden tells E nothing
    "lstm": Variant("", inputs=("forcing", "static"), needs=LSTMHead),
}


# embeddings by an encoder: as pretrained, fixed or not; of random weights, trained or not
ENCODED = ("frozen", "tuned", "random", "untrained")
FIXED = ("frozen", "untrained")
ELSEWHERE = ("model", "fold", "seed", "seeds", "out", "device", "jobs", "checkpoint",
             "allow_overlap")


def fill_and_flag(x):
    """Zeros for NaN and, behind them, flags that say where: (..., V) -> (..., 2 V)."""
    return torch.cat([x.nan_to_num(), x.isnan()], -1)


class Predictor(nn.Module):
    """Embedding + residual path -> head: a number per day, (B, L).

    `settings`, plain values, and the weights are all that it takes to predict at other sites. For
    a value per site L = 1: E is the mean over the days of the first year of the site's record.
    """

    def __init__(self, settings, encoder=None):
        super().__init__()
        self.settings, width, shapes = settings, settings["width"], settings["shapes"]
        self.task, self.variant = TASKS[settings["task"]], VARIANTS[settings["variant"]]
        self.encoder, embedding = encoder, self.variant.embedding
        if settings["config"]:
            self.encoder = encoder or self.variant.encoder(Config(**settings["config"]))
            self.encoder.requires_grad_(embedding not in FIXED)
        if embedding:
            d = self.encoder.config.d_model if self.encoder else shapes[embedding]
            self.levels = self.encoder.levels if self.encoder else 1
            self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(2 * self.levels))
            self.gain = nn.Parameter(torch.tensor([1, 1, 0.3, 0.3])[:2 * self.levels])
            self.expand = nn.Linear(d, width) if d != width else nn.Identity()
        self.inputs = self.task.inputs if self.variant.inputs is None else self.variant.inputs
        self.flags = "static" in self.inputs                # weather alone comes without them
        if self.inputs:
            channels = sum(len(settings[name + "_names"]) for name in self.inputs)
            self.conv = nn.Conv1d(channels * (2 if self.flags else 1), width, 3, padding=1)
            self.mix = nn.Linear(width, width)
        self.head = (self.variant.head or self.task.head)(width, settings["dropout"], shapes)

    def forward(self, e, forcing, static, extra):
        """e (B, L+1, levels D): E of days and site, or None; the inputs standardised, with NaN."""
        L, B = forcing.shape[1], len(forcing)               # days first, as an LSTM computes
        x = []                                              # what is added up: (L, B, width) each
        if e is not None:
            levels = e.transpose(0, 1).chunk(self.levels, -1)                   # (L+1, B, D) each
            parts = [part for level in levels for part in (level[:-1], level[-1:])]     # days, site
            x.append(self.expand(sum(gain * norm(part) for gain, norm, part in
                                     zip(self.gain, self.norms, parts))))
        if self.inputs:
            values = {"forcing": forcing.transpose(0, 1), "static": static.expand(L, B, -1)}
            fill = fill_and_flag if self.flags else torch.nan_to_num
            r = torch.cat([fill(values[name]) for name in self.inputs], -1)     # (L, B, channels)
            x.append(self.residual(r))
        x = sum(x) if x else forcing.new_zeros(L, B, self.settings["width"])
        return self.head(x, extra).T                                            # (B, L)

    def residual(self, r):
        """linear(conv1d(r)): (L, B, channels) -> (L, B, width); both are linear, so one product."""
        weight = torch.einsum("oi,ick->okc", self.mix.weight, self.conv.weight).flatten(1)
        r = nn.functional.pad(r, (0, 0, 0, 0, 1, 1))        # zeros before the first day and after
        r = torch.cat([r[:-2], r[1:-1], r[2:]], -1)                             # (L, B, 3 channels)
        return nn.functional.linear(r, weight, self.mix(self.conv.bias))

    def predict(self, sites):
        """The target at other sites, in its unit, for every day: (N, T), or for each: (N, 1)."""
        sites = self.task.prepare(sites, None)
        days = len(sites.dates) if self.task.scoring == "series" else 1
        return Samples(self, sites, np.arange(len(sites.ids)), slice(0, days)).predict()


class Samples:
    """Some days of some sites cut into windows, as a Predictor reads them."""

    def __init__(self, model, sites, chosen, days):
        self.model, self.sites, self.chosen, self.days = model, sites, chosen, days
        s, embedding = model.settings, model.variant.embedding
        self.device, self.length = next(model.parameters()).device, s["length"]
        starts = cover_with_windows(days, s["length"], s["warmup"])
        self.site, self.start = np.repeat(chosen, len(starts)), np.tile(starts, len(chosen))  # (n,)
        self.head_windows = Windows(
            sites, s["scaling"], s["length"], s["forcing_names"], s["static_names"])
        self.head_windows.static.clamp_(-s["bound"], s["bound"])    # a rare class is far out
        self.encoded = None
        if model.encoder:
            c, self.encoder_start = model.encoder.config, self.start
            self.encoder_windows = Windows(
                sites, s["encoder_scaling"], c.max_days, c.dynamic_names, c.static_names)
            if self.length == 1:                            # a value per site: its first year
                latest = len(sites.dates) - c.max_days
                self.encoder_start = np.minimum(self.encoder_windows.first, latest)[self.site]
        if embedding in FIXED:
            self.encoded = self.encode_once()
        elif embedding and not model.encoder:               # vectors in place of the encoder's E
            data.check(embedding in sites.extra, f"the sites have no {embedding}: {[*sites.extra]}")
            vectors = torch.from_numpy(sites.extra[embedding]).nan_to_num()     # (N, D)
            self.encoded = vectors[self.site][:, None].expand(-1, self.length + 1, -1)

    @torch.no_grad()
    def encode_once(self):
        """E of all windows, (n, L+1, levels D), in half precision in a temporary file (TMPDIR)."""
        self.model.eval()
        encoder = self.model.encoder
        shape = len(self.site), self.length + 1, encoder.levels * encoder.config.d_model
        store = np.memmap(tempfile.TemporaryFile(), np.float16, "w+", shape=shape)
        for i in self.batches(64):
            store[i] = self.encode(i).cpu()
        return torch.from_numpy(store)

    def batches(self, size):
        return np.array_split(np.arange(len(self.site)), len(self.site) // size + 1)

    def encode(self, i):
        """E of the windows i, days and site: (B, L+1, levels D); None if it takes none."""
        if self.encoded is not None:
            return self.encoded[i].to(self.device).float()      # half as much to copy
        if not self.model.encoder:
            return None
        windows = self.encoder_windows.get(self.site[i], self.encoder_start[i], self.device)
        with autocast(self.device, self.model.settings["dtype"]):
            e = self.model.encoder.read(*windows).float()
        return e if self.length > 1 else torch.stack([e[:, :-1].mean(1), e[:, -1]], 1)

    def outputs(self, i):
        """What the network makes of the windows i: (B, L), standardised."""
        site, names = self.site[i], self.model.task.extra
        forcing, static, *_ = self.head_windows.get(site, self.start[i], self.device)
        extra = [torch.tensor(self.sites.extra[name][site], device=self.device) for name in names]
        if self.model.variant.weather:                      # for heads that compute in its units
            day = self.start[i][:, None] + np.arange(self.length)               # (B, L)
            weather = self.sites.forcing[site[:, None], day]                    # (B, L, C)
            extra.append(self.model.variant.weather(weather, self.sites.dynamic_names)
                         .to(self.device))
        e = self.encode(i)
        with autocast(self.device, self.model.settings["dtype"]):
            return self.model(e, forcing, static, extra).float()

    @torch.no_grad()
    def predict(self):
        """(chosen, days) in the target's unit; of windows that overlap, the warmer one counts."""
        s = self.model.eval().settings
        last = max(self.days.stop, self.length)
        result = np.full((len(self.sites.ids), last), np.nan, np.float32)       # (N, T)
        for i in self.batches(128):
            outputs = self.outputs(i).cpu().numpy() * s["spread"] + s["centre"]
            for site, start, y in zip(self.site[i], self.start[i], outputs):
                cold = s["warmup"] if start else 0
                days = result[site, start + cold:start + self.length]           # a view
                np.copyto(days, y[cold:], where=np.isnan(days))     # the earlier window is warmer
        inverse = self.model.variant.inverse or self.model.task.inverse
        return inverse(result, self.sites)[self.chosen, self.days]


VERSION = 4                                                 # of the saved models' format


def load(path):
    """The model that a run has saved: .predict(sites). Import the application of its task first."""
    def rebuild(saved):
        task, variant = saved["settings"]["task"], saved["settings"]["variant"]
        data.check(task in TASKS and variant in VARIANTS,
                   f"first import the application that defines {task} and {variant}")
        model = (VARIANTS[variant].network or Predictor)(saved["settings"])
        model.load_state_dict(saved["weights"])
        return model.eval()

    return load_file(path, VERSION, rebuild)


def checkpoint_of(o, fold):
    """The path of the checkpoint to use for a fold; FileNotFoundError says how to make it."""
    path = Path((o.checkpoint or f"{o.out}/pretrained.pt").replace("{fold}", str(fold)))
    data.check(path.is_file(), f"no file {path}: first pretrain on these data, python train.py or "
               f"python -m applications.NAME train, with --data {o.data}", FileNotFoundError)
    return path


def pretraining_of(path):
    """The options that shaped a checkpoint, but for its fold, and a hash of its file."""
    _, saved = load_checkpoint(path)
    options = saved["options"] | {"steps": saved["step"]}
    for name in ("fold", "out", "device", "resume", "save_every"):
        del options[name]
    return options, hashlib.sha256(path.read_bytes()).hexdigest()


def load_encoder(o, fold, sites, test):
    """The network of --checkpoint, its scaling, and the number of test sites that it has seen.

    ValueError if it has seen test sites, unless --allow-overlap: they would leak into the score.
    """
    path, target = checkpoint_of(o, fold), TASKS[o.task].target
    model, saved = load_checkpoint(path)
    seen = {data.gauge(site) for site in saved["ids"]}
    overlap = sum(data.gauge(site) in seen for site in sites.ids[test])
    data.check(o.allow_overlap or not overlap,
               f"{path} has seen {overlap} of the {len(test)} test sites; pretrain "
               f"with --holdout {o.holdout} --folds {o.folds} --fold {fold}")
    if saved["step"] < saved["options"]["steps"]:
        print(f"{path}: pretrained for {saved['step']} of {saved['options']['steps']} steps only")
    own = {*sites.dynamic_names, *sites.static_names}
    known = {*model.config.dynamic_names, *model.config.static_names}
    if own != known:
        print(f"{path}: {len(known - own)} of its variables are missing {sorted(known - own)[:5]}, "
              f"{len(own - known)} are unknown to it {sorted(own - known)[:5]}")
    if target in known:
        print(f"{path} was trained to tell {target}, at validation sites, too: to stop by them "
              f"fairly, pretrain with --without {data.groups((target,))[0]}")
    return model, saved["scaling"], overlap


def choose_sites(o, sites, fold_of, fold, rng):
    """Indices of training, validation and test sites, all with targets; test is the fold."""
    known = ~np.isnan(sites.target).all(1)
    data.check(known.any(), f"no site has a value of {TASKS[o.task].target}")
    if o.basins:
        gauges = [data.gauge(site) for site in sites.ids]
        known &= np.isin(gauges, Path(o.basins).read_text().split())
    test = np.flatnonzero(known & (fold_of == fold))        # with hold-out none there are none
    pool = rng.permutation(np.flatnonzero(known & (fold_of != fold)))
    data.check(o.labelled <= len(pool), f"--labelled {o.labelled}: only {len(pool)} sites outside "
               f"fold {fold} have observations")
    pool = pool[:o.labelled or None]
    validation, training = np.split(pool, [max(len(pool) // 7, 1)])
    data.check(len(training) and (len(test) or o.holdout == "none"),
               f"fold {fold}: {len(test)} test and {len(training)} training sites")
    return np.sort(training), np.sort(validation), test


def periods(o, task, target, dates, encoder):
    """Days to train on, days to test on, days in a window and of them those not scored."""
    if task.scoring != "series":                            # a value per site
        return slice(0, 1), slice(0, 1), 1, 0
    seen = np.flatnonzero(~np.isnan(target).all(0))         # days with observations anywhere
    first, stop = seen[0], seen[-1] + 1
    split = first + int(0.6 * (stop - first))
    length = encoder.config.max_days if encoder else min(365, len(dates))
    data.check(length > o.warmup,
               f"windows of {length} days, of which --warmup {o.warmup} do not count")
    return (day_slice(o.train_period, dates, slice(first, split)),
            day_slice(o.test_period, dates, slice(split, stop)), length, o.warmup)


def run(o, variant, sites, fold_of, fold, seed):
    """Train one variant on one fold: the model, and what the run's file holds."""
    began, rng, task = time.time(), np.random.default_rng([seed, fold]), TASKS[o.task]
    choice = np.random.default_rng([o.draw, fold]) if o.draw >= 0 else rng
    torch.manual_seed(seed)
    target = sites.target.reshape(len(sites.ids), -1)                           # (N, T)
    sites = replace(sites, target=target, static=np.array(sites.static))
    training, validation, test = choose_sites(o, sites, fold_of, fold, choice)
    sites.static[test] = data.hide_groups(sites.static[test], sites.static_names, o.missing, rng)
    encoder, scaling, overlap = None, None, 0
    if VARIANTS[variant].embedding in ENCODED:
        encoder, scaling, overlap = load_encoder(o, fold, sites, test)

    data.check(task.scoring == "series" or target.shape[1] == 1,
               f"{task.target} is a daily series, not a {task.scoring} for each site")
    train_days, test_days, length, warmup = periods(o, task, target, sites.dates, encoder)
    transform = VARIANTS[variant].transform or task.transform
    learned, centre, spread = transform(target, sites), 0.0, 1.0                # (N, T)
    standardised = VARIANTS[variant].standardised
    if task.standardised if standardised is None else standardised:
        known = learned[training, train_days]
        centre, spread = float(np.nanmean(known)), float(np.nanstd(known))
    settings = dict(
        task=o.task, variant=variant, width=o.width, dropout=o.dropout, bound=o.bound,
        length=length, warmup=warmup, centre=centre, spread=spread,
        dtype=o.dtype if length > 1 else "float32",
        config=asdict(encoder.config) if encoder else None, encoder_scaling=scaling,
        forcing_names=sites.dynamic_names, static_names=sites.static_names,
        scaling={"forcing": fit_standardisation(sites.forcing[training, train_days]),
                 "static": fit_standardisation(sites.static[fold_of != fold])},
        shapes={name: values.shape[1] for name, values in sites.extra.items() if values.ndim > 1})
    attributes = apply_standardisation(sites.static[training], settings["scaling"]["static"])
    settings["places"] = dict(latlon=torch.tensor(sites.latlon[training]),      # trained at
                              static=torch.from_numpy(attributes))
    pretrained = encoder if VARIANTS[variant].embedding in ("frozen", "tuned") else None
    model = (VARIANTS[variant].network or Predictor)(settings, pretrained)
    model.to(setup(o.device)[2])

    learn = model.variant.fit or task.fit or fit
    best = learn(model, o, Samples(model, sites, training, train_days),
                 Samples(model, sites, validation, train_days), learned, rng)
    arrays = dict(dates=sites.dates[test_days], overlap=overlap, validation=best)
    arrays |= compare(model, sites, test, test_days)
    arrays |= compare(model, sites, validation, test_days, "validation_")   # to calibrate with
    shown = "none"
    if len(test):
        scores = SCORINGS[task.scoring](arrays["obs"], arrays["sim"])
        shown = ", ".join(f"{name} {scores[name]:.3f}" for name in task.shown or scores)
    print(f"fold {fold} seed {seed} {variant:<10} {len(training)} + {len(validation)} sites, "
          f"validation {best:.3f}; test {shown}; {time.time() - began:.0f} s", flush=True)
    return model, arrays


def compare(model, sites, chosen, days, prefix=""):
    """ids, latlon, obs and sim (n, T) of some sites, each name behind the prefix."""
    obs = sim = sites.target[chosen, days]
    if len(chosen):
        sim = Samples(model, sites, chosen, days).predict()
    return {prefix + "ids": sites.ids[chosen], prefix + "latlon": sites.latlon[chosen],
            prefix + "obs": obs, prefix + "sim": sim}


def fit(model, o, samples, validation, learned, rng):
    """Train on samples; keep the weights with the best first score at those of validation.

    learned: the transformed target, (N, T). The score is looked at ten times, and returned.
    """
    s, task = model.settings, model.task
    truth = torch.from_numpy((learned - s["centre"]) / s["spread"]).float()     # (N, T)
    weight = torch.ones(len(truth), 1)                                          # (N, 1)
    if task.scoring == "series":                            # errors weighted as in the NSE
        deviation = np.nanstd(learned[samples.chosen, samples.days], 1, keepdims=True) / s["spread"]
        weight[samples.chosen] = torch.from_numpy(1 / (deviation + 0.1) ** 2).float()
    # what is frozen has no gradient, and AdamW leaves it as it is
    optimizer = torch.optim.AdamW(model.parameters(), o.lr, weight_decay=1e-2)
    obs = validation.sites.target[validation.chosen, validation.days]
    best, kept = np.nan, None
    for step in range(o.steps):
        model.train()
        i = rng.choice(len(samples.site), o.batch_size)
        site, day = samples.site[i], samples.start[i][:, None] + np.arange(samples.length)
        y = truth[site[:, None], day].to(samples.device)                        # (B, L)
        y[:, :s["warmup"]] = np.nan                         # not scored
        error = task.loss(samples.outputs(i), y.nan_to_num(), reduction="none")     # (B, L)
        loss = (error * weight[site].to(samples.device))[~y.isnan()].mean()
        descend(optimizer, loss, o.lr * learning_rate(step / o.steps), clip=1.0,
                where=f"step {step} of {o.task}")
        if (step + 1) % max(o.steps // 10, 1) == 0:         # early stopping on validation sites
            value = next(iter(SCORINGS[task.scoring](obs, validation.predict()).values()))
            if kept is None or np.isnan(best) or value > best:
                best, kept = value, {k: x.clone() for k, x in model.state_dict().items()}
    model.load_state_dict(kept)
    return best


def main(argv=None, options_class=Options, description=__doc__, defaults=None):
    o = parse(options_class, description, argv, defaults)
    data.check(o.task in TASKS, f"--task '{o.task}': expected one of {', '.join(TASKS)}")
    task = TASKS[o.task]
    variants = (o.model or task.models).split(",")
    for name in variants:
        data.check(name in VARIANTS, f"--model '{name}': expected one of {', '.join(VARIANTS)}")
        data.check(VARIANTS[name].needs in (None, task.head),
                   f"--model {name} is not for {o.task}, which compares {task.models}")
    if o.dtype == "auto":
        o.dtype = fastest_dtype(setup(o.device)[2])
    Path(o.out, "runs").mkdir(parents=True, exist_ok=True)  # or fail now, not after training
    if o.quick:
        o.steps, o.batch_size = min(o.steps, 10), 8
    if o.holdout == "none":
        o.draw = max(o.draw, 0)
    folds = tested_folds(o) if o.holdout != "none" else [0]     # once, none of them tested
    work = list(product(variants, range(o.seed, o.seed + o.seeds), folds))
    if o.jobs == 1:
        return run_all(o, work)
    data.load(o.data, task.target, cache=Path(o.out, "cache"), quick=o.quick)   # parsed but once
    context = multiprocessing.get_context("spawn")
    jobs = [context.Process(target=run_all, args=(o, work[k::o.jobs])) for k in range(o.jobs)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    data.check(not any(job.exitcode for job in jobs), "a process of --jobs has failed, see above")


def run_all(o, work):
    """Do the runs (variant, seed, fold) that have not been done with these options before."""
    if o.jobs > 1:
        torch.set_num_threads(max(os.cpu_count() // o.jobs, 1))
    task = TASKS[o.task]
    sites = data.load(o.data, task.target, cache=Path(o.out, "cache"), quick=o.quick)
    sites = task.prepare(sites, o)
    options = {name: value for name, value in vars(o).items() if name not in ELSEWHERE}
    kinds = "+".join(source.partition(":")[0] for source in o.data.split(","))
    setting = f"{o.task} {kinds} {o.holdout}{o.folds if o.holdout != 'none' else ''}"
    for name in ("reshuffle_folds", "labelled", "missing"):
        setting += f", {name} {getattr(o, name)}" if getattr(o, name) else ""
    for variant, seed, fold in work:
        pretraining, network = {}, ""
        if VARIANTS[variant].embedding in ENCODED:
            pretraining, network = pretraining_of(checkpoint_of(o, fold))
        key = hashlib.sha256(repr([options, pretraining]).encode()).hexdigest()[:8]
        path = Path(o.out, "runs", f"{setting}, {variant}, fold {fold}, seed {seed}, {key}.npz")
        about = json.dumps(dict(
            setting=setting, model=variant, fold=fold, seed=seed, options=options,
            pretraining=pretraining, network=network, baseline=task.baseline,
            scoring=task.scoring, shown=task.shown, unit=task.unit))
        if path.exists() and str(np.load(path)["about"]) == about:
            print(f"{path}: done before with these options; delete it to repeat the run")
            continue
        fold_of = data.folds(sites, o.holdout, o.folds, seed if o.reshuffle_folds else 0)
        model, arrays = run(o, variant, sites, fold_of, fold, seed)
        save(path.with_suffix(".pt"), version=VERSION, settings=model.settings,
             weights=model.state_dict())
        data.write_atomically(path, lambda file: np.savez_compressed(file, about=about, **arrays))


if __name__ == "__main__":
    data.command(main)
