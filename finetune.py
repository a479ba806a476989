"""Predict streamflow at sites without observations: frozen encoder, residual adapter, small head.

    python train.py && python finetune.py               resconn and the LSTM baseline, one fold
    python finetune.py --model resconn,lstm --labelled 60 --seeds 3
    python finetune.py --data caravan:DIR --checkpoint out/pub{fold}/pretrained.pt --fold all
    python eval.py                                      the table over all runs

r_t = linear(conv1d(weather_t)); h = LSTM(E_t + r_t); y_t = linear(h_t), E_t from the encoder. No
site of the test fold is trained on, nor may the checkpoint have seen it. A run whose file is under
out/runs is not repeated.
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
from model import Config, Dropout, StefaLand
from train import Windows, fit_scaling, learning_rate, option, parse, setup


@dataclass
class Options:
    data: str = option("synthetic", "synthetic, or sources: caravan:DIR,camels:DIR")
    model: str = option("resconn,lstm", "variants, joined by commas")
    checkpoint: str = option("", "pretrained weights, {fold} = the fold; empty: those in --out")
    out: str = option("out", "folder of checkpoint, cache and runs")
    holdout: str = option("pub", "pub (random sites) or pur (regions)")
    folds: int = option(5, "number of folds")
    fold: str = option("0", "folds to test on, joined by commas, or all")
    seeds: int = option(1, "repetitions, with other weights, batches and labelled sites")
    seed: int = option(0, "the first seed")
    basins: str = option("", "file with a gauge per line: only these, after the folds are cut")
    labelled: int = option(0, "sites with observations, a seventh of them for validation; 0: all")
    missing: float = option(0.0, "share of the attribute groups hidden at test sites")
    train_period: str = option("", "FROM/TO, like 1989-10-01/1999-09-30; empty: 60 % of the days")
    test_period: str = option("", "FROM/TO; empty: the last 40 % of the days")
    adapter: str = option("residual", "residual, feedforward, bottleneck, gated or experts")
    residual: str = option("weather", "what the residual path sees: weather, or all inputs")
    tokens: str = option("both", "tokens that the head reads: day, site or both")
    width: int = option(64, "hidden width of head and baseline")
    steps: int = option(600, "optimiser steps")
    batch_size: int = option(32, "windows per step")
    lr: float = option(2e-3, "peak learning rate")
    dropout: float = option(0.2, "before the LSTM and before the output")
    warmup: int = option(120, "first days of a window that are not scored")
    cache_gb: float = option(4.0, "encoded windows beyond this go to a memory map on disk")
    allow_overlap: bool = option(False, "test on sites the checkpoint has seen; the run says so")
    device: str = option("", "cuda, cpu …; empty: cuda if there is one")
    quick: bool = option(False, "the same path in under a minute, nothing learned")


VARIANTS = {  # how the encoder is used, what the residual path sees, the head
    "resconn": ("frozen", "weather", "lstm"),
    "noresconn": ("frozen", "", "lstm"),
    "linear": ("frozen", "", "linear"),
    "scratch": ("random", "weather", "lstm"),
    "direct": ("direct", "", ""),
    "lstm": ("", "all", "lstm"),
}
ADAPTERS = {  # what is added to x = E + r
    "residual": lambda d: None,
    "feedforward": lambda d: nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.Linear(d, d)),
    "bottleneck": lambda d: nn.Sequential(nn.Linear(d, d // 8), nn.GELU(), nn.Linear(d // 8, d)),
    "gated": lambda d: nn.Sequential(nn.Linear(d, 2 * d), nn.GLU()),
    "experts": lambda d: Experts(d, 4),
}


class Predictor(nn.Module):
    """Tokens of the encoder and residual path -> adapter -> head: a number per day, (B, L)."""

    def __init__(self, variant, sites, encoder, o):
        super().__init__()
        (use, reads, head), d = VARIANTS[variant], o.width
        self.reads = o.residual if use and reads else reads
        self.encoder = encoder if use == "random" else None
        n = len(sites.dynamic_names)
        n = n if self.reads == "weather" else 2 * (n + len(sites.static_names))
        if use:
            wide = encoder.config.d_model
            self.norms = nn.ModuleList([nn.LayerNorm(wide), nn.LayerNorm(wide)])
            self.gain = nn.Parameter(torch.tensor([o.tokens != "site", o.tokens != "day"]).float())
            self.expand = nn.Linear(wide, d) if wide != d else nn.Identity()
        if self.reads:
            self.conv, self.mix = nn.Conv1d(n, d, 3, padding=1), nn.Linear(d, d)
        self.adapter = ADAPTERS[o.adapter](d) if use else None
        self.lstm = nn.LSTM(d, d, batch_first=True) if head == "lstm" else None
        self.dropout, self.output = Dropout(o.dropout), nn.Linear(d, 1)

    def forward(self, encoded, forcing, static, latlon, doy):
        """encoded (B, L+1, D) of the frozen encoder, or None; the rest as from Windows.get."""
        x = 0
        if self.encoder is not None:
            encoded = self.encoder.encode(forcing, static, latlon, doy)
        if encoded is not None:
            day, site = self.norms[0](encoded[:, :-1]), self.norms[1](encoded[:, -1:])
            x = self.expand(self.gain[0] * day + self.gain[1] * site)           # (B, L, width)
        if self.reads:
            r = forcing.nan_to_num()
            if self.reads == "all":
                site = torch.cat([static.nan_to_num(), static.isnan().float()], -1)
                site = site[:, None].expand(-1, forcing.shape[1], -1)
                r = torch.cat([r, forcing.isnan().float(), site], -1)
            x = x + self.mix(self.conv(r.mT).mT)                                # (B, L, width)
        x = x if self.adapter is None else x + self.adapter(x)
        x = self.dropout(x) if self.lstm is None else self.lstm(self.dropout(x))[0]
        return self.output(self.dropout(x))[..., 0]                             # (B, L)


class Experts(nn.Module):
    """Mixture of n linear experts, softly gated: (B, L, d) -> (B, L, d)."""

    def __init__(self, d, n):
        super().__init__()
        self.gate, self.experts = nn.Linear(d, n), nn.Linear(d, n * d)

    def forward(self, x):
        weight = self.gate(x).softmax(-1)[..., None]                            # (B, L, n, 1)
        return (self.experts(x).unflatten(-1, (-1, x.shape[-1])) * weight).sum(-2)


class Direct(nn.Module):
    """The pretrained network end to end, with streamflow as one more, always hidden, variable."""

    def __init__(self, pretrained):
        super().__init__()
        c = pretrained.config
        self.network = StefaLand(replace(c, dynamic_names=(*c.dynamic_names, "flow"),
                                         dynamic_groups=(*c.dynamic_groups, "flow")))
        for key, value in self.network.state_dict().items():
            old = pretrained.state_dict()[key]
            value[tuple(map(slice, old.shape))] = old       # the new variable's weights come last

    def forward(self, encoded, forcing, static, latlon, doy):
        forcing = torch.cat([forcing, torch.full_like(forcing[..., :1], torch.nan)], -1)
        return self.network.decode(self.network.encode(forcing, static, latlon, doy))[0][..., -1]


def load_encoder(path, sites, device):
    """The frozen network of a checkpoint, its scaling and sites, and `sites` in its variables."""
    if not Path(path).exists():
        raise FileNotFoundError(f"no checkpoint {path}: run python train.py first")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model = StefaLand(Config(**saved["config"]))
        model.load_state_dict(saved["model"])
    except Exception as error:
        raise ValueError(f"{path} is no checkpoint of train.py: {error}") from error
    arranged = {}
    for field, name in (("forcing", "dynamic_names"), ("static", "static_names")):
        own, known, values = getattr(sites, name), getattr(model, name), getattr(sites, field)
        absent, extra = [n for n in known if n not in own], [n for n in own if n not in known]
        if absent or extra:
            print(f"{field}: fed to the encoder as missing {absent}, unknown to it {extra}")
        blank = np.full_like(values[..., :1], np.nan)
        columns = [own.index(n) if n in own else len(own) for n in known]
        arranged |= {field: np.concatenate([values, blank], -1)[..., columns], name: known}
    return model.to(device).eval().requires_grad_(False), saved, replace(sites, **arranged)


def encode_windows(model, windows, site, start, o, device):
    """The frozen encoder's output for fixed windows, once: (n, L+1, D) half, on disk if large."""
    shape = (len(site), windows.days + 1, model.config.d_model)
    if np.prod(shape) * 2 <= o.cache_gb * 1e9:
        store = torch.empty(shape, dtype=torch.float16)
    else:
        file = tempfile.TemporaryFile(dir=o.out)
        store = torch.from_numpy(np.memmap(file, np.float16, "w+", shape=shape))
    with torch.no_grad():
        for i in torch.arange(len(site)).split(64):
            batch = [x.to(device) for x in windows.get(site[i], start[i])]
            store[i] = model.encode(*batch).half().cpu()
    return store


