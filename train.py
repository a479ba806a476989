"""Pretrain StefaLand by hiding groups of variables and reconstructing them.

    python train.py                                     the synthetic world, minutes on 2 CPU cores
    python train.py --data caravan:DIR,camels:DIR       real basins
    python train.py --preset paper --data …             the paper's size; also with torchrun:
    torchrun --nproc_per_node=4 train.py --data …       every process takes its share of each batch
    python train.py --resume                            after Ctrl-C, bit for bit
    python train.py --benchmark --preset paper          samples/s and share of the machine's peak

Writes out/pretrained.pt and, at the end, how well hidden groups are reconstructed at sites that were
never trained on.
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
from torch.nn.parallel import DistributedDataParallel

import data
from model import PRESETS, Config, StefaLand, linear, masked_loss


def option(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Options:
    data: str = option("synthetic", "synthetic, or sources joined by commas: caravan:DIR,camels:DIR")
    out: str = option("out", "folder of the checkpoint and of the cache of parsed archives")
    preset: str = option("small", f"size of the network and of its training: {' or '.join(PRESETS)}")
    config: str = option("", "changes to fields of model.Config, such as dropout=0,p_static=0.5")
    steps: int = option(0, "optimiser steps; 0: the preset's")
    batch_size: int = option(0, "windows per step over all processes; 0: the preset's")
    lr: float = option(0.0, "peak learning rate (warm-up, then cosine); 0: the preset's")
    seq_len: int = option(365, "days in a window")
    holdout: str = option("", "pub (random sites) or pur (regions): leave a fold of sites out of pretraining")
    folds: int = option(5, "number of folds of --holdout")
    fold: int = option(0, "the fold left out by --holdout")
    seed: int = option(0, "of weights, windows and masks; the folds and the synthetic world do not depend on it")
    device: str = option("", "cuda, cpu …; empty: cuda if there is one")
    dtype: str = option("auto", "float32, bfloat16 (autocast), or auto: the faster on this machine")
    save_every: int = option(200, "steps between checkpoints")
    resume: bool = option(False, "continue from the checkpoint in --out, with its options where none are given")
    benchmark: bool = option(False, "measure training throughput on random data and exit")
    quick: bool = option(False, "the same path in under a minute: few sites and steps, nothing learned")


TRAINING = {"small": dict(steps=1200, batch_size=32, lr=2e-3),
            "paper": dict(steps=33000, batch_size=256, lr=1e-4)}   # 25 epochs of 8,634 sites x 39 years
CHECKPOINT_VERSION = 1


def train(o):
    """The whole of pretraining: data, model, loop, checkpoint, report. Returns the model."""
    rank, world, device = setup_device(o.device)
    say = print if rank == 0 else lambda *args, **kwargs: None
    saved = torch.load(Path(o.out) / "pretrained.pt", weights_only=True) if o.resume else None

    sites = load_sites(o)
    training, validation = split_sites(sites, o)
    scaling = saved["scaling"] if saved else {
        "forcing": torch.tensor(data.fit_scaling(sites.forcing[training])),
        "static": torch.tensor(data.fit_scaling(sites.static[training]))}
    batches = Windows(sites, scaling, o.seq_len)
    say(f"{len(training)} sites to train on, {len(validation)} to validate on"
        + (f", fold {o.fold} of {o.folds} ({o.holdout}) left out" if o.holdout else ""))

    torch.manual_seed(o.seed)
    groups = (tuple(map(data.group_of, names)) for names in (sites.dynamic_names, sites.static_names))
    changes = {k: ast.literal_eval(v) for k, _, v in (c.partition("=") for c in o.config.split(",") if c)}
    config = Config(**saved["config"]) if saved else Config(
        sites.dynamic_names, sites.static_names, *groups, max_days=o.seq_len, **PRESETS[o.preset] | changes)
    if saved and (sites.dynamic_names, sites.static_names) != (config.dynamic_names, config.static_names):
        raise ValueError(f"--resume: {o.data} has other variables than the checkpoint's {saved['options']['data']}")
    model = StefaLand(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=o.lr, weight_decay=0.0, fused=True)
    step = 0
    if saved:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
        say(f"resuming at step {step}")
    wrapped = DistributedDataParallel(model) if world > 1 else model
    dtype = choose_dtype(o.dtype, device, config.d_model)
    say(f"{sum(p.numel() for p in model.parameters()):,} parameters, {device}, {dtype}, {world} process(es)")

    def save():
        if rank == 0:
            seen = sites.subset(training)
            state = {"version": CHECKPOINT_VERSION, "model": model.state_dict(), "config": dataclasses.asdict(config),
                     "scaling": scaling, "ids": seen.ids.tolist(), "latlon": torch.tensor(seen.latlon),
                     "options": dataclasses.asdict(o), "optimizer": optimizer.state_dict(), "step": step}
            data.write_atomically(Path(o.out) / "pretrained.pt", lambda file: torch.save(state, file))

    stop = []                                               # Ctrl-C and SIGTERM end the loop after a step
    previous = {s: signal.signal(s, lambda *_: stop.append(1)) for s in (signal.SIGINT, signal.SIGTERM)}
    model.train()
    started, first, shown = time.time(), step, 0.0
    while step < o.steps and not stop:
        # all randomness follows from (seed, step): a resumed run needs no generator state, and every
        # process draws the whole batch and keeps its share, so their number changes nothing
        generator = torch.Generator(device).manual_seed(o.seed * 1_000_003 + step)
        torch.manual_seed((o.seed * 1_000_003 + step) * 1009 + rank)            # for dropout
        site, start = batches.draw(training, o.batch_size, np.random.default_rng([o.seed, step]))
        hidden = model.draw_masks(o.batch_size, o.seq_len, generator)
        share = slice(rank * o.batch_size // world, (rank + 1) * o.batch_size // world)
        batch = [x.to(device) for x in batches.get(site[share], start[share])]
        for group in optimizer.param_groups:
            group["lr"] = o.lr * learning_rate(step, o.steps)

        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            errors, counts = wrapped(*batch, hidden=[h[share] for h in hidden])
        counts = torch.cat([counts, counts.new_tensor([len(stop)])])
        if world > 1:                                       # the mean is over the whole batch
            dist.all_reduce(counts)
        loss = masked_loss(errors * world, counts[:2])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"step {step}: loss {loss.item()}, gradient norm {norm.item()}; "
                                     f"the last good checkpoint stays in {o.out}")
        optimizer.step()
        step += 1

        stop = [1] * int(counts[2] > 0)
        if step % o.save_every == 0 or step == o.steps or stop:
            save()
        if time.time() - shown > 10 or step == o.steps:
            shown, seconds = time.time(), (time.time() - started) / (step - first)
            dynamic, static = (errors.detach() * world / counts[:2].clamp(min=1)).tolist()
            say(f"step {step}/{o.steps}  masked loss dynamic {dynamic:.3f} static {static:.3f}  "
                f"{o.batch_size / seconds:.0f} samples/s  {(o.steps - step) * seconds / 60:.1f} min left", flush=True)
    for s, handler in previous.items():
        signal.signal(s, handler)
    if stop:
        say(f"stopped after step {step}; continue with --resume")
    elif rank == 0 and len(validation):
        report(model, batches, training, validation, device)
    if world > 1:
        dist.destroy_process_group()
    return model


class Windows:
    """Standardised sites, served as windows of L days without copying the data set."""

    def __init__(self, sites, scaling, days):
        if len(sites.dates) < days:
            raise ValueError(f"the data has {len(sites.dates)} days, a window {days}: lower --seq-len")
        forcing = data.scale(sites.forcing, scaling["forcing"].numpy())         # (N, T, C)
        seen = ~np.isnan(forcing).all(-1)                                       # (N, T)
        self.first = seen.argmax(1)                                             # days with any weather
        self.last = np.where(seen.any(1), seen.shape[1] - seen[:, ::-1].argmax(1), 0)
        self.days, self.forcing = days, torch.from_numpy(forcing)
        self.view = self.forcing.unfold(1, days, 1)                             # (N, T-L+1, C, L), a view
        self.static = torch.from_numpy(data.scale(sites.static, scaling["static"].numpy()))
        self.latlon, self.dates = torch.from_numpy(sites.latlon), sites.dates
        self.day_of_year = torch.from_numpy(data.day_of_year(sites.dates)).unfold(0, days, 1)  # (T-L+1, L)

    def draw(self, among, B, rng):
        """B random windows inside the recorded period of sites drawn from `among`: site, start (B,)."""
        site = rng.choice(among, B)
        room = np.maximum(self.last[site] - self.days - self.first[site], 0)
        return site, np.minimum(self.first[site] + rng.integers(0, room + 1), self.view.shape[1] - 1)

    def get(self, site, start):
        """forcing (B, L, C), static (B, S), latlon (B, 2), day_of_year (B, L)."""
        return (self.view[site, start].mT.contiguous(), self.static[site], self.latlon[site],
                self.day_of_year[start].float())


def report(model, batches, training, validation, device, windows=4):
    """Print R2 of each hidden group at the validation sites, beside the mean and a simple yardstick.

    Yardsticks from the training sites: ridge regression on the attributes that stay visible (static
    groups), the day-of-year climatology (dynamic groups; hidden in a block of 60 days).
    """
    rng, c = np.random.default_rng(0), model.config
    site, start = batches.draw(np.repeat(validation, windows), len(validation) * windows, rng)
    site = np.sort(site)
    forcing, static, latlon, doy = batch = batches.get(site, start)
    block = torch.zeros(forcing.shape[:2], dtype=torch.bool)
    block[:, batches.days // 2:batches.days // 2 + 60] = True                   # (B, L)
    flat = batches.forcing[training].flatten(0, 1)                              # (N T, C)
    day = torch.from_numpy(np.tile(data.day_of_year(batches.dates), len(training)))
    climatology = torch.stack([flat[day == d].nanmean(0) for d in range(1, 367)])   # (366, C)
    model.eval()
    print(f"\nreconstruction of hidden groups at {len(validation)} validation sites, R2 (mean over variables)\n"
          f"{'group':<24}{'StefaLand':>10}{'yardstick':>11}{'mean':>8}")
    for kind, names, groups in (("static", c.static_names, c.static_groups),
                                ("dynamic", c.dynamic_names, c.dynamic_groups)):
        for group in sorted({*groups} - {"context"}):
            member = torch.tensor([g == group for g in groups])
            hide = [torch.zeros_like(forcing, dtype=torch.bool), torch.zeros_like(static, dtype=torch.bool)]
            if kind == "static":
                hide[1][:, member] = True
            else:
                hide[0][block] = member
            hidden = (*hide, torch.zeros(len(site), dtype=torch.bool))
            with torch.no_grad():
                parts = [model.decode(model.encode(*(x[i].to(device) for x in batch), [h[i].to(device) for h in hidden]))
                         for i in torch.arange(len(site)).split(64)]
            if kind == "static":
                keep = np.unique(site)
                guess = torch.cat([p[1] for p in parts]).cpu()
                guess = torch.stack([guess[site == i].mean(0) for i in keep])[:, member].numpy()
                truth, table = batches.static[keep][:, member].numpy(), batches.static.numpy()
                simple = np.stack([ridge(table[training][:, ~member], y, table[keep][:, ~member])
                                   for y in table[training][:, member].T], 1)
            else:
                guess = torch.cat([p[0] for p in parts]).cpu()[block][:, member].numpy()
                truth, simple = forcing[block][:, member].numpy(), climatology[doy[block].long() - 1][:, member].numpy()
            scores = [r_squared(truth, x) for x in (guess, simple, np.zeros_like(truth))]
            print(f"{kind + ' ' + group:<24}{scores[0]:>10.3f}{scores[1]:>11.3f}{scores[2]:>8.3f}")


def r_squared(truth, guess):
    """1 - SSE/SST per column over observed entries, mean over columns: (N, V), (N, V) -> float."""
    truth = np.where(np.isnan(guess), np.nan, truth)
    sse, sst = np.nansum((truth - guess) ** 2, 0), np.nansum((truth - np.nanmean(truth, 0)) ** 2, 0)
    return float(np.mean(1 - sse / sst))


def ridge(x, y, x_new):
    """Ridge regression with the penalty that minimises generalised cross-validation; missing x = mean."""
    rows = ~np.isnan(y)
    x, x_new, y = np.nan_to_num(x[rows]), np.nan_to_num(x_new), y[rows]
    u, s, vt = np.linalg.svd(x - x.mean(0), full_matrices=False)
    uy, best = u.T @ (y - y.mean()), (np.inf, 0)
    for penalty in np.logspace(-2, 5, 30):
        shrink = s ** 2 / (s ** 2 + penalty)
        error = np.sum((y - y.mean() - u @ (shrink * uy)) ** 2) / (len(y) - 1 - shrink.sum()) ** 2
        best = min(best, (error, penalty))
    return y.mean() + (x_new - x.mean(0)) @ (vt.T @ (s / (s ** 2 + best[1]) * uy))


def learning_rate(step, steps):
    """Share of the peak: linear warm-up over 5 % of the steps, then a cosine down to 2 %."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.51 + 0.49 * math.cos(math.pi * (step - warm) / max(1, steps - warm))


