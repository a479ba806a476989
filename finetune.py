"""Predict daily series where nothing was measured: frozen encoder, residual adapter, LSTM head.

    python train.py && python finetune.py               streamflow: resconn and the LSTM, one fold
    python finetune.py --model resconn,lstm --labelled 60 --seeds 3
    python finetune.py --data caravan:DIR --checkpoint out/pub{fold}/pretrained.pt --fold all
    python eval.py                                      the table over all runs

r_t = linear(conv1d(weather_t, attributes)); h = LSTM(E_t + r_t); y_t = linear(h_t). E_t: what the
pretrained network makes of day and site, before its layers and, at first at 0.3, after them. y_t:
of flow its square root and itself, whose mean predicts. Groups of attributes are hidden in training
as in pretraining. No test site is trained on, nor may the checkpoint have seen it. A run leaves
out/runs/*.npz, predictions, and *.pt, a model for load("….pt").predict(sites). An application
subclasses Predictor, enters a row in VARIANTS and calls main().
"""

import json
import tempfile
import time
from collections import namedtuple
from hashlib import sha256
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

import data
from eval import series_scores
from model import Config, Dropout, StefaLand, draw_groups
from train import (Windows, autocast, descend, fit_standardisation, learning_rate, load_checkpoint,
                   load_file, positive, save, shared_options)


class Predictor(nn.Module):
    """Embedding + residual path -> LSTM: K numbers per day.
    `settings`, plain values, and the weights are all that it takes to predict at other sites."""

    def __init__(self, settings, encoder=None):
        super().__init__()
        self.settings, self.encoder, width = settings, None, settings["width"]
        variant = VARIANTS[settings["variant"]]
        self.inputs, self.hide = variant.inputs, 0.0
        if variant.embedding:
            self.encoder = encoder or StefaLand(Config(**settings["config"]))
            self.encoder.requires_grad_(variant.embedding != "frozen")
            self.hide = self.encoder.config.p_static        # of a group of attributes, in training
            d = self.encoder.config.d_model
            self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(4))
            self.gain = nn.Parameter(torch.tensor([1, 1, 0.3, 0.3]))
            self.expand = nn.Linear(d, width) if d != width else nn.Identity()
        if self.inputs:
            channels = sum(len(settings[name + "_names"]) for name in self.inputs)
            # of three days side by side; x 2 if both are read: flags beside them
            self.conv = nn.Linear(3 * channels * len(self.inputs), width)
            self.mix = nn.Linear(width, width)
        self.powers = np.float32(POWERS.get(settings["target"], [1]))           # (K,)
        self.dropout, self.output = Dropout(settings["dropout"]), nn.Linear(width, len(self.powers))
        self.lstm = nn.LSTM(width, width)

    def forward(self, e, forcing, static):
        """E of days and site (B, L+1, 2 D), or None; standardised inputs with NaN -> (B, L, K)."""
        x = self.residual(forcing, static).float() if self.inputs else 0        # (L, B, width)
        if e is not None:
            x = x + self.embed(e)
        return self.head(x).transpose(0, 1)                                     # (B, L, K)

    def embed(self, e):
        """E_t, the day's token and the site's before the layers and after: -> (L, B, width)."""
        before, after = e.transpose(0, 1).chunk(2, -1)                          # (L+1, B, D) each
        parts = before[:-1], before[-1:], after[:-1], after[-1:]                # day, site, …
        return self.expand(sum(gain * norm(part) for gain, norm, part in
                               zip(self.gain, self.norms, parts)))

    def residual(self, forcing, static):
        """r_t of weather, or of weather and attributes, flagged where missing: (L, B, width)."""
        r = forcing.transpose(0, 1)                                             # (L, B, C)
        if "static" in self.inputs:
            static = fill_and_flag(static).expand(len(r), -1, -1)               # (L, B, 2 S)
            r = torch.cat([fill_and_flag(r), static], -1)                       # (L, B, 2 C + 2 S)
        r = nn.functional.pad(r.nan_to_num(), (0, 0, 0, 0, 1, 1))               # (L+2, B, channels)
        return self.mix(self.conv(torch.cat([r[:-2], r[1:-1], r[2:]], -1)))

    def head(self, x):
        """(L, B, width) -> (L, B, K)."""
        x, _ = self.lstm(self.dropout(x))                                       # (L, B, width)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 has but three digits
            return self.output(self.dropout(x.float()))

    def transform(self, y):
        """What is learned of the target, before it is standardised: (N, T) -> (N, T, K)."""
        return y[..., None] ** self.powers

    def inverse(self, y):
        """The target of what was learned: (N, T, K) -> (N, T)."""
        y = np.maximum(y, 0) if len(self.powers) > 1 else y
        return (y ** (1 / self.powers)).mean(-1)

    def predict(self, sites):
        """The target at other sites, in its unit, for every day: (N, T)."""
        return Samples(self, sites, np.arange(len(sites.ids)), slice(0, len(sites.dates))).predict()


