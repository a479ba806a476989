"""Predict streamflow at sites without observations: frozen encoder, residual adapter, small head.

    python train.py && python finetune.py               resconn and the LSTM baseline, one fold
    python finetune.py --data caravan:DIR --checkpoint out/pub{fold}/pretrained.pt --fold all
    python finetune.py --model resconn,lstm --labelled 60 --seeds 3
    python eval.py                                       the table over all runs

r_t = linear(conv1d(weather_t)); h = LSTM(E_t + r_t); y_t = linear(h_t). The test fold's sites are never
trained on, nor may the checkpoint have seen them. Finished runs under out/runs are not repeated.
"""

import json
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

import data
from eval import site_metrics
from model import Config, StefaLand, dropout
from train import Windows, fit_scaling, learning_rate, option, parse, setup


@dataclass
class Options:
    data: str = option("synthetic", "synthetic, or sources: caravan:DIR,camels:DIR")
    model: str = option("resconn,lstm", "any of the variants, joined by commas")
    checkpoint: str = option("", "pretrained weights; {fold} stands for the fold; empty: in --out")
    out: str = option("out", "folder of checkpoint, cache and runs")
    holdout: str = option("pub", "pub (random sites) or pur (regions)")
    folds: int = option(5, "number of folds")
    fold: str = option("0", "folds to test on, joined by commas, or all")
    seeds: int = option(1, "repetitions with other weights, batches and labelled sites")
    seed: int = option(0, "the first seed")
    basins: str = option("", "file with one gauge per line: only these are used, after the folds are cut")
    labelled: int = option(0, "training sites with observations, validation included; 0: all")
    missing: float = option(0.0, "share of the attribute groups hidden at test sites")
    train_period: str = option("", "from/to, such as 1989-10-01/1999-09-30; empty: first 60 % of days")
    test_period: str = option("", "from/to; empty: the last 40 % of days")
    adapter: str = option("residual", "residual, feedforward, bottleneck, gated or experts")
    residual: str = option("weather", "what the residual path sees: weather, or all (attributes too)")
    tokens: str = option("both", "which tokens the head reads: day, site or both")
    width: int = option(64, "hidden width of head and baseline")
    steps: int = option(600, "optimiser steps")
    batch_size: int = option(32, "windows per step")
    lr: float = option(2e-3, "peak learning rate")
    dropout: float = option(0.2, "before the LSTM and the output")
    warmup: int = option(120, "first days of a window that are not scored")
    cache_gb: float = option(4.0, "encoded windows beyond this go to a memory map on disk")
    allow_overlap: bool = option(False, "test on sites the checkpoint has seen; the run says so")
    device: str = option("", "cuda, cpu …; empty: cuda if there is one")
    quick: bool = option(False, "the same path in under a minute, nothing learned")


