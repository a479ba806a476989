"""Pretrain StefaLand by hiding groups of variables and reconstructing them.

    python train.py                                     the synthetic world, minutes on 2 CPU cores
    python train.py --data caravan:DIR,camels:DIR       real basins; csv:DIR: your own
    torchrun --nproc_per_node=4 train.py --preset paper --data …
    python train.py --resume                            after Ctrl-C or a crash, bit for bit

Writes out/pretrained.pt and prints how well hidden variables are reconstructed at new sites.
"""

import ctypes
import json
import math
import os
import signal
import time
import zipfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import data
from model import PRESETS, Config, Masks, StefaLand, masked_loss

TRAINING = {"small": dict(steps=1400, batch_size=32, lr=2e-3, short=0.8),
            "paper": dict(steps=33000, batch_size=256, lr=1e-4, short=0.0)}  # 25 x 8,634 x 39 years
VERSION = 8                                                 # of the files' format
STOPS = signal.SIGINT, signal.SIGTERM                       # they end training after a step
if os.name == "posix" and hasattr(ctypes.CDLL(None), "mallopt"):    # of glibc
    # M_MMAP_MAX and M_TRIM_THRESHOLD: memory that is kept is not zeroed anew, a tenth of a step
    ctypes.CDLL(None).mallopt(-4, 0)
    ctypes.CDLL(None).mallopt(-1, 2 ** 31 - 1)