def load_sites(o):
    quick = dict(n_sites=60, years=3) if o.quick and o.data == "synthetic" else {}
    return data.load(o.data, cache=Path(o.out) / "cache", **quick)


def split_sites(sites, o):
    """Indices of training and validation sites (a tenth); the held-out fold is in neither."""
    held_out = data.folds(sites, o.holdout, o.folds) == o.fold if o.holdout else np.zeros(len(sites), bool)
    tenth = data.folds(sites, "pub", 10, seed=1) == 0
    return np.flatnonzero(~held_out & ~tenth), np.flatnonzero(~held_out & tenth)


def setup_device(name):
    """(rank, world size, device); joins torchrun's process group: nccl on CUDA, gloo on the CPU."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:    # glibc: keep freed blocks, their page faults cost a tenth of a CPU step (M_MMAP_MAX, M_TRIM_THRESHOLD)
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0), libc.mallopt(-1, 2 ** 31 - 1)
    except (OSError, AttributeError, TypeError):
        pass
    return rank, world, device


def matmul_speed(dtype, device, width):
    """Best GFLOP/s of a product of (8192, width) by (width, width), forward only, as model.linear does it."""
    x, w = torch.randn(16, 512, width, device=device, dtype=dtype), torch.randn(width, width, device=device, dtype=dtype)
    best = math.inf
    for _ in range(10):
        began = time.perf_counter()
        linear(x, w, None).sum().item()
        best = min(best, time.perf_counter() - began)
    return 2 * x.numel() * width / best / 1e9


def choose_dtype(asked, device, width):
    """"float32" or "bfloat16"; auto measures: bfloat16 where its products are twice as fast."""
    if asked != "auto":
        return asked
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    fast = width >= 128 and matmul_speed(torch.bfloat16, device, width) > 1.7 * matmul_speed(torch.float32, device, width)
    return "bfloat16" if fast else "float32"


def benchmark(o, steps=6):
    """Print samples/s, GFLOP/s and share of peak of full training steps: 6 daily, 26 static variables."""
    _, _, device = setup_device(o.device)
    B, T, width = o.batch_size, o.seq_len, PRESETS[o.preset]["d_model"]
    model = StefaLand(Config(tuple("abcdef"), tuple(map(str, range(26))), max_days=T, **PRESETS[o.preset])).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.0, fused=True)
    batch = [x.to(device) for x in (torch.randn(B, T, 6), torch.randn(B, 26), 90 * torch.rand(B, 2),
                                    torch.arange(1.0, T + 1).expand(B, T))]
    dtype, seconds = choose_dtype(o.dtype, device, width), []
    for _ in range(steps):
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = masked_loss(*model(*batch))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        loss.item()
        seconds.append(time.perf_counter() - began)
    matrices = sum(p.numel() for name, p in model.named_parameters()
                   if p.dim() == 2 and name != "position" and not name.startswith(("static", "location")))
    flops = 6 * matrices * (T + 1) + 12 * len(model.encoder) * (T + 1) ** 2 * width   # forward + backward
    rate, peak = B / np.median(seconds[1:]), matmul_speed(getattr(torch, dtype), device, 1024)
    print(f"{o.preset}, batch {B}, {device}, {dtype}, {torch.get_num_threads()} threads: {rate:.1f} samples/s (median of "
          f"{steps - 1} steps), {rate * flops / 1e9:.0f} GFLOP/s, {rate * flops / 1e9 / peak:.0%} of the {peak:.0f} "
          "GFLOP/s of a large matrix product here")
    return rate


def parse(options, description, argv=None):
    """A dataclass of options -> its instance from the command line; --seq-len is the field seq_len."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in dataclasses.fields(options):
        flag, text = "--" + f.name.replace("_", "-"), f.metadata["help"]
        if f.type in (bool, "bool"):
            parser.add_argument(flag, action="store_true", default=f.default, help=text)
        else:
            parser.add_argument(flag, type=type(f.default), default=f.default, help=f"{text} ({f.default or 'none'})")
    return parser


def main(argv=None):
    parser = parse(Options, __doc__)
    o = parser.parse_args(argv)
    if o.resume:
        path = Path(o.out) / "pretrained.pt"
        if not path.exists():
            raise FileNotFoundError(f"--resume: no checkpoint {path}")
        parser.set_defaults(**torch.load(path, weights_only=True)["options"])
        o = parser.parse_args(argv)
    o = Options(**vars(o))
    if o.preset not in PRESETS:
        raise ValueError(f"--preset {o.preset}: expected {' or '.join(PRESETS)}")
    for name, value in TRAINING[o.preset].items():
        setattr(o, name, getattr(o, name) or value)
    if o.quick:
        o.steps, o.batch_size = min(o.steps, 20), min(o.batch_size, 8)
    if o.benchmark:
        benchmark(o)
    else:
        train(o)


if __name__ == "__main__":
    main()