VARIANTS = {  # encoder: how it is used; reads: what the residual path sees; head
    "resconn": dict(encoder="frozen", reads="weather", head="lstm"),
    "noresconn": dict(encoder="frozen", reads="", head="lstm"),
    "linear": dict(encoder="frozen", reads="", head="linear"),
    "scratch": dict(encoder="random", reads="weather", head="lstm"),
    "direct": dict(encoder="direct", reads="", head=""),
    "lstm": dict(encoder="", reads="all", head="lstm"),
}
ADAPTERS = {  # what is added to x = E + r, beside x itself
    "residual": None,
    "feedforward": lambda d: nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.Linear(d, d)),
    "bottleneck": lambda d: nn.Sequential(nn.Linear(d, d // 8), nn.GELU(), nn.Linear(d // 8, d)),
    "gated": lambda d: nn.Sequential(nn.Linear(d, 2 * d), nn.GLU()),
    "experts": lambda d: Experts(d),
}


class Predictor(nn.Module):
    """Encoder tokens and residual path -> adapter -> head: one number per day, (B, L)."""

    def __init__(self, variant, n_weather, n_static, encoder, o):
        super().__init__()
        v, d = VARIANTS[variant], o.width
        self.o, self.head, self.reads = o, v["head"], v["reads"] and (v["reads"], o.residual)[v["encoder"] != ""]
        self.encoder = encoder if v["encoder"] in ("random", "direct") else None
        if not self.head:
            return
        if v["encoder"]:
            wide = encoder.config.d_model
            self.norms = nn.ModuleList([nn.LayerNorm(wide), nn.LayerNorm(wide)])    # day, site
            self.expand = nn.Linear(wide, d) if wide != d else nn.Identity()
            self.gain = nn.Parameter(torch.tensor([o.tokens != "site", o.tokens != "day"]).float())
        if self.reads:
            n = n_weather if self.reads == "weather" else 2 * (n_weather + n_static)
            self.conv, self.mix = nn.Conv1d(n, d, 3, padding=1), nn.Linear(d, d)
        self.adapter = ADAPTERS[o.adapter](d) if v["encoder"] and ADAPTERS[o.adapter] else None
        self.lstm = nn.LSTM(d, d, batch_first=True) if self.head == "lstm" else None
        self.output = nn.Linear(d, 1)

    def forward(self, encoded, batch):
        """encoded (B, L+1, D) or None; batch as Windows.get gives it, on the head's own scaling."""
        forcing, static, latlon, doy = batch
        if not self.head:                                   # direct: flow is one more hidden variable
            flow = torch.full_like(forcing[..., :1], torch.nan)
            return self.encoder.decode(self.encoder.encode(torch.cat([forcing, flow], -1), static,
                                                           latlon, doy))[0][..., -1]
        p, x = self.o.dropout if self.training else 0.0, 0
        if self.encoder is not None:
            encoded = self.encoder.encode(forcing, static, latlon, doy)
        if encoded is not None:
            day, site = (norm(e) for norm, e in zip(self.norms, (encoded[:, :-1], encoded[:, -1:])))
            x = self.expand(self.gain[0] * day + self.gain[1] * site)           # (B, L, width)
        if self.reads:
            seen = forcing.nan_to_num()
            if self.reads == "all":
                site = torch.cat([static.nan_to_num(), static.isnan().float()], -1)
                site = site[:, None].expand(-1, forcing.shape[1], -1)
                seen = torch.cat([seen, forcing.isnan().float(), site], -1)
            x = x + self.mix(self.conv(seen.transpose(1, 2)).transpose(1, 2))   # + r_t
        x = x if self.adapter is None else x + self.adapter(x)
        if self.lstm is not None:
            x, _ = self.lstm(dropout(x, p))
        return self.output(dropout(x, p))[..., 0]                               # (B, L)


class Experts(nn.Module):
    """Mixture of four linear experts, softly gated."""

    def __init__(self, d, n=4):
        super().__init__()
        self.gate, self.experts = nn.Linear(d, n), nn.Linear(d, n * d)

    def forward(self, x):
        weight = self.gate(x).softmax(-1)                                       # (B, L, n)
        return (self.experts(x).unflatten(-1, (-1, x.shape[-1])) * weight[..., None]).sum(-2)


def load_encoder(path, sites, device):
    """A checkpoint's frozen model, its contents, and the data in its variables (absent = missing)."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model = StefaLand(Config(**saved["config"]))
        model.load_state_dict(saved["model"])
    except FileNotFoundError:
        raise FileNotFoundError(f"no checkpoint {path}: run python train.py first") from None
    except Exception as error:
        raise ValueError(f"{path} is no checkpoint of train.py: {error}") from error

    def arrange(values, own, wanted):
        columns = [own.index(n) if n in own else len(own) for n in wanted]
        return np.concatenate([values, np.full_like(values[..., :1], np.nan)], -1)[..., columns]

    for kind, known, own in (("daily", model.dynamic_names, sites.dynamic_names),
                             ("static", model.static_names, sites.static_names)):
        absent, extra = sorted({*known} - {*own}), sorted({*own} - {*known})
        if absent or extra:
            print(f"{kind} variables fed to the encoder as missing: {absent}; not known to it: {extra}")
    view = replace(sites, forcing=arrange(sites.forcing, sites.dynamic_names, model.dynamic_names),
                   static=arrange(sites.static, sites.static_names, model.static_names),
                   dynamic_names=model.dynamic_names, static_names=model.static_names)
    return model.to(device).eval().requires_grad_(False), saved, view


def encode_windows(model, windows, site, start, o, device):
    """The frozen encoder's output for fixed windows, once: (n, L+1, D) float16, on disk if large."""
    shape = (len(site), windows.days + 1, model.config.d_model)
    if np.prod(shape) * 2 > o.cache_gb * 1e9:
        file = tempfile.TemporaryFile(dir=o.out)
        store = torch.from_numpy(np.memmap(file, np.float16, "w+", shape=shape))
    else:
        store = torch.empty(shape, dtype=torch.float16)
    with torch.no_grad():
        for i in torch.arange(len(site)).split(64):
            batch = (x.to(device) for x in windows.get(site[i], start[i]))
            store[i] = model.encode(*batch).half().cpu()
    return store


def tile(sites, chosen, first, last, days, warmup):
    """Windows that cover the days first..last-1 of every chosen site: site, start (n,)."""
    starts = np.arange(max(first - warmup, 0), max(last - warmup, 1), days - warmup)
    starts = np.unique(np.minimum(starts, max(last - days, 0)))
    return np.repeat(chosen, len(starts)), np.tile(starts, len(chosen))


def run(o, name, sites, fold_of, fold, seed):
    """Train one model on one fold; returns ids, obs and sim (N, T) of the test sites, and notes."""
    rank, world, device = setup(o.device)
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, fold])
    listed = {line.strip() for line in open(o.basins)} if o.basins else {*map(data.gauge, sites.ids)}
    mine = np.array([data.gauge(i) in listed for i in sites.ids]) & ~np.isnan(sites.target).all(1)
    test = np.flatnonzero(mine & (fold_of == fold))
    pool = rng.permutation(np.flatnonzero(mine & (fold_of != fold)))[:o.labelled or None]
    validation, training = np.split(pool, [max(len(pool) // 7, 1)])
    if not len(test) or not len(training):
        raise ValueError(f"fold {fold}: {len(test)} test sites, {len(training)} training sites")

    T = len(sites.dates)
    def period(text, default):
        days = [np.datetime64(d) for d in text.split("/")] if text else None
        return default if not text else [int((d - sites.dates[0]).astype(int)) + i for i, d in enumerate(days)]

    train_days = period(o.train_period, (0, int(0.6 * T)))
    test_days = period(o.test_period, (int(0.6 * T), T))
    if o.missing:                                           # hide whole attribute groups at test sites
        static, groups = sites.static.copy(), np.array([data.GROUP.get(n, n) for n in sites.static_names])
        for group in sorted({*groups} - {"context"}):
            static[np.ix_(test[rng.random(len(test)) < o.missing], groups == group)] = np.nan
        sites = replace(sites, static=static)

    v, L, encoder, view = VARIANTS[name], 365, None, sites
    path = (o.checkpoint or f"{o.out}/pretrained.pt").replace("{fold}", str(fold))
    scaling = {"forcing": fit_scaling(sites.forcing[training][:, slice(*train_days)]),
               "static": fit_scaling(sites.static[np.flatnonzero(fold_of != fold)])}
    overlap = 0
    if v["encoder"]:
        encoder, saved, view = load_encoder(path, sites, device)
        seen = {data.gauge(i) for i in saved["ids"]}
        overlap = sum(data.gauge(i) in seen for i in sites.ids[test])
        if overlap and not o.allow_overlap:
            raise ValueError(f"{path} was trained on {overlap} of the {len(test)} test sites of fold "
                             f"{fold}; pretrain with --holdout {o.holdout} --folds {o.folds} --fold {fold}")
        L = encoder.config.max_days
        if v["encoder"] == "random":
            encoder = StefaLand(encoder.config).to(device)
        if v["encoder"] == "direct":
            encoder = with_flow(encoder).to(device)
    frozen = v["encoder"] == "frozen"
    windows = Windows(view if v["encoder"] and not frozen else sites,
                      saved["scaling"] if v["encoder"] and not frozen else scaling, L)

    y = np.sqrt(np.maximum(sites.target, 0))                                    # (N, T), transformed
    known = y[training][:, slice(*train_days)]
    centre, spread = np.nanmean(known), np.nanstd(known)
    y = torch.from_numpy((y - centre) / spread)
    deviation = torch.from_numpy(np.nanstd(y[:, slice(*train_days)].numpy(), 1))    # (N,)
    weight = 1 / (deviation + 0.1) ** 2                     # NSE weighting (Kratzert et al. 2019)
    sets = {key: tile(sites, chosen, *days, L, o.warmup) for key, chosen, days in (
        ("train", training, train_days), ("validation", validation, train_days), ("test", test, test_days))}
    coded = {key: encode_windows(encoder, Windows(view, saved["scaling"], L), *s, o, device)
             for key, s in sets.items()} if frozen else {}
    model = Predictor(name, len(sites.dynamic_names), len(sites.static_names), encoder, o).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], o.lr, weight_decay=1e-2)
    y_windows = y.unfold(1, L, 1)                                               # (N, T-L+1, L), a view

    def predict(key, i):
        site, start = sets[key]
        e = coded[key][i].to(device).float() if frozen else None
        return model(e, [x.to(device) for x in windows.get(site[i], start[i])])

    def simulate(key):                                      # (n sites, T) of the set, mm/d; NaN uncovered
        site, start = sets[key]
        total, order = np.full((len(sites.ids), T), np.nan, np.float32), np.argsort(-start, kind="stable")
        model.eval()
        with torch.no_grad():
            for i in np.array_split(order, len(order) // 128 + 1):
                out = predict(key, i).cpu().numpy() * spread + centre
                for j, series in zip(i, out):               # late windows first: earlier ones have warmed up
                    skip = o.warmup if start[j] else 0
                    total[site[j], start[j] + skip:start[j] + L] = np.maximum(series[skip:], 0) ** 2
        model.train()
        return total[np.unique(site)]

    def skill(key, chosen, days):
        days = slice(*days)
        sim, obs = simulate(key)[:, days], sites.target[np.unique(chosen)][:, days]
        return np.array([site_metrics(a, b)["nse"] for a, b in zip(obs, sim)])

    best, kept, began, spent = -np.inf, None, time.time(), 0.0
    every = max(o.steps // 10, 1)
    for step in range(o.steps):
        tick = time.time()
        i = rng.choice(len(sets["train"][0]), o.batch_size)
        site, start = (x[i] for x in sets["train"])
        truth = y_windows[site, start].to(device)
        scored = ~truth.isnan()
        scored[:, :o.warmup] = False
        for group in optimizer.param_groups:
            group["lr"] = o.lr * learning_rate(step / o.steps)
        error = (predict("train", i) - truth.nan_to_num()).square() * scored
        loss = (error * weight[site, None].to(device)).sum() / scored.sum().clamp(min=1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        spent += time.time() - tick
        if (step + 1) % every == 0:                         # early stopping: keep the best on validation
            score = np.nanmean(np.clip(skill("validation", validation, train_days), -1, 1))
            if score > best:
                best, kept = score, {k: x.clone() for k, x in model.state_dict().items()}
    if kept is not None:
        model.load_state_dict(kept)
    sim, order = simulate("test"), np.unique(test)
    days = slice(*test_days)
    nse = np.array([site_metrics(a, b)["nse"] for a, b in zip(sites.target[order][:, days], sim[:, days])])
    epoch = spent / o.steps * len(sets["train"][0]) / o.batch_size
    print(f"fold {fold} seed {seed} {name:<10} {len(training)}+{len(validation)} sites, validation {best:.3f}; "
          f"test NSE median {np.nanmedian(nse):.3f}, mean clipped {np.nanmean(np.clip(nse, -1, 1)):.3f}, "
          f"{np.nanmean(nse < 0):.0%} below 0; {time.time() - began:.0f} s, {epoch:.1f} s/epoch", flush=True)
    return dict(ids=sites.ids[order], latlon=sites.latlon[order], dates=sites.dates[days],
                obs=sites.target[order][:, days], sim=sim[:, days]), dict(overlap=overlap, validation=float(best))


def with_flow(pretrained):
    """A copy of the encoder with streamflow as one more daily variable, itself always hidden."""
    c = pretrained.config
    model = StefaLand(replace(c, dynamic_names=(*c.dynamic_names, "streamflow"),
                              dynamic_groups=(*c.dynamic_groups, "streamflow")))
    old, new = pretrained.state_dict(), model.state_dict()
    for key, value in new.items():                          # new rows or columns come last
        value[tuple(slice(n) for n in old[key].shape)] = old[key]
    model.load_state_dict(new)
    return model.train()


def main(argv=None):
    o = parse(Options, __doc__, argv)
    names = o.model.split(",")
    for given, known, flag in [*((n, VARIANTS, "model") for n in names), (o.adapter, ADAPTERS, "adapter")]:
        if given not in known:
            raise ValueError(f"--{flag} {given}: expected one of {', '.join(known)}")
    if o.quick:
        o.steps, o.batch_size = min(o.steps, 10), 8
    world = dict(n_sites=60, years=3) if o.quick else {}
    sites = data.load(o.data, cache=Path(o.out) / "cache", **world)
    fold_of = data.folds(sites, o.holdout, o.folds)
    for fold in range(o.folds) if o.fold == "all" else map(int, o.fold.split(",")):
        for seed in range(o.seed, o.seed + o.seeds):
            for name in names:
                extra = [f"{key}={value}" for key, value in (("adapter", o.adapter), ("residual", o.residual),
                         ("tokens", o.tokens)) if value != getattr(Options, key) and VARIANTS[name]["encoder"]]
                label = " ".join([name, *extra])
                setting = ", ".join([f"streamflow {o.data.partition(':')[0]} {o.holdout}{o.folds}",
                                     *([f"missing {o.missing:g}"] if o.missing else []),
                                     *([f"labelled {o.labelled}"] if o.labelled else [])])
                path = Path(o.out, "runs", f"{setting} {label} {fold} {seed}.npz".replace("/", "_"))
                if path.exists():
                    print(f"{path} is there already")
                    continue
                arrays, notes = run(o, name, sites, fold_of, fold, seed)
                settings = json.dumps(vars(o) | notes | dict(setting=setting, name=label, fold=fold, seed=seed))
                data.write_atomically(path, lambda f: np.savez_compressed(f, settings=settings, **arrays))


if __name__ == "__main__":
    main()