def shared_options(description, **defaults):
    """A parser of the options that train.py and finetune.py have in common."""
    parser = ArgumentParser(usage="%(prog)s [--option value …]", description=description,
                            formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--data", default="synthetic", help="or caravan:DIR, csv:DIR, NAME:DIR; several: a,b")
    add("--out", default="out", help="folder of the checkpoint, of runs and of parsed archives")
    add("--holdout", default="pub", help="pub (random sites), pur (regions) or none")
    add("--folds", type=positive, default=5, help="number of folds [%(default)s]")
    add("--steps", type=positive, help="optimiser steps [%(default)s]")
    add("--batch-size", type=positive, help="windows a step, over all processes [%(default)s]")
    add("--lr", type=float, help="peak learning rate [%(default)s]")
    add("--seed", type=int, default=0, help="of weights, windows, masks; folds have their own")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    add("--device", default=devices[0], choices=devices, help="[%(default)s]")
    add("--dtype", default=fastest_dtype(devices[0]), choices=("bfloat16", "float32"))
    add("--threads", type=positive, default=free_cores(), help="of the CPU [now free: %(default)s]")
    add("--quick", action="store_true", help="the same path in under a minute, nothing learned")
    parser.set_defaults(**defaults)
    return parser


def positive(text):
    """An option's whole number above 0; 1e3 is one, too."""
    if float(text) < 1 or float(text) % 1:
        raise ValueError
    return int(float(text))


def train(o, sites):
    """All of pretraining, on every process; the first one prints and writes the checkpoint."""
    torch.set_num_threads(o.threads)
    rank, world, device = setup(o.device)
    checkpoint, first = Path(o.out, "pretrained.pt"), 0
    training, validation = split(o, sites)
    names = sites.dynamic_names, sites.static_names
    data.check({*o.config} <= {*vars(Config())}, f"--config takes {[*vars(Config())]}")
    config = Config(*names, *map(data.groups, names), **PRESETS[o.preset] | o.config)
    torch.manual_seed(o.seed)
    model = StefaLand(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=o.lr, weight_decay=0.0, fused=True)
    some = training[::(len(training) - 1) // 2000 + 1]      # statistics of at most 2,000 sites
    scaling = {"forcing": fit_standardisation(sites.forcing[some]),
               "static": fit_standardisation(sites.static[some])}
    ids, digest = sites.ids[training].tolist(), sites.digest
    if o.resume:
        old, saved = load_checkpoint(checkpoint)
        data.check(old.config == config and (saved["ids"], saved["digest"]) == (ids, digest),
                   f"--resume: {checkpoint} is of another model, of other data or training sites")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first, scaling = saved["step"], saved["scaling"]
    windows = Windows(sites, scaling, config.max_days, *names)
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    if rank == 0:
        print(f"{len(training)} + {len(validation)} sites, {o.dtype} on {world} {device}, from "
              f"step {first}, {sum(p.numel() for p in model.parameters()):,} weights", flush=True)

    interrupted = torch.zeros(1, device=device)             # Ctrl-C ends the loop after a step
    for number in STOPS:
        signal.signal(number, lambda *_: interrupted.fill_(1))
    step, began, shown, stop = first, time.time(), 0.0, False
    while True:
        done = stop or step >= o.steps
        if rank == 0 and (done or step % 200 == 0):
            save(checkpoint, config=vars(config), options=vars(o), step=step, ids=ids,
                 digest=digest, latlon=torch.tensor(sites.latlon[training]), scaling=scaling,
                 model=model.state_dict(), optimizer=optimizer.state_dict())
        if done:
            break
        # All randomness follows from (seed, step): a resumed run needs no generator state. Every
        # process draws the whole batch and keeps its share: their number changes nothing.
        seed = o.seed * 1_000_003 + step
        generator = torch.Generator(device).manual_seed(seed)
        torch.manual_seed(seed * 1009 + rank)               # dropout
        rng = np.random.default_rng(seed)
        # a window of a third of the days costs less than a third, and teaches nearly as much
        windows.days = config.max_days // 3 + 1 if step < o.short * o.steps else config.max_days
        site = rng.choice(training, o.batch_size)
        start = windows.starts(site, rng)
        hidden = model.draw_masks(o.batch_size, windows.days, generator)
        share = slice(rank * o.batch_size // world, (rank + 1) * o.batch_size // world)
        batch = windows.get(site[share], start[share], device)
        with autocast(device, o.dtype):
            errors, counts = wrapped(*batch, hidden=Masks(*[part[share] for part in hidden]))
        interrupts = interrupted.clone()                    # a signal may come between its two uses
        if world > 1:
            dist.all_reduce(counts)                         # the mean is over the whole batch
            dist.all_reduce(interrupts)                     # all processes end with the same step
        loss = masked_loss(errors * world, counts)          # DDP averages over the processes
        descend(optimizer, loss, o.lr * learning_rate(step / o.steps), clip=5.0)
        step, stop = step + 1, interrupts.item() > 0
        if rank == 0 and (time.time() - shown > 10 or step == o.steps):
            shown, pace = time.time(), (time.time() - began) / (step - first)
            print(f"step {step}/{o.steps}  masked loss {loss.item():.3f}  {o.batch_size / pace:.1f}"
                  f" samples/s  {(o.steps - step) * pace / 60:.1f} min left", flush=True)
    if rank == 0 and stop:
        print(f"stopped after step {step}; continue with --resume")
    elif rank == 0 and len(validation):
        report(model, windows, validation[:60])
    if world > 1:
        dist.destroy_process_group()


def setup(device):
    """(rank, processes, device); joins torchrun's group, nccl on CUDA and gloo on the CPU."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        device += f":{os.environ['LOCAL_RANK']}" if device == "cuda" else ""
    return rank, world, torch.device(device)


def split(o, sites):
    """Indices of training and validation sites (a tenth), none of them of the fold held out."""
    data.check(0 <= o.fold < o.folds, f"--fold {o.fold}: expected 0 to {o.folds - 1}")
    tenth = data.folds(sites, "pub", 10, seed=1) == 0
    kept = data.folds(sites, o.holdout, o.folds) != o.fold
    data.check((~tenth & kept).any(), f"of {len(kept)} sites none is left to train on")
    return np.flatnonzero(~tenth & kept), np.flatnonzero(tenth & kept)


@torch.no_grad()
def report(model, windows, validation):
    """Print how much of what is hidden is explained at sites never trained on (0 = their mean)."""
    model, site = model.cpu().eval(), np.repeat(validation, 4)      # 4 windows of each
    batch = windows.get(site, windows.starts(site, np.random.default_rng(0)))
    hidden = model.draw_masks(len(site), windows.days, torch.Generator().manual_seed(0))
    for name, error, count in zip(("weather", "attributes"), *model(*batch, hidden)):
        print(f"R2 of hidden {name} at {len(validation)} sites never trained on: "
              f"{1 - error / count:.3f}")                   # all is standardised: 1 is no skill


def fastest_dtype(device):
    """bfloat16 on CUDA and on processors that multiply in it, else float32."""
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bfloat16" if device.startswith("cuda") or has_bf16() else "float32"


def free_cores():
    """Threads that run at once now: one that shares its core would hold up all others."""
    if torch.get_num_threads() == 1:
        return 1
    wall, cpu = time.perf_counter(), time.process_time()
    torch.linalg.matrix_power(torch.eye(1000), 2 ** 20)     # twenty products
    return max(int((time.process_time() - cpu) / (time.perf_counter() - wall) + 0.25), 1)


def autocast(device, dtype):
    """The context in which products are taken in bfloat16, if that is the dtype."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def descend(optimizer, loss, lr, clip):
    """One step of the optimiser; FloatingPointError instead if the loss has no finite gradient."""
    optimizer.zero_grad()
    loss.backward()
    [group] = optimizer.param_groups
    norm = torch.nn.utils.clip_grad_norm_(group["params"], clip)
    data.check(torch.isfinite(norm), f"loss {loss.item()}, gradient {norm}", FloatingPointError)
    group["lr"] = lr
    optimizer.step()


def learning_rate(progress):
    """Share of the peak: linear warm-up over the first 5 %, then a cosine down to 2 %."""
    cosine = math.cos(math.pi * max(progress - 0.05, 0) / 0.95)
    return min(progress / 0.05 + 1e-3, 0.51 + 0.49 * cosine)


def save(path, **values):
    """A file of these plain values and tensors, to be read by load_file."""
    values["version"] = VERSION
    data.write_atomically(path, lambda file: torch.save(values, file))


def load_file(path, needs):
    """What save() wrote, with this key; ValueError says why not, and no code of it runs."""
    data.check(Path(path).is_file(), f"no file {path}: run train.py first", FileNotFoundError)
    try:
        data.check(zipfile.ZipFile(path).testzip() is None, "it is damaged")    # torch ignores sums
        saved = torch.load(path, map_location="cpu", weights_only=True)
        data.check(needs in saved, f"it has no {needs}: train.py and finetune.py write other files")
        data.check(saved["version"] == VERSION, f"version {saved['version']}, not {VERSION}")
        return saved
    except Exception as error:
        # of such a file torch's own text advises to load it nevertheless
        code = "it holds objects that could be code" if "weights_only" in str(error) else ""
        raise ValueError(f"{path} cannot be read: {code or repr(error):.200}") from None


def load_checkpoint(path):
    """The network of a checkpoint, on the CPU, and the dict of all that was saved with it."""
    saved = load_file(path, "optimizer")
    model = StefaLand(Config(**saved["config"]))
    model.load_state_dict(saved["model"])
    return model, saved


class Windows:
    """Standardised sites, served as windows of L days with these variables in this order.
    A variable that the sites do not have is missing (NaN). Daily data may stay on disk (memmap)."""

    def __init__(self, sites, scaling, days, dynamic_names, static_names):
        n = len(sites.dates)
        data.check(n >= days, f"{n} days of data, but windows of {days}: pretrain with --config "
                   f"'{{\"max_days\": {n}}}'")
        self.sites, self.days, self.scaling = sites, days, scaling["forcing"]
        self.dynamic_names, self.static_groups = dynamic_names, data.groups(static_names)
        seen = np.stack([~np.isnan(series).all(-1) for series in sites.forcing])    # (N, T)
        self.first, self.last = seen.argmax(1), seen.shape[1] - seen[:, ::-1].argmax(1)
        self.last[~seen.any(1)] = 0                         # no record: windows start at day 0
        static = arrange(sites.static, sites.static_names, static_names)
        self.static = torch.from_numpy(apply_standardisation(static, scaling["static"]))  # (N, S)
        self.latlon = torch.tensor(sites.latlon)                                # (N, 2)
        self.day_of_year = torch.from_numpy(data.day_of_year(sites.dates)).float()  # (T,)

    def starts(self, site, rng):
        """Random first days of windows within the records of the sites: (B,) -> (B,)."""
        room = np.maximum(self.last[site] - self.days - self.first[site], 0)
        start = self.first[site] + rng.integers(0, room + 1)
        return np.minimum(start, len(self.day_of_year) - self.days)     # of short records, too

    def get(self, site, start, device="cpu"):
        """forcing (B, L, C), static (B, S), latlon (B, 2), day_of_year (B, L)."""
        day = start[:, None] + np.arange(self.days)                             # (B, L)
        forcing = self.sites.forcing[site[:, None], day]
        forcing = arrange(forcing, self.sites.dynamic_names, self.dynamic_names)    # (B, L, C)
        forcing = torch.from_numpy(apply_standardisation(forcing, self.scaling))
        batch = forcing, self.static[site], self.latlon[site], self.day_of_year[day]
        return [x.to(device) for x in batch]


def arrange(values, names, wanted):
    """(..., names) -> (..., wanted): these variables in this order, NaN for those not there."""
    values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, 1)], constant_values=np.nan)
    return values[..., [names.index(name) if name in names else -1 for name in wanted]]


