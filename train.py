"""Pretrain StefaLand by hiding groups of variables and reconstructing them.

    python train.py                                     the synthetic world, minutes on 2 CPU cores
    python train.py --data caravan:DIR,camels:DIR       real basins
    python train.py --data caravan:DIR --static-only    their attributes alone, of all gauges
    torchrun --nproc_per_node=4 train.py --preset paper --data …
    python train.py --resume                            after Ctrl-C, bit for bit

Writes out/pretrained.pt and prints, at the end, how well hidden groups are reconstructed at sites
that were never trained on.
"""

import argparse
import ast
import ctypes
import io
import math
import os
import pickle
import platform
import signal
import time
import zipfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import data
from model import NEVER_HIDDEN, PRESETS, Config, StefaLand, masked_loss


def option(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Options:
    data: str = option("synthetic", "synthetic, or sources: caravan:DIR,camels:DIR")
    out: str = option("out", "folder of the checkpoint and of the cache of parsed archives")
    preset: str = option("small", "size of the network and of its training: small or paper")
    config: str = option("", "changes to fields of model.Config, such as dropout=0,p_static=0.5")
    static_only: bool = option(False, "attributes alone, also of gauges without a series")
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
    quick: bool = option(False, "the same path in under a minute, nothing learned")


VERSION = 1                                                 # of the checkpoint's format
TRAINING = {"small": dict(steps=1200, batch_size=32, lr=2e-3),
            "paper": dict(steps=33000, batch_size=256, lr=1e-4)}    # 25 x 8,634 sites x 39 years


def train(o, sites):
    """All of pretraining, on every process; the first one prints and writes the checkpoint."""
    rank, world, device = setup(o.device)
    say = print if rank == 0 else lambda *args, **kwargs: None
    checkpoint, step = Path(o.out) / "pretrained.pt", 0
    tenth = data.folds(sites, "pub", 10, seed=1) == 0       # for validation
    kept = o.holdout == "none" or data.folds(sites, o.holdout, o.folds) != o.fold
    training, validation = np.flatnonzero(~tenth & kept), np.flatnonzero(tenth & kept)

    torch.manual_seed(o.seed)
    names = sites.dynamic_names, sites.static_names
    groups = [tuple(data.GROUP.get(name, name) for name in kind) for kind in names]
    changes = [pair.split("=") for pair in o.config.split(",") if pair]
    changes = {"max_days": o.seq_len} | {key: ast.literal_eval(text) for key, text in changes}
    config = Config(*names, *groups, **PRESETS[o.preset] | changes)
    model = StefaLand(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=o.lr, weight_decay=0.0, fused=True)
    some = training[::(len(training) - 1) // 2000 + 1]      # statistics of at most 2,000 sites
    scaling = {key: fit_scaling(getattr(sites, key)[some]) for key in ("forcing", "static")}
    ids, latlon = sites.ids[training].tolist(), torch.tensor(sites.latlon[training])
    if o.resume:
        old, saved = load_checkpoint(checkpoint)
        data.check(old.config == config and saved["ids"] == ids,
                   f"--resume: {checkpoint} is of another model or of other training sites")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, scaling = saved["step"], saved["scaling"]
    windows = Windows(sites, scaling, o.seq_len)
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    if o.dtype == "auto":                                   # kept for --resume
        wide = config.d_model >= 128 and torch.cpu._is_avx512_bf16_supported()
        o.dtype = "bfloat16" if device.type == "cuda" or wide else "float32"
    say(f"{len(training)} sites to train on, {len(validation)} to validate on"
        + f", fold {o.fold} of {o.folds} ({o.holdout}) left out" * (o.holdout != "none")
        + f"\n{sum(p.numel() for p in model.parameters()):,} parameters, {device}, {o.dtype}, "
        + f"{world} process(es)" + f", resuming at step {step}" * o.resume)

    asked, stop, first, began, shown = [], False, step, time.time(), 0.0
    for number in (signal.SIGINT, signal.SIGTERM):          # Ctrl-C ends the loop after a step
        signal.signal(number, lambda *_: asked.append(1))
    model.train()
    while True:
        done = stop or step >= o.steps
        # the first checkpoint is of step 0, so that any run can be resumed
        if rank == 0 and (done or step % o.save_every == 0) and (step > first or step == 0):
            state = dict(version=VERSION, config=asdict(config), options=asdict(o), step=step,
                         ids=ids, latlon=latlon, scaling=scaling,
                         model=model.state_dict(), optimizer=optimizer.state_dict())
            torch.save(state, buffer := io.BytesIO())       # to a full disk, it hides the reason
            data.write_atomically(checkpoint, lambda file: file.write(buffer.getbuffer()))
        if done:
            break
        # All randomness follows from (seed, step): a resumed run needs no generator state. Every
        # process draws the whole batch and keeps its share: their number changes nothing.
        seed = o.seed * 1_000_003 + step
        generator = torch.Generator(device).manual_seed(seed)
        torch.manual_seed(seed * 1009 + rank)               # dropout
        rng = np.random.default_rng(seed)
        site = rng.choice(training, o.batch_size)
        start = windows.starts(site, rng)
        hidden = model.draw_masks(o.batch_size, o.seq_len, generator)
        share = slice(rank * o.batch_size // world, (rank + 1) * o.batch_size // world)
        batch = windows.get(site[share], start[share], device)
        with torch.autocast(device.type, torch.bfloat16, enabled=o.dtype == "bfloat16"):
            errors, counts = wrapped(*batch, hidden=[h[share] for h in hidden])
        counts = torch.cat([counts, counts.new_tensor([len(asked)])])
        if world > 1:                                       # the mean is over the whole batch
            dist.all_reduce(counts)
        loss = masked_loss(errors * world, counts[:2])
        descend(optimizer, loss, o.lr * learning_rate(step / o.steps), clip=5.0,
                where=f"step {step}; {checkpoint} keeps the last good state")
        step, stop = step + 1, bool(counts[2] > 0)
        if time.time() - shown > 10 or step == o.steps:
            shown, pace = time.time(), (time.time() - began) / (step - first)
            dynamic, static = (errors.detach() * world / counts[:2].clamp(min=1)).tolist()
            say(f"step {step}/{o.steps}  masked loss: dynamic {dynamic:.3f}, static {static:.3f}  "
                f"{o.batch_size / pace:.1f} samples/s  {(o.steps - step) * pace / 60:.1f} min left",
                flush=True)
    if stop:
        say(f"stopped after step {step}; continue with --resume")
    elif rank == 0 and len(validation):
        report(model, windows, training, validation[:250])
    if world > 1:
        dist.destroy_process_group()


def descend(optimizer, loss, lr, clip, where=""):
    """One step of the optimiser; FloatingPointError instead if the loss has no finite gradient."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(weights, clip)
    if not torch.isfinite(norm):
        raise FloatingPointError(f"loss {loss.item()}, gradient norm {norm.item()} at {where}")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()


def learning_rate(progress):
    """Share of the peak: linear warm-up over the first 5 %, then a cosine down to 2 %."""
    cosine = math.cos(math.pi * max(progress - 0.05, 0) / 0.95)
    return min(progress / 0.05 + 1e-3, 0.51 + 0.49 * cosine)


def load_checkpoint(path):
    """The network of a checkpoint, on the CPU, and the dict of all that was saved with it.

    ValueError if it is damaged, foreign, newer than this code, or holds what could be code.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint {path}: run python train.py first")
    try:
        data.check(zipfile.ZipFile(path).testzip() is None, "it is damaged")    # torch ignores sums
        saved = torch.load(path, map_location="cpu", weights_only=True)         # runs no code
        data.check(saved["version"] <= VERSION, f"version {saved['version']} is too new")
        lacks = {"scaling", "options", "optimizer", "step", "ids"} - saved.keys()
        data.check(not lacks, f"it lacks {', '.join(sorted(lacks))}")
        model = StefaLand(Config(**saved["config"]))
        model.load_state_dict(saved["model"])
        return model, saved
    except pickle.UnpicklingError:              # torch's own text advises to load it nevertheless
        reason = "it holds objects that could be code"
    except Exception as error:
        reason = f"{error!r:.200}"
    raise ValueError(f"{path} is no checkpoint that this code can read: {reason}")


class Windows:
    """Standardised sites, served as windows of L days; the daily data may stay on disk (memmap)."""

    def __init__(self, sites, scaling, days):
        data.check(len(sites.dates) >= days,
                   f"{len(sites.dates)} days of data, windows of {days}: lower --seq-len")
        self.days, self.forcing, self.scaling = days, sites.forcing, scaling["forcing"]
        parts = np.array_split(sites.forcing, len(sites.ids) // 1000 + 1)
        seen = np.concatenate([~np.isnan(part).all(-1) for part in parts])      # (N, T)
        self.first, self.last = seen.argmax(1), seen.shape[1] - seen[:, ::-1].argmax(1)
        self.static = torch.from_numpy(scale(sites.static, scaling["static"]))  # (N, S)
        self.latlon = torch.tensor(sites.latlon)                                # (N, 2)
        self.day_of_year = torch.from_numpy(data.day_of_year(sites.dates)).float()  # (T,)

    def starts(self, site, rng):
        """Random first days of windows within the records of the sites: (B,) -> (B,)."""
        room = np.maximum(self.last[site] - self.days - self.first[site], 0)
        start = self.first[site] + rng.integers(0, room + 1)
        return np.minimum(start, self.forcing.shape[1] - self.days)

    def get(self, site, start, device="cpu"):
        """forcing (B, L, C), static (B, S), latlon (B, 2), day_of_year (B, L)."""
        day = start[:, None] + np.arange(self.days)                             # (B, L)
        forcing = scale(self.forcing[site[:, None], day], self.scaling)         # (B, L, C)
        return [x.to(device) for x in (torch.from_numpy(forcing), self.static[site],
                                       self.latlon[site], self.day_of_year[day])]


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
    data.check(dates[0] <= first < last <= dates[-1],
               f"period {text} is not within the data, {dates[0]} to {dates[-1]}")
    return slice(int(np.searchsorted(dates, first)), int(np.searchsorted(dates, last)) + 1)


def fit_scaling(values):
    """Statistics of (..., V) *training* values for scale(): (3, V) log flag, mean, std.

    Variables never negative and skewed (precipitation, areas) are scaled as log(1 + x); a
    variable that is missing everywhere gets NaN and stays missing.
    """
    v = np.ma.masked_invalid(values).astype(np.float64)
    v = v.reshape(math.prod(v.shape[:-1]), v.shape[-1])
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


@torch.no_grad()
def report(model, windows, training, validation):
    """Print the R2 of each hidden group at the validation sites, beside a yardstick's.

    Yardsticks know training sites: ridge regression on the attributes of other groups (static
    groups), the mean of the day of the year (dynamic groups, hidden for 60 days).
    """
    config, site = model.eval().config, np.repeat(validation, 4)                # 4 windows of each
    batch = windows.get(site, windows.starts(site, np.random.default_rng(0)))
    forcing, static, _, doy = batch                         # (B, L, C), (B, S), (B, 2), (B, L)
    past = scale(windows.forcing[training[:500]], windows.scaling)              # (500, T, C)
    past, table = torch.from_numpy(past).nanmean(0), windows.static.numpy()     # (T, C), (N, S)
    days = [past[windows.day_of_year == day].nanmean(0) for day in range(1, 367)]
    climatology = torch.stack(days)[doy.long() - 1]                             # (B, L, C)
    fitted = torch.zeros_like(static)                                           # (B, S)
    for v, group in enumerate(config.static_groups):
        x = table[:, np.array(config.static_groups) != group]
        fitted[:, v] = torch.from_numpy(ridge(x[training], table[training, v], x[site]))
    inside = torch.zeros(windows.days, 1, dtype=torch.bool)                     # (L, 1)
    inside[windows.days // 2:][:60] = True

    print(f"\nR2 at {len(validation)} validation sites, mean over the variables of a hidden group\n"
          f"{'group':<24}{'StefaLand':>10}{'yardstick':>11}")
    for kind, groups in ((1, config.static_groups), (0, config.dynamic_groups)):
        for group in sorted({*groups} - {NEVER_HIDDEN}):
            member = torch.tensor([g == group for g in groups])                 # (V,)
            hidden = [torch.zeros_like(x).bool() for x in (forcing, static, static[:, 0])]
            hidden[kind] |= member if kind == 1 else inside & member
            guess = torch.cat([
                model.decode(model.encode(*x[:4], hidden=x[4:]))[kind].cpu()
                for x in zip(*(x.to(model.position.device).split(64) for x in (*batch, *hidden)))])
            own, other = (r_squared(batch[kind], x, hidden[kind])
                          for x in (guess, (climatology, fitted)[kind]))
            if own == own:                                  # observed at these sites
                print(f"{('dynamic ', 'static ')[kind] + group:<24}{own:>10.3f}{other:>11.3f}")


def r_squared(truth, guess, where):
    """1 - SSE/SST over observed entries in `where`, mean over the variables (last axis) it has."""
    y = torch.where(where > 0, truth, math.nan).double().flatten(0, -2)         # (n, V)
    sse = (y - guess.flatten(0, -2)).square().where(~y.isnan(), 0).sum(0)       # (V,)
    sst = (y - y.nanmean(0)).square().nansum(0)
    return (1 - sse / sst)[sst > 1e-9].mean().item()        # NaN if it has none


def ridge(x, y, x_new):
    """Ridge regression with generalised cross-validation; missing x = mean, missing y left out."""
    x, x_new, y = np.nan_to_num(x[~np.isnan(y)]), np.nan_to_num(x_new), y[~np.isnan(y)]
    u, s, vt = np.linalg.svd(x - x.mean(0), full_matrices=False)
    shrink = s ** 2 / (s ** 2 + np.logspace(-2, 5, 30)[:, None])                # (penalties, S)
    fits = shrink * (u.T @ (y - y.mean())) @ u.T                                # (penalties, N)
    error = ((y - y.mean() - fits) ** 2).sum(1) / (len(y) - 1 - shrink.sum(1)) ** 2
    weights = vt.T @ (shrink[error.argmin()] / s * (u.T @ (y - y.mean())))
    return y.mean() + (x_new - x.mean(0)) @ weights


def setup(device):
    """(rank, processes, device); joins torchrun's group, nccl on CUDA and gloo on the CPU."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    default = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    device = torch.device(device or default)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if platform.libc_ver()[0] == "glibc":       # keep freed blocks: faults are a tenth of a step
        ctypes.CDLL(None).mallopt(-4, 0)                                        # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, 2 ** 31 - 1)                              # M_TRIM_THRESHOLD
    return rank, world, device


def parse(options, description, argv, defaults=None):
    """The command line as an instance of a dataclass of options; --seq-len is its field seq_len."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(options):
        kind = dict(action="store_true") if f.default is False else dict(type=type(f.default))
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, **kind,
                            help=f.metadata["help"] + f" [{f.default}]" * bool(f.default))
    parser.set_defaults(**defaults or {})
    return options(**vars(parser.parse_args(argv)))


def main(argv=None):
    o = parse(Options, __doc__, argv)
    if o.resume:                                            # its options, but for those given now
        saved = load_checkpoint(Path(o.out) / "pretrained.pt")[1]
        o = parse(Options, __doc__, argv, saved["options"] | {"out": o.out})
    data.check(o.preset in PRESETS, f"--preset {o.preset}: expected one of {[*PRESETS]}")
    for name, value in TRAINING[o.preset].items():
        setattr(o, name, getattr(o, name) or value)
    if o.quick:
        o.steps, o.batch_size = min(o.steps, 20), min(o.batch_size, 8)
    o.seq_len = 1 if o.static_only else o.seq_len
    train(o, data.load(o.data, cache=Path(o.out) / "cache", quick=o.quick,
                       static_only=o.static_only))


if __name__ == "__main__":
    main()