# A Predictor, or a subclass; where its encoder is from: "frozen" or "tuned", of --checkpoint,
# "random", trained from nothing, or "" for none; and what the residual path reads.
Variant = namedtuple("Variant", "network embedding inputs",
                     defaults=(Predictor, "frozen", ("forcing", "static")))
POWERS = {"streamflow": [0.5, 1]}                           # of a target, learned side by side
VARIANTS = {"resconn": Variant(), "lstm": Variant(embedding="")}


def fill_and_flag(x):
    """Zeros for NaN and, behind them, flags that say where: (..., V) -> (..., 2 V)."""
    return torch.cat([x.nan_to_num(), x.isnan()], -1)


class Samples:
    """Some days of some sites cut into windows, as a Predictor reads them."""

    def __init__(self, model, sites, chosen, days, hide=0.0):
        self.model, self.sites, self.chosen, self.days = model, sites, chosen, days
        s = model.settings
        self.device = next(model.parameters()).device
        # days of a window; of them not scored; chance that a group of attributes is hidden
        self.length, self.warmup, self.hide = s["length"], s["warmup"], hide
        # windows overlap by the warm-up; the last one ends with the days
        starts = np.arange(max(days.start - self.warmup, 0), max(days.stop - self.warmup, 1),
                           self.length - self.warmup)
        starts = np.unique(np.minimum(starts, max(days.stop - self.length, 0)))
        self.site, self.start = np.repeat(chosen, len(starts)), np.tile(starts, len(chosen))  # (n,)
        self.batches = [slice(i, i + 64) for i in range(0, len(self.site), 64)]     # to go through
        self.windows = Windows(sites, s["scaling"], self.length, s["forcing_names"],
                               s["static_names"])
        self.encoded = None
        if model.encoder:
            c = model.encoder.config
            self.encoder_windows = Windows(sites, s["encoder_scaling"], self.length,
                                           c.dynamic_names, c.static_names)
            if not any(weight.requires_grad for weight in model.encoder.parameters()):
                self.encoded = self.encode_once()

    @torch.no_grad()
    def encode_once(self):
        """E of all windows, (n, L+1, 2 D), in half precision in a temporary file (TMPDIR)."""
        self.model.eval()
        shape = len(self.site), self.length + 1, 2 * self.model.encoder.config.d_model
        store = np.memmap(tempfile.TemporaryFile(), np.float16, "w+", shape=shape)
        for i in self.batches:
            store[i] = self.encode(i).cpu()
        return torch.from_numpy(store)

    def read(self, windows, i):
        """Windows.get of the windows i; training hides groups of attributes, as pretraining did."""
        forcing, static, *place = windows.get(self.site[i], self.start[i], self.device)
        if self.hide:
            hidden = draw_groups(windows.static_groups, self.hide, torch.rand, len(static))
            static = static.masked_fill(hidden.to(self.device), torch.nan)      # (B, S)
        return forcing, static, *place

    def encode(self, i):
        """E of the windows i, days and site: (B, L+1, 2 D)."""
        if self.encoded is not None:
            return self.encoded[i].to(self.device).float()
        batch = self.read(self.encoder_windows, i)
        with autocast(self.device, self.model.settings["dtype"]):
            return self.model.encoder.read(*batch).float()

    def outputs(self, i):
        """What the network makes of the windows i: (B, L, K), standardised."""
        forcing, static, *_ = self.read(self.windows, i)
        e = self.encode(i) if self.model.encoder else None
        with autocast(self.device, self.model.settings["dtype"]):
            return self.model(e, forcing, static).float()

    @torch.no_grad()
    def predict(self):
        """(chosen, days) in the target's unit; of windows that overlap, the earlier one counts."""
        s = self.model.eval().settings
        result = np.full((*self.sites.target.shape, len(self.model.powers)), np.nan, np.float32)
        for i in self.batches:
            outputs = self.outputs(i).cpu().numpy() * s["spread"] + s["centre"]
            for site, start, y in zip(self.site[i], self.start[i], outputs):
                days = result[site, start:start + self.length]                  # a view
                np.copyto(days, y, where=np.isnan(days))            # the earlier window stays
        return self.model.inverse(result)[self.chosen, self.days]