def fit_standardisation(values):
    """Statistics of (..., V) *training* values: (3, V) log flag, mean, std.
    Variables never negative and skewed (precipitation, areas) are taken as log(1 + x); a variable
    that is missing everywhere gets NaN and stays missing."""
    v = np.ma.masked_invalid(values).astype(np.float64)
    v = v.reshape(math.prod(v.shape[:-1]), v.shape[-1])                         # (n, V)
    skew = (((v - v.mean(0)) / v.std(0)) ** 3).mean(0)
    log = ((v.min(0) >= 0) & (skew > 2)).filled(False)
    v = np.ma.where(log, np.log1p(np.ma.maximum(v, 0)), v)
    std = v.std(0).filled(np.nan)
    return torch.tensor(np.stack([log, v.mean(0).filled(np.nan), np.where(std < 1e-6, 1, std)]))


def apply_standardisation(values, scaling):
    """Standardise (..., V) with the statistics of fit_standardisation; NaN stays NaN."""
    log, mean, std = scaling.numpy()
    values = np.where(log > 0, np.log1p(np.maximum(values, 0)), values)
    return ((values - mean) / std).astype(np.float32)


def options(argv=None):
    """The command line, read twice: --quick, --preset, --resume decide what it leaves out."""
    parser = shared_options(__doc__, **TRAINING["small"])
    add = parser.add_argument
    add("--fold", type=int, default=0, help="the fold left out of training")
    add("--preset", default="small", choices=PRESETS, help="size of network and training")
    add("--short", type=float, help="share of the steps on windows of a third [%(default)s]")
    add("--config", default={}, type=json.loads, help='of model.Config, as {"dropout": 0}')
    add("--resume", action="store_true", help="continue the checkpoint in --out, with its options")
    o = parser.parse_args(argv)
    defaults = dict(steps=20, batch_size=8) if o.quick else TRAINING[o.preset]
    if o.resume:
        defaults = load_checkpoint(Path(o.out, "pretrained.pt"))[1]["options"] | {"out": o.out}
    parser.set_defaults(**defaults)
    return parser.parse_args(argv)


def load_sites(o):
    return data.load(o.data, cache=Path(o.out, "cache"), quick=o.quick)


def main(argv=None, load=load_sites):
    """The command line. An application gives its own sites."""
    o = options(argv)
    before = [*map(signal.getsignal, STOPS)]
    try:
        train(o, load(o))
    finally:
        [*map(signal.signal, STOPS, before)]                # to the caller, as a notebook


if __name__ == "__main__":
    data.command(main)