def tile(chosen, days, length, warmup):
    """Windows that cover the days of a slice at every chosen site: site (n,), start (n,)."""
    starts = np.arange(max(days.start - warmup, 0), max(days.stop - warmup, 1), length - warmup)
    starts = np.unique(np.minimum(starts, max(days.stop - length, 0)))
    return np.repeat(chosen, len(starts)), np.tile(starts, len(chosen))


def day_slice(text, dates, default):
    """"FROM/TO", both included, or a default pair of shares -> slice of `dates`."""
    if not text:
        return slice(*(int(share * len(dates)) for share in default))
    first, last = map(np.datetime64, text.split("/"))
    if not dates[0] <= first < last <= dates[-1]:
        raise ValueError(f"period {text} is not within the data, {dates[0]} to {dates[-1]}")
    return slice(int((first - dates[0]).astype(int)), int((last - dates[0]).astype(int)) + 1)


def run(o, variant, sites, fold_of, fold, seed):
    """Train one model on one fold. Returns what the run's file holds."""
    device, began, rng = setup(o.device)[2], time.time(), np.random.default_rng([seed, fold])
    torch.manual_seed(seed)
    use = VARIANTS[variant][0]
    keys, T = np.array([data.gauge(i) for i in sites.ids]), len(sites.dates)
    wanted = np.isin(keys, Path(o.basins).read_text().split()) if o.basins else keys == keys
    wanted &= ~np.isnan(sites.target).all(1)
    test = np.flatnonzero(wanted & (fold_of == fold))
    pool = rng.permutation(np.flatnonzero(wanted & (fold_of != fold)))[:o.labelled or None]
    validation, training = map(np.sort, np.split(pool, [max(len(pool) // 7, 1)]))
    if not len(test) or not len(training):
        raise ValueError(f"fold {fold}: {len(test)} test and {len(training)} training sites")
    past, future = (day_slice(o.train_period, sites.dates, (0, 0.6)),
                    day_slice(o.test_period, sites.dates, (0.6, 1)))
    if o.missing:                                           # hide attribute groups at test sites
        group_of = np.array([data.GROUP.get(n, n) for n in sites.static_names])
        static = sites.static.copy()
        for group in sorted({*group_of} - {"context"}):
            static[np.ix_(test[rng.random(len(test)) < o.missing], group_of == group)] = np.nan
        sites = replace(sites, static=static)

    # inputs: windows on the head's own scaling, and what the frozen encoder makes of them
    scaling = {"forcing": fit_scaling(sites.forcing[training, past]),
               "static": fit_scaling(sites.static[fold_of != fold])}
    encoder, view, overlap, length = None, sites, 0, min(365, T)
    if use:
        path = (o.checkpoint or f"{o.out}/pretrained.pt").replace("{fold}", str(fold))
        encoder, saved, view = load_encoder(path, sites, device)
        overlap = int(np.isin(keys[test], [*map(data.gauge, saved["ids"])]).sum())
        if overlap and not o.allow_overlap:
            raise ValueError(f"{path} has seen {overlap} of the {len(test)} test sites; pretrain "
                             f"with --holdout {o.holdout} --folds {o.folds} --fold {fold}")
        length = encoder.config.max_days
    frozen = use == "frozen"
    inputs = Windows(view, saved["scaling"], length) if use else None
    windows = Windows(sites, scaling, length) if frozen or not use else inputs
    sets = {key: tile(chosen, days, length, o.warmup) for key, chosen, days in (
        ("training", training, past), ("validation", validation, past), ("test", test, future))}
    coded = {key: encode_windows(encoder, inputs, *windows_of, o, device)
             for key, windows_of in sets.items() if frozen}
    if use == "direct":
        model = Direct(encoder).to(device)
    else:
        encoder = StefaLand(encoder.config) if use == "random" else encoder
        model = Predictor(variant, view if use == "random" else sites, encoder, o).to(device)

    # target: square root of the flow, standardised; errors weighted as in NSE, per site
    root = np.sqrt(np.maximum(sites.target, 0))                                 # (N, T)
    centre, spread = np.nanmean(root[training, past]), np.nanstd(root[training, past])
    weight = np.full(len(keys), np.nan, np.float32)
    weight[training] = 1 / (np.nanstd(root[training, past], 1) / spread + 0.1) ** 2
    target = torch.from_numpy((root - centre) / spread).float().unfold(1, length, 1)
    weight = torch.from_numpy(weight).to(device)

    def predict(key, i):
        site, start = (x[i] for x in sets[key])
        batch = [x.to(device) for x in windows.get(site, start)]
        return model(coded[key][i].to(device).float() if frozen else None, *batch)

    def simulate(key, chosen, days):                        # flow in mm/d, (sites, days)
        flow = np.full((len(keys), T), np.nan, np.float32)
        site, start = sets[key]
        late_first = np.argsort(-start, kind="stable")      # warmed-up days overwrite the others
        model.eval()
        with torch.no_grad():
            for i in np.array_split(late_first, len(site) // 128 + 1):
                for j, y in zip(i, predict(key, i).cpu().numpy() * spread + centre):
                    skip = o.warmup if start[j] else 0
                    flow[site[j], start[j] + skip:start[j] + length] = np.maximum(y[skip:], 0) ** 2
        model.train()
        flow, obs = flow[chosen, days], sites.target[chosen, days]
        return flow, np.array([site_metrics(a, b)["nse"] for a, b in zip(obs, flow)])

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, o.lr, weight_decay=1e-2)
    best, kept, seconds = -np.inf, model.state_dict(), 0.0
    for step in range(o.steps):
        tick = time.time()
        i = rng.choice(len(sets["training"][0]), o.batch_size)
        site, start = (x[i] for x in sets["training"])
        truth = target[site, start].to(device)                                  # (B, L)
        scored = ~truth.isnan()
        scored[:, :o.warmup] = False
        for group in optimizer.param_groups:
            group["lr"] = o.lr * learning_rate(step / o.steps)
        error = (predict("training", i) - truth.nan_to_num()).square() * weight[site, None]
        loss = (error * scored).sum() / scored.sum().clamp(min=1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        seconds += time.time() - tick
        if (step + 1) % max(o.steps // 10, 1) == 0:         # early stopping on validation sites
            score = np.nanmean(np.clip(simulate("validation", validation, past)[1], -1, 1))
            if score > best:
                best, kept = score, {k: x.clone() for k, x in model.state_dict().items()}
    model.load_state_dict(kept)
    sim, nse = simulate("test", test, future)
    epoch = seconds / o.steps * len(sets["training"][0]) / o.batch_size
    print(f"fold {fold} seed {seed} {variant:<10} {len(training)} + {len(validation)} sites, "
          f"validation {best:.3f}; test NSE median {np.nanmedian(nse):.3f}, mean of clipped "
          f"{np.nanmean(np.clip(nse, -1, 1)):.3f}, {np.nanmean(nse < 0):.0%} below 0; "
          f"{epoch:.1f} s an epoch, {time.time() - began:.0f} s in all", flush=True)
    return dict(ids=sites.ids[test], latlon=sites.latlon[test], dates=sites.dates[future],
                obs=sites.target[test, future], sim=sim, overlap=overlap, validation=best)


def main(argv=None):
    o = parse(Options, __doc__, argv)
    variants = o.model.split(",")
    for given, known in [*((v, VARIANTS) for v in variants), (o.adapter, ADAPTERS)]:
        if given not in known:
            raise ValueError(f"'{given}': expected one of {', '.join(known)}")
    if o.quick:
        o.steps, o.batch_size = min(o.steps, 10), 8
    world = dict(n_sites=60, years=3) if o.quick else {}
    sites = data.load(o.data, cache=Path(o.out) / "cache", **world)
    fold_of = data.folds(sites, o.holdout, o.folds)
    setting = f"streamflow {o.data.partition(':')[0]} {o.holdout}{o.folds}" + "".join(
        f", {key} {getattr(o, key):g}" for key in ("missing", "labelled") if getattr(o, key))
    for fold in range(o.folds) if o.fold == "all" else map(int, o.fold.split(",")):
        for seed in range(o.seed, o.seed + o.seeds):
            for variant in variants:
                changed = [getattr(o, key) for key in ("adapter", "residual", "tokens")
                           if getattr(o, key) != getattr(Options, key) and variant != "lstm"]
                name = " ".join([variant, *changed])
                path = Path(o.out, "runs", f"{setting}, {name}, fold {fold}, seed {seed}.npz")
                if path.exists():
                    print(f"{path}: done before")
                    continue
                arrays = run(o, variant, sites, fold_of, fold, seed)
                settings = vars(o) | dict(setting=setting, name=name, fold=fold, seed=seed)
                data.write_atomically(path, lambda file: np.savez_compressed(
                    file, settings=json.dumps(settings), **arrays))


if __name__ == "__main__":
    main()