def load(path):
    """The model that a run has saved: .predict(sites). First import its variant's application."""
    saved = load_file(path, "settings")
    variant = saved["settings"]["variant"]
    data.check(variant in VARIANTS, f"first import the application that defines {variant}")
    model = VARIANTS[variant].network(saved["settings"])
    model.load_state_dict(saved["weights"])
    return model.eval()


def choose_sites(o, sites, held_out, days, rng):
    """Indices of training, validation and test sites; test are those held out, (N,) bool.
    All have weather and, in their period of `days` (training, test), observations; others told."""
    asked = ~np.isnan(sites.target).all(1)                                      # (N,)
    if o.basins:
        names = [*map(data.gauge, Path(o.basins).read_text().split())]
        gauges = [*map(data.gauge, sites.ids)]
        unknown = sorted({*names} - {*gauges})
        data.check(not unknown, f"{o.basins}: {len(unknown)} unknown sites: {unknown[:3]}")
        asked &= np.isin(gauges, names)
    seen = [~np.isnan(sites.target[:, period]).all(1) for period in days]
    usable = np.where(held_out, seen[1], seen[0]) & ~np.isnan(sites.forcing).all((1, 2))
    data.tell(f"without weather or, then, {o.target}: left out", sites.ids[asked & ~usable])
    test = np.flatnonzero(asked & usable & held_out)        # with hold-out none there are none
    pool = rng.permutation(np.flatnonzero(asked & usable & ~held_out))
    data.check(len(pool) > 1 and o.labelled <= len(pool) and (len(test) or o.holdout == "none"),
               f"only {len(test)} test sites and {len(pool)} others have a {o.target}")
    pool = pool[:o.labelled or None]
    validation, training = np.split(pool, [max(len(pool) // 7, 1)])
    return np.sort(training), np.sort(validation), test


def periods(o, sites):
    """Days to train on and days to test on, as slices: as told, or 60 and 40 % of those with
    observations; with hold-out none all of these."""
    seen = sites.dates[~np.isnan(sites.target).all(0)]
    data.check(len(seen), f"no site has a {o.target}")
    first, last = seen[0], seen[-1]
    split = first + (0.6 * (last + 1 - first)).astype(int)
    train, test = f"{first}/{split - 1}", f"{split}/{last}"
    if o.holdout == "none":
        train = test = f"{first}/{last}"
    asked = o.train_period or train, o.test_period or test
    return [day_slice(period, sites.dates) for period in asked]


def day_slice(period, dates):
    """FROM/TO -> the slice of these dates; ValueError if it is not within them."""
    days = [data.DAYS.get(text) for text in period.split("/")]
    data.check(len(days) == 2 and None not in days and dates[0] <= days[0] < days[1] <= dates[-1],
               f"period {period}: expected FROM/TO, days within {dates[0]}/{dates[-1]}")
    return slice(*np.searchsorted(dates, [days[0], days[1] + 1]))


def load_encoder(o, sites, test, fold):
    """The network of --checkpoint, and all saved with it; overlap: how many test sites it has seen.
    ValueError if it has seen any, unless --allow-overlap: they would leak into the score."""
    path = (o.checkpoint or f"{o.out}/pretrained.pt").replace("{fold}", str(fold))
    encoder, saved = load_checkpoint(path)
    seen = {data.gauge(site) for site in saved["ids"]}
    overlap = sum(data.gauge(site) in seen for site in sites.ids[test])
    data.check(o.allow_overlap or not overlap, f"{path} has seen {overlap} of the {len(test)} test "
               f"sites; pretrain with --holdout {o.holdout} --folds {o.folds} --fold {fold}")
    if saved["step"] < saved["options"]["steps"]:
        print(f"{path}: stopped at step {saved['step']} of {saved['options']['steps']}")
    own = {*sites.dynamic_names, *sites.static_names}
    known = {*encoder.config.dynamic_names, *encoder.config.static_names}
    data.tell(f"{path}: variables that only it, or only the sites have", sorted(own ^ known))
    data.tell(f"{path}: was trained to reconstruct the target itself", sorted({o.target} & known))
    file = sha256(Path(path).read_bytes()).hexdigest()
    return encoder, saved | {"overlap": overlap, "file": file}


def run(o, variant, sites, fold, seed, setting):
    """Train one variant on one fold, and write its model and predictions; unless done before."""
    torch.manual_seed(seed)
    began, embedding, encoder, saved = time.time(), VARIANTS[variant].embedding, None, {}
    fold_of, (train_days, test_days) = data.folds(sites, o.holdout, o.folds), periods(o, sites)
    training, validation, test = choose_sites(o, sites, fold_of == fold, (train_days, test_days),
                                              np.random.default_rng([o.seed, fold]))
    name, length = variant, min(365, len(sites.dates))
    if embedding:
        encoder, saved = load_encoder(o, sites, test, fold)
        length = encoder.config.max_days
        pretraining = repr([identity(saved["options"]), saved["step"], saved["digest"]])
        name += "@" + sha256(pretraining.encode()).hexdigest()[:4]
    data.check(length > o.warmup, f"--warmup {o.warmup}: fewer than the {length} of a window")
    path = Path(o.out, "runs", f"{setting}, {name}, fold {fold}, seed {seed}.npz")
    about = json.dumps(dict(setting=setting, model=name, variant=variant, fold=fold, seed=seed,
                            target=o.target, data=sites.digest, options=identity(vars(o)),
                            chosen=sites.ids[training].tolist(),
                            pretraining=saved.get("options"), checkpoint=saved.get("file")))
    if path.exists() and str(np.load(path)["about"]) == about:
        return print(f"{path}: done before; delete it to repeat the run")

    settings = dict(
        target=o.target, variant=variant, width=o.width, dropout=o.dropout, warmup=o.warmup,
        length=length, dtype=o.dtype, config=saved.get("config"), static_names=sites.static_names,
        encoder_scaling=saved.get("scaling"), forcing_names=sites.dynamic_names,
        scaling={"forcing": fit_standardisation(sites.forcing[training, train_days]),
                 "static": fit_standardisation(sites.static[fold_of != fold])},
        places={"latlon": torch.tensor(sites.latlon[training]),                 # trained at
                "static": torch.tensor(sites.static[training])})
    pretrained = None if embedding == "random" else encoder
    model = VARIANTS[variant].network(settings, pretrained).to(o.device)
    learned = model.transform(sites.target)                                     # (N, T, K)
    # these two reach the model as well: it holds the same dict
    settings["centre"] = np.nanmean(learned[training, train_days], (0, 1)).tolist()     # K
    settings["spread"] = np.nanstd(learned[training, train_days], (0, 1)).tolist()
    best = fit(model, o, Samples(model, sites, training, train_days, model.hide),
               Samples(model, sites, validation, train_days), learned, [seed, fold])
    save(path.with_suffix(".pt"), settings=settings, weights=model.state_dict())
    arrays = dict(about=about, dates=sites.dates[test_days], latlon=sites.latlon[test],
                  overlap=saved.get("overlap", 0), validation=best)
    for prefix, chosen in (("", test), ("validation_", validation)):            # to calibrate with
        sim = Samples(model, sites, chosen, test_days).predict()                # (n, T)
        arrays |= {prefix + "ids": sites.ids[chosen], prefix + "sim": sim,
                   prefix + "obs": sites.target[chosen, test_days]}
    data.write_atomically(path, lambda file: np.savez_compressed(file, **arrays))
    score = series_scores(arrays["obs"], arrays["sim"])["clipped"] if len(test) else np.nan
    print(f"fold {fold} seed {seed} {variant:<10} {len(training)} + {len(validation)} sites, "
          f"clipped NSE {best:.3f}, in test {score:.3f}, {time.time() - began:.0f} s", flush=True)


def identity(options):
    """Those of the options that tell one run, or one checkpoint, from another."""
    elsewhere = "model fold seeds out device threads checkpoint allow_overlap resume".split()
    return {name: value for name, value in options.items() if name not in elsewhere}


def fit(model, o, samples, validation, learned, seed):
    """Train what is not frozen on samples; keep the weights with the best clipped NSE at those of
    validation, looked at ten times, and return it. learned: the transformed target, (N, T, K)."""
    s, best, rng = model.settings, np.nan, np.random.default_rng(seed)
    truth = torch.from_numpy((learned - s["centre"]) / s["spread"]).float()     # (N, T, K)
    # errors count as in the NSE: by the deviation of the site
    deviation = np.ma.masked_invalid(truth[:, samples.days]).std(1, keepdims=True)
    weight = torch.from_numpy((deviation + 0.1).filled(np.nan)) ** -2           # (N, 1, K)
    day = samples.start[:, None] + np.arange(samples.warmup, samples.length)    # (n, scored)
    drawn = np.flatnonzero(~truth[samples.site[:, None], day, 0].isnan().all(1))    # have an error
    data.check(len(drawn), f"nothing is observed after --warmup {o.warmup} of any window")
    optimizer = torch.optim.AdamW(model.parameters(), o.lr, weight_decay=1e-2)
    for step in range(o.steps):
        model.train()
        i = rng.choice(drawn, o.batch_size)
        site, day = samples.site[i], samples.start[i][:, None] + np.arange(samples.length)
        y = truth[site[:, None], day].to(samples.device)                        # (B, L, K)
        y[:, :samples.warmup] = np.nan                      # not scored
        error = (samples.outputs(i) - y.nan_to_num()) ** 2                      # (B, L, K)
        loss = (error * weight[site].to(samples.device))[~y.isnan()].mean()
        descend(optimizer, loss, o.lr * learning_rate(step / o.steps), clip=1.0)
        if (step + 1) % max(o.steps // 10, 1) == 0:         # early stopping on validation sites
            obs = validation.sites.target[validation.chosen, validation.days]
            value = series_scores(obs, validation.predict())["clipped"]
            if np.isnan(best) or value > best:
                best, kept = value, {k: x.clone() for k, x in model.state_dict().items()}
    model.load_state_dict(kept)
    return best


def main(argv=None, models="resconn,lstm", description=__doc__):
    """The command line. An application gives its own models."""
    parser = shared_options(description, steps=600, batch_size=32, lr=2e-3)
    add = parser.add_argument
    add("--target", default="streamflow", help="name of the daily series [%(default)s]")
    add("--model", default=models, help="of finetune.VARIANTS, joined by commas [%(default)s]")
    add("--checkpoint", default="", help="pretrained weights, {fold} = the fold [in --out]")
    add("--fold", default="0", help="folds to test on, joined by commas, or all [%(default)s]")
    add("--labelled", type=positive, default=0, help="sites that are used, 1/7 to validate [all]")
    add("--basins", default="", help="file with a gauge a line: only these, once folds are cut")
    add("--train-period", default="", help="FROM/TO, as 1989-10-01/1999-09-30 [the first 60 %%]")
    add("--test-period", default="", help="FROM/TO [the last 40 %%]")
    add("--allow-overlap", action="store_true", help="test sites may be known to the checkpoint")
    add("--seeds", type=positive, default=1, help="repetitions on the same sites, drawn by --seed")
    add("--width", type=positive, default=64, help="hidden width of head and baseline")
    add("--dropout", type=float, default=0.2, help="before the LSTM and before the output")
    add("--warmup", type=positive, default=120, help="first days of a window that are not scored")
    o, defaults = parser.parse_args(argv), vars(parser.parse_args([]))
    models = o.model.split(",")
    data.check({*models} <= {*VARIANTS}, f"--model {o.model}: expected some of {[*VARIANTS]}")
    if o.quick:
        o.steps, o.batch_size = min(o.steps, 10), 8
    torch.set_num_threads(o.threads)
    sites = data.load(o.data, o.target, Path(o.out, "cache"), o.quick)
    setting = name_setting(o, defaults, sites)
    for variant, seed, fold in product(models, range(o.seed, o.seed + o.seeds), tested_folds(o)):
        run(o, variant, sites, fold, seed, setting)


def tested_folds(o):
    """The numbers in --fold, all or some joined by commas; with hold-out none 0, and no site."""
    known = [*map(str, range(o.folds))]
    asked = known if o.fold == "all" else o.fold.split(",")
    data.check({*asked} <= {*known}, f"--fold {o.fold}: expected all, or some of {known}")
    return [int(fold) for fold in asked] if o.holdout != "none" else [0]


def name_setting(o, defaults, sites):
    """What the files of runs begin with: target, data, hold-out, and options not as by default."""
    text = f"{o.target} {Path(o.data).name} {sites.digest[:4]} {o.holdout}{o.folds}"
    for key, value in identity(vars(o)).items():
        if value != defaults[key] and key not in ("target", "data", "holdout", "folds", "seed"):
            text += f", {key} {value}"
    return text.replace("/", "_")


if __name__ == "__main__":
    data.command(main)
