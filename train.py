"""Pretrain StefaLand by hiding groups of variables and reconstructing them.

    python train.py                                     the synthetic world, minutes on 2 CPU cores
    python train.py --data caravan:DIR,camels:DIR       real basins
    python train.py --preset paper --data …             the paper's size, also in several processes:
    torchrun --nproc_per_node=4 train.py --data …       each takes its share of every batch
    python train.py --resume                            after Ctrl-C, bit for bit
    python train.py --benchmark --preset paper          speed, and share of the machine's peak

Writes out/pretrained.pt and prints, at the end, how well hidden groups are reconstructed at sites
that were never trained on.
"""

import argparse
import ast
import ctypes
import dataclasses
import math
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import data
from model import PRESETS, Config, Linear, StefaLand, masked_loss


def option(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Options:
    data: str = option("synthetic", "synthetic, or sources: caravan:DIR,camels:DIR")
    out: str = option("out", "folder of the checkpoint and of the cache of parsed archives")
    preset: str = option("small", "size of the network and of its training: small or paper")
    config: str = option("", "changes to fields of model.Config, such as dropout=0,p_static=0.5")
    steps: int = option(0, "optimiser steps; 0: the preset's")
    batch_size: int = option(0, "windows per step, over all processes; 0: the preset's")
    lr: float = option(0.0, "peak learning rate (warm-up, then cosine); 0: the preset's")
    seq_len: int = option(365, "days in a window")
    holdout: str = option("pub", "the fold left out: pub (random sites), pur (regions) or none")
    folds: int = option(5, "number of folds of --holdout")
    fold: int = option(0, "the fold that --holdout leaves out")
    seed: int = option(0, "of weights, windows and masks (the folds have their own)")
    device: str = option("", "cuda, cpu …; empty: cuda if there is one")
    dtype: str = option("auto", "float32, bfloat16 (autocast), or auto: what is faster here")
    save_every: int = option(200, "steps between checkpoints")
    resume: bool = option(False, "continue the checkpoint in --out, with its options")
    benchmark: bool = option(False, "time training steps on random data and exit")
    quick: bool = option(False, "the same path in under a minute, nothing learned")


TRAINING = {"small": dict(steps=1200, batch_size=32, lr=2e-3),
            "paper": dict(steps=33000, batch_size=256, lr=1e-4)}    # 25 x 8,634 sites x 39 years


def train(o, sites):
    """All of pretraining. Returns the median seconds of a step and the model."""
    rank, world, device = setup(o.device)
    say = print if rank == 0 else lambda *args, **kwargs: None
    checkpoint, saved = Path(o.out) / "pretrained.pt", None
    training, validation = split(sites, o)
    say(f"{len(training)} sites to train on, {len(validation)} to validate on"
        + f", fold {o.fold} of {o.folds} ({o.holdout}) left out" * (o.holdout != "none"))

    torch.manual_seed(o.seed)
    names = dict(dynamic_names=sites.dynamic_names, static_names=sites.static_names)
    groups = {key.replace("names", "groups"): tuple(data.GROUP.get(n, n) for n in value)
              for key, value in names.items()}
    changes = dict(pair.split("=") for pair in o.config.split(",") if pair)
    changes = {key: ast.literal_eval(value) for key, value in changes.items()}
    config = Config(**names, **groups, max_days=o.seq_len, **PRESETS[o.preset] | changes)
    scaling = {key: fit_scaling(getattr(sites, key)[training]) for key in ("forcing", "static")}
    model, step = StefaLand(config).to(device), 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=o.lr, weight_decay=0.0, fused=True)
    if o.resume:
        saved = torch.load(checkpoint, weights_only=True)
        if Config(**saved["config"]) != config:
            raise ValueError(f"--resume: {checkpoint} is of another model: {saved['config']}")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, scaling = saved["step"], saved["scaling"]
        say(f"resuming at step {step}")
    windows = Windows(sites, scaling, o.seq_len)
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    o.dtype = choose_dtype(o.dtype, device, config.d_model)     # kept for --resume
    size = sum(p.numel() for p in model.parameters())
    say(f"{size:,} parameters, {device}, {o.dtype}, {world} process(es)")

    stop, seconds, shown = [], [], 0.0
    for number in (signal.SIGINT, signal.SIGTERM):          # Ctrl-C ends the loop after a step
        signal.signal(number, lambda *_: stop.append(1))
    model.train()
    while step < o.steps and not stop:
        began = time.perf_counter()
        # All randomness follows from (seed, step): a resumed run needs no generator state. Every
        # process draws the whole batch and keeps its share: their number changes nothing.
        seed = o.seed * 1_000_003 + step
        torch.manual_seed(seed * 1009 + rank)               # dropout
        site, start = windows.draw(training, o.batch_size, np.random.default_rng(seed))
        generator = torch.Generator(device).manual_seed(seed)
        hidden = model.draw_masks(o.batch_size, o.seq_len, generator)
        share = slice(rank * o.batch_size // world, (rank + 1) * o.batch_size // world)
        batch = [x.to(device) for x in windows.get(site[share], start[share])]
        for group in optimizer.param_groups:
            group["lr"] = o.lr * learning_rate(step / o.steps)

        with torch.autocast(device.type, torch.bfloat16, enabled=o.dtype == "bfloat16"):
            errors, counts = wrapped(*batch, hidden=[h[share] for h in hidden])
        counts = torch.cat([counts, counts.new_tensor([len(stop)])])
        if world > 1:                                       # the mean is over the whole batch
            dist.all_reduce(counts)
        loss = masked_loss(errors * world, counts[:2])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"step {step}: loss {loss.item()}, gradient norm "
                                     f"{norm.item()}; {checkpoint} keeps the last good state")
        optimizer.step()
        step, stop = step + 1, [1] * int(counts[2] > 0)
        seconds.append(time.perf_counter() - began)

        if rank == 0 and not o.benchmark and (step % o.save_every == 0 or step == o.steps or stop):
            state = dict(version=1, config=dataclasses.asdict(config), scaling=scaling, step=step,
                         model=model.state_dict(), optimizer=optimizer.state_dict(),
                         ids=sites.ids[training].tolist(), options=dataclasses.asdict(o),
                         latlon=torch.tensor(sites.latlon[training]))
            data.write_atomically(checkpoint, lambda file: torch.save(state, file))
        if time.time() - shown > 10 or step == o.steps:
            shown, pace = time.time(), np.mean(seconds[-200:])
            dynamic, static = (errors.detach() * world / counts[:2].clamp(min=1)).tolist()
            say(f"step {step}/{o.steps}  masked loss: dynamic {dynamic:.3f}, static {static:.3f}  "
                f"{o.batch_size / pace:.0f} samples/s  {(o.steps - step) * pace / 60:.1f} min left",
                flush=True)
    if stop:
        say(f"stopped after step {step}; continue with --resume")
    elif rank == 0 and len(validation) and not o.benchmark:
        report(model, windows, training, validation, device)
    if world > 1:
        dist.destroy_process_group()
    return np.median(seconds[2:]), model


class Windows:
    """Standardised sites, served as windows of L days without copying the data set."""

    def __init__(self, sites, scaling, days):
        if len(sites.dates) < days:
            raise ValueError(f"{len(sites.dates)} days of data, windows of {days}: lower --seq-len")
        forcing = scale(sites.forcing, scaling["forcing"])                      # (N, T, C)
        seen = ~np.isnan(forcing).all(-1)                                       # (N, T)
        self.first, self.last = seen.argmax(1), seen.shape[1] - seen[:, ::-1].argmax(1)
        self.days, self.forcing = days, torch.from_numpy(forcing)
        self.static = torch.from_numpy(scale(sites.static, scaling["static"]))  # (N, S)
        self.latlon = torch.from_numpy(sites.latlon)
        self.day_of_year = torch.from_numpy(data.day_of_year(sites.dates)).float()  # (T,)

    def draw(self, among, B, rng):
        """Random windows of B sites drawn from `among`, or of each of them: site, start (B,)."""
        site = among if B is None else rng.choice(among, B)
        room = np.maximum(self.last[site] - self.days - self.first[site], 0)
        start = self.first[site] + rng.integers(0, room + 1)
        return site, np.minimum(start, self.forcing.shape[1] - self.days)

    def get(self, site, start):
        """forcing (B, L, C), static (B, S), latlon (B, 2), day_of_year (B, L)."""
        forcing = self.forcing.unfold(1, self.days, 1)      # (N, T-L+1, C, L), a view
        days = self.day_of_year.unfold(0, self.days, 1)     # (T-L+1, L), a view
        forcing = forcing[site, start].mT.contiguous()
        return forcing, self.static[site], self.latlon[site], days[start]


def report(model, windows, training, validation, device, repeats=4):
    """Print R2 of each hidden group at the validation sites, beside a yardstick and the mean.

    Yardsticks are fitted on the training sites: ridge regression on the attributes left visible
    (static groups), day-of-year climatology (dynamic groups, hidden for 60 days).
    """
    c, model, table = model.config, model.eval(), windows.static.numpy()
    site, start = windows.draw(np.repeat(validation, repeats), None, np.random.default_rng(0))
    forcing, static, latlon, doy = windows.get(site, start)
    block = slice(windows.days // 2, windows.days // 2 + 60)
    past = windows.forcing[training]                                            # (N, T, C)
    climatology = torch.stack([past[:, windows.day_of_year == d].flatten(0, 1).nanmean(0)
                               for d in range(1, 367)])                         # (366, C)

    def reconstruct(hidden):
        with torch.no_grad():
            inputs = (forcing, static, latlon, doy, *hidden)
            parts = [model.decode(model.encode(*x[:4], hidden=x[4:])) for x in
                     zip(*([y.to(device) for y in x.split(64)] for x in inputs))]
        return [torch.cat(p).cpu() for p in zip(*parts)]                        # (B, L, C), (B, S)

    print(f"\nR2 of hidden groups at {len(validation)} validation sites, mean over variables\n"
          f"{'group':<24}{'StefaLand':>10}{'yardstick':>11}{'mean':>8}")
    for kind, groups in (("static", c.static_groups), ("dynamic", c.dynamic_groups)):
        for group in sorted({*groups} - {"context"}):
            member = torch.tensor([g == group for g in groups])
            hidden = [torch.zeros_like(x).bool() for x in (forcing, static, latlon[:, 0])]
            if kind == "static":
                hidden[1][:, member] = True
                guess = reconstruct(hidden)[1].unflatten(0, (-1, repeats)).mean(1)
                guess = guess[:, member].numpy()
                truth = table[validation][:, member]
                shown, new = table[training][:, ~member], table[validation][:, ~member]
                simple = np.stack([ridge(shown, y, new) for y in table[training][:, member].T], 1)
            else:
                hidden[0][:, block, member] = True
                guess = reconstruct(hidden)[0][:, block, member].flatten(0, 1).numpy()
                truth = forcing[:, block, member].flatten(0, 1).numpy()
                simple = climatology[doy[:, block].long() - 1][..., member].flatten(0, 1).numpy()
            scores = (r_squared(truth, x) for x in (guess, simple, 0 * guess))
            print(f"{kind + ' ' + group:<24}" + "{:>10.3f}{:>11.3f}{:>8.3f}".format(*scores))


def r_squared(truth, guess):
    """1 - SSE/SST per column over observed entries, mean over columns: (N, V), (N, V) -> float."""
    seen = ~np.isnan(truth).all(0)
    truth, guess = truth[:, seen], guess[:, seen]
    sse, sst = np.nansum((truth - guess) ** 2, 0), np.nansum((truth - np.nanmean(truth, 0)) ** 2, 0)
    return float(np.mean(1 - sse / sst))


def ridge(x, y, x_new):
    """Ridge regression with generalised cross-validation; missing x = mean, missing y left out."""
    x, x_new, y = np.nan_to_num(x[~np.isnan(y)]), np.nan_to_num(x_new), y[~np.isnan(y)]
    u, s, vt = np.linalg.svd(x - x.mean(0), full_matrices=False)
    shrink = s ** 2 / (s ** 2 + np.logspace(-2, 5, 30)[:, None])                # (penalties, S)
    fits = shrink * (u.T @ (y - y.mean())) @ u.T                                # (penalties, N)
    best = (((y - y.mean() - fits) ** 2).sum(1) / (len(y) - 1 - shrink.sum(1)) ** 2).argmin()
    return y.mean() + (x_new - x.mean(0)) @ (vt.T @ (shrink[best] / s * (u.T @ (y - y.mean()))))


def fit_scaling(values):
    """Statistics of (..., V) *training* values for scale(): (3, V) log flag, mean, std.

    Variables never negative and skewed (precipitation, areas) are scaled as log(1 + x); a
    variable that is missing everywhere gets NaN and stays missing.
    """
    v = np.ma.masked_invalid(values).reshape(-1, np.shape(values)[-1]).astype(np.float64)
    skew = (((v - v.mean(0)) / v.std(0)) ** 3).mean(0)
    log = ((v.min(0) >= 0) & (skew > 2)).filled(False)
    v = np.ma.where(log, np.log1p(np.ma.maximum(v, 0)), v)
    std = v.std(0).filled(np.nan)
    return torch.tensor(np.stack([log, v.mean(0).filled(np.nan), np.where(std < 1e-6, 1, std)]))


def scale(values, scaling):
    """Standardise (..., V) with the statistics of fit_scaling; NaN stays NaN."""
    log, mean, std = scaling.numpy()
    values = np.where(log > 0, np.log1p(np.maximum(values, 0)), values)
    return ((values - mean) / std).astype(np.float32)


def learning_rate(progress):
    """Share of the peak: linear warm-up over the first 5 %, then a cosine down to 2 %."""
    cosine = math.cos(math.pi * max(progress - 0.05, 0) / 0.95)
    return min(progress / 0.05 + 1e-3, 0.51 + 0.49 * cosine)


def split(sites, o):
    """Indices of training and validation sites (a tenth); the fold held out is in neither."""
    tenth = data.folds(sites, "pub", 10, seed=1) == 0
    fold = data.folds(sites, o.holdout, o.folds) if o.holdout != "none" else -1
    kept = np.broadcast_to(fold != o.fold, tenth.shape)
    return np.flatnonzero(kept & ~tenth), np.flatnonzero(kept & tenth)


def setup(device):
    """(rank, processes, device); joins torchrun's group, nccl on CUDA and gloo on the CPU."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = os.environ.get("LOCAL_RANK", 0)
    device = torch.device(device or (f"cuda:{local}" if torch.cuda.is_available() else "cpu"))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:    # glibc: keep freed blocks (M_MMAP_MAX, M_TRIM_THRESHOLD); faults are a tenth of a step
        ctypes.CDLL(None).mallopt(-4, 0), ctypes.CDLL(None).mallopt(-1, 2 ** 31 - 1)
    except (OSError, AttributeError, TypeError):
        pass                                                # another C library: only slower
    return rank, world, device


def choose_dtype(asked, device, width):
    """"auto" -> bfloat16 on CUDA, and on CPUs where wide products are 1.7 times as fast in it."""
    if asked != "auto":
        return asked
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    speed = {dtype: product_speed(dtype, device, width) for dtype in ("float32", "bfloat16")}
    return "bfloat16" if width >= 128 and speed["bfloat16"] > 1.7 * speed["float32"] else "float32"


def product_speed(dtype, device, width):
    """GFLOP/s of a product of (8192, width) with (width, width), the best of 20 tries."""
    dtype, best = getattr(torch, dtype), math.inf
    x = torch.randn(16, 512, width, device=device, dtype=dtype)
    layer = Linear(width, width).to(device, dtype)
    for _ in range(20):
        began = time.perf_counter()
        with torch.no_grad():
            layer(x).flatten()[0].item()
        best = min(best, time.perf_counter() - began)
    return 2 * x.numel() * width / best / 1e9


def benchmark(o):
    """Time train() on random data, 6 daily and 26 static variables; print its speed."""
    o.steps, rng, T = 10, np.random.default_rng(0), o.seq_len
    sites = data.Sites(np.arange(64).astype(str), rng.standard_normal((64, 2), np.float32),
                       rng.standard_normal((64, 26), np.float32),
                       rng.standard_normal((64, T, 6), np.float32), None,
                       np.datetime64("2000-01-01") + np.arange(T), tuple(map(str, range(26))),
                       tuple("abcdef"))
    seconds, model = train(o, sites)
    matrices = sum(p.numel() for k, p in model.named_parameters()
                   if p.dim() == 2 and not k.startswith(("static", "location", "position")))
    attention = 12 * len(model.encoder) * (T + 1) ** 2 * model.config.d_model
    flop = 6 * matrices * (T + 1) + attention                                   # per sample
    rate, peak = o.batch_size / seconds, product_speed(o.dtype, model.position.device, 1024)
    print(f"{rate:.1f} samples/s, batch {o.batch_size}, {o.dtype}, {torch.get_num_threads()} threads; "
          f"{rate * flop / 1e9:.0f} GFLOP/s, {rate * flop / 1e9 / peak:.0%} of a large product's")


def parse(options, description, argv, defaults=None):
    """The command line as an instance of a dataclass of options; --seq-len is its field seq_len."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in dataclasses.fields(options):
        kind = dict(action="store_true") if f.default is False else dict(type=type(f.default))
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, **kind,
                            help=f.metadata["help"] + f" [{f.default}]" * bool(f.default))
    parser.set_defaults(**defaults or {})
    return options(**vars(parser.parse_args(argv)))


def main(argv=None):
    o = parse(Options, __doc__, argv)
    if o.resume:
        path = Path(o.out) / "pretrained.pt"
        if not path.exists():
            raise FileNotFoundError(f"--resume: there is no {path}")
        o = parse(Options, __doc__, argv, torch.load(path, weights_only=True)["options"])
    if o.preset not in PRESETS:
        raise ValueError(f"--preset {o.preset}: expected one of {[*PRESETS]}")
    for name, value in TRAINING[o.preset].items():
        setattr(o, name, getattr(o, name) or value)
    if o.quick:
        o.steps, o.batch_size = min(o.steps, 20), min(o.batch_size, 8)
    if o.benchmark:
        benchmark(o)
    else:
        world = dict(n_sites=60, years=3) if o.quick else {}
        train(o, data.load(o.data, cache=Path(o.out) / "cache", **world))


if __name__ == "__main__":
    main()
