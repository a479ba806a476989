"""Pretrain StefaLand by hiding groups of variables and reconstructing them.

    python train.py                                     the synthetic world, minutes on 2 CPU cores
    python train.py --data caravan:DIR,camels:DIR       real basins; csv:DIR: your own
    torchrun --nproc_per_node=4 train.py --preset paper --data …
    python train.py --resume                            after Ctrl-C or a crash, bit for bit

Writes out/pretrained.pt and prints, at the end, how well hidden variables are reconstructed at
sites that were never trained on.
"""

import argparse
import ast
import ctypes
import io
import math
import os
import pickle
import platform
import re
import signal
import time
import zipfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import data
from model import PRESETS, Config, Masks, StefaLand, masked_loss


def option(group, default, text, least=0):
    """A field of Options: its heading in --help, what it means, the least number it may be."""
    return field(default=default, metadata={"group": group, "help": text, "least": least})


@dataclass
class Options:
    data: str = option("data", "synthetic", "or caravan:DIR, camels:DIR, csv:DIR; several: a,b")
    out: str = option("data", "out", "folder of the checkpoint and of the cache of parsed archives")
    holdout: str = option("hold-out", "pub", "pub (random sites), pur (regions) or none")
    folds: int = option("hold-out", 5, "number of folds", least=1)
    fold: int = option("hold-out", 0, "the fold left out of training")
    preset: str = option("model", "small", "size of network and training: small or paper")
    config: str = option("model", "", "fields of model.Config, such as dropout=0,p_static=0.5")
    without: str = option("model", "", "groups it shall not know, as soil,geology: to predict one")
    seq_len: int = option("model", 365, "days in a window", least=1)
    steps: int = option("training", 0, "optimiser steps; 0: the preset's")
    batch_size: int = option("training", 0, "windows a step, over all processes; 0: the preset's")
    lr: float = option("training", 0.0, "peak learning rate; 0: the preset's")
    seed: int = option("training", 0, "of weights, windows and masks (folds have their own)")
    device: str = option("training", "", "cuda, cpu …; empty: cuda if there is one")
    dtype: str = option("training", "auto", "float32, bfloat16, or auto: what is faster here")
    save_every: int = option("training", 200, "steps between checkpoints", least=1)
    resume: bool = option("training", False, "continue the checkpoint in --out, with its options")
    quick: bool = option("training", False, "the same path in under a minute, nothing learned")


TRAINING = {"small": dict(steps=1200, batch_size=32, lr=2e-3),
            "paper": dict(steps=33000, batch_size=256, lr=1e-4)}    # 25 x 8,634 sites x 39 years
VERSION = 2                                                 # of the checkpoint's format
STOPS = signal.SIGINT, signal.SIGTERM                       # they end training after a step


def train(o, sites):
    """All of pretraining, on every process; the first one prints and writes the checkpoint."""
    rank, world, device = setup(o.device)
    checkpoint, step = Path(o.out, "pretrained.pt"), 0
    training, validation = split(o, sites)
    torch.manual_seed(o.seed)
    config = configure(o, sites)
    model = StefaLand(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=o.lr, weight_decay=0.0, fused=True)
    some = training[::(len(training) - 1) // 2000 + 1]      # statistics of at most 2,000 sites
    forcing = arrange(sites.forcing[some], sites.dynamic_names, config.dynamic_names)
    static = arrange(sites.static[some], sites.static_names, config.static_names)
    scaling = {"forcing": fit_standardisation(forcing), "static": fit_standardisation(static)}
    ids = sites.ids[training].tolist()
    if o.resume:
        old, saved = load_checkpoint(checkpoint)
        data.check(old.config == config and saved["ids"] == ids,
                   f"--resume: {checkpoint} is of another model or of other training sites")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, scaling = saved["step"], saved["scaling"]
    windows = Windows(sites, scaling, o.seq_len, config.dynamic_names, config.static_names)
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    if o.dtype == "auto":
        o.dtype = fastest_dtype(device)                     # kept for --resume
    if rank == 0:
        print(f"{len(training)} sites to train on, {len(validation)} to validate on, "
              f"hold-out {o.holdout}, fold {o.fold} of {o.folds}\n"
              f"{sum(p.numel() for p in model.parameters()):,} parameters, {device}, {o.dtype}, "
              f"{world} process(es), from step {step}", flush=True)

    interrupted = torch.zeros(1, device=device)             # Ctrl-C ends the loop after a step
    for number in STOPS:
        signal.signal(number, lambda *_: interrupted.fill_(1))
    model.train()
    first, began, shown, stop = step, time.time(), 0.0, False
    while True:
        done = stop or step >= o.steps
        # the first checkpoint is of step 0, so that any run can be resumed
        if rank == 0 and (done or step % o.save_every == 0) and (step > first or step == 0):
            save(checkpoint, version=VERSION, config=asdict(config), options=asdict(o), step=step,
                 ids=ids, latlon=torch.tensor(sites.latlon[training]), scaling=scaling,
                 model=model.state_dict(), optimizer=optimizer.state_dict())
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
        hidden = Masks(*[part[share] for part in hidden])
        with autocast(device, o.dtype):
            errors, counts = wrapped(*batch, hidden=hidden)
        interrupts = interrupted.clone()                    # a signal may arrive after the sum
        if world > 1:
            dist.all_reduce(counts)                         # the mean is over the whole batch
            dist.all_reduce(interrupts)                     # all processes end with the same step
        loss = masked_loss(errors * world, counts)          # DDP averages over the processes
        descend(optimizer, loss, o.lr * learning_rate(step / o.steps), clip=5.0,
                where=f"step {step}; {checkpoint} keeps the last good state")
        step, stop = step + 1, interrupts.item() > 0
        if rank == 0 and (time.time() - shown > 10 or step == o.steps):
            shown, pace = time.time(), (time.time() - began) / (step - first)
            dynamic, static = (errors.detach() * world / counts.clamp(min=1)).tolist()
            print(f"step {step}/{o.steps}  masked loss: dynamic {dynamic:.3f}, static {static:.3f}"
                  f"  {o.batch_size / pace:.1f} samples/s"
                  f"  {(o.steps - step) * pace / 60:.1f} min left", flush=True)
    if rank == 0 and stop:
        print(f"stopped after step {step}; continue with --resume")
    elif rank == 0 and len(validation):
        report(model, windows, validation[:60])
    if world > 1:
        dist.destroy_process_group()


def split(o, sites):
    """Indices of training and validation sites (a tenth), none of them of the fold held out."""
    data.check(o.fold < o.folds, f"--fold {o.fold}: with --folds {o.folds}, 0 to {o.folds - 1}")
    tenth = data.folds(sites, "pub", 10, seed=1) == 0
    kept = data.folds(sites, o.holdout, o.folds) != o.fold
    data.check((~tenth & kept).any(), f"of {len(kept)} sites none is left to train on")
    return np.flatnonzero(~tenth & kept), np.flatnonzero(tenth & kept)


def configure(o, sites):
    """The network's Config for these sites: the preset's, with the changes of --config."""
    chosen, known = {"max_days": o.seq_len}, {f.name for f in fields(Config)}
    for change in re.split(r",(?=\w+=)", o.config) if o.config else []:
        name, _, text = change.partition("=")
        data.check(name in known, f"--config {name}: expected one of {', '.join(sorted(known))}")
        try:
            chosen[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            raise ValueError(f"--config {change}: '{text}' is no number") from None
    left_out = o.without.split(",") if o.without else []
    kept = []
    for names in (sites.dynamic_names, sites.static_names):
        kept.append(tuple(name for name, group in zip(names, data.groups(names))
                          if group not in left_out))
        data.check(kept[-1], f"--without {o.without} leaves none of {', '.join(names)}")
    return Config(*kept, *map(data.groups, kept), **PRESETS[o.preset] | chosen)


def fastest_dtype(device):
    """bfloat16 on CUDA and on processors that multiply in it, else float32."""
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bfloat16" if device.type == "cuda" or has_bf16() else "float32"


def autocast(device, dtype):
    """The context in which products are taken in bfloat16, if that is the dtype."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


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


def save(path, **values):
    """A file of these plain values and tensors, version among them, to be read by load_file."""
    torch.save(values, buffer := io.BytesIO())              # to a full disk, it hides the reason
    data.write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def load_checkpoint(path):
    """The network of a checkpoint, on the CPU, and the dict of all that was saved with it."""
    def rebuild(saved):
        model = StefaLand(Config(**saved["config"]))
        model.load_state_dict(saved["model"])
        lacks = {"scaling", "options", "optimizer", "step", "ids"} - saved.keys()
        data.check(not lacks, f"it lacks {', '.join(sorted(lacks))}")
        return model, saved

    return load_file(path, VERSION, rebuild)


def load_file(path, version, rebuild):
    """rebuild(what torch.save wrote); ValueError says why it cannot be, and no code of it runs."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}: run python train.py first")
    try:
        data.check(zipfile.ZipFile(path).testzip() is None, "it is damaged")    # torch ignores sums
        saved = torch.load(path, map_location="cpu", weights_only=True)
        data.check(saved["version"] == version, f"version {saved['version']}, not {version}")
        return rebuild(saved)
    except pickle.UnpicklingError:              # torch's own text advises to load it nevertheless
        reason = "it holds objects that could be code"
    except Exception as error:
        reason = f"{error!r:.200}"
    raise ValueError(f"{path} cannot be read: {reason}")


class Windows:
    """Standardised sites, served as windows of L days with these variables in this order.

    A variable that the sites do not have is missing (NaN). Daily data may stay on disk (memmap).
    """

    def __init__(self, sites, scaling, days, dynamic_names, static_names):
        data.check(len(sites.dates) >= days,
                   f"{len(sites.dates)} days of data, windows of {days}: pretrain with "
                   "a smaller --seq-len")
        self.days, self.scaling, self.sites = days, scaling["forcing"], sites
        self.dynamic_names = dynamic_names
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
    if names == wanted:
        return values
    result = np.full((*values.shape[:-1], len(wanted)), np.nan, np.float32)
    for v, name in enumerate(wanted):
        if name in names:
            result[..., v] = values[..., names.index(name)]
    return result


def cover_with_windows(days, length, warmup):
    """First days (n,) of windows whose days after the warm-up cover the slice `days`."""
    starts = np.arange(max(days.start - warmup, 0), max(days.stop - warmup, 1), length - warmup)
    return np.unique(np.minimum(starts, max(days.stop - length, 0)))


def day_slice(text, dates, default):
    """"FROM/TO", both included -> slice of `dates`; of an empty text the default."""
    if not text:
        return default
    try:
        first, last = np.array(text.split("/"), "datetime64[D]")
    except ValueError:
        raise ValueError(f"period '{text}': expected FROM/TO, 1989-10-01/1999-09-30") from None
    data.check(dates[0] <= first < last <= dates[-1],
               f"period {text} is not within the data, {dates[0]} to {dates[-1]}")
    return slice(int(np.searchsorted(dates, first)), int(np.searchsorted(dates, last)) + 1)


def fit_standardisation(values):
    """Statistics of (..., V) *training* values: (3, V) log flag, mean, std.

    Variables never negative and skewed (precipitation, areas) are taken as log(1 + x); a variable
    that is missing everywhere gets NaN and stays missing.
    """
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


@torch.no_grad()
def report(model, windows, validation):
    """Print how much of what is hidden is explained at sites never trained on (0 = their mean)."""
    model, site = model.cpu().eval(), np.repeat(validation, 4)      # 4 windows of each
    batch = windows.get(site, windows.starts(site, np.random.default_rng(0)))
    hidden = model.draw_masks(len(site), windows.days, torch.Generator().manual_seed(0))
    errors, counts = model(*batch, hidden)
    for name, error, count in zip(("weather", "attributes"), errors, counts):
        if count > 0:                                       # all is standardised: 1 is no skill
            print(f"R2 of hidden {name} at {len(validation)} sites never trained on: "
                  f"{1 - error / count:.3f}")


def setup(device):
    """(rank, processes, device); joins torchrun's group, nccl on CUDA and gloo on the CPU."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = device or (gpu if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from None
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if platform.libc_ver()[0] == "glibc":       # keep freed blocks: faults are a tenth of a step
        ctypes.CDLL(None).mallopt(-4, 0)                                        # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, 2 ** 31 - 1)                              # M_TRIM_THRESHOLD
    return rank, world, device


def parse(options, description, argv, defaults=None):
    """The command line as an instance of a dataclass of options; --seq-len is its field seq_len."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     usage="%(prog)s [--option value …]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="After an error, --debug shows where it came from.")
    sections = {}

    def refuse(complaint):
        raise ValueError(complaint)
    parser.error = refuse                       # one line, without the usage
    for f in fields(options):
        title = f.metadata["group"]
        if title not in sections:
            sections[title] = parser.add_argument_group(title)
        kind = dict(type=type(f.default), metavar="X")
        if f.default is False:
            kind = dict(action="store_true")
        sections[title].add_argument("--" + f.name.replace("_", "-"), default=f.default, **kind,
                                     help=f"{f.metadata['help']} [%(default)s]")
    parser.set_defaults(**defaults or {})
    o = options(**vars(parser.parse_args(argv)))
    for f in fields(options):
        value, least = getattr(o, f.name), f.metadata["least"]
        data.check(isinstance(value, str) or value >= least,
                   f"--{f.name.replace('_', '-')} {value}: expected {least} or more")
    return o


def tested_folds(o):
    """The numbers in --fold, all or some joined by commas."""
    texts = [str(fold) for fold in range(o.folds)] if o.fold == "all" else o.fold.split(",")
    wrong = [text for text in texts if not text.isdigit() or int(text) >= o.folds]
    data.check(not wrong, f"--fold {o.fold}: expected all, or some of 0 to {o.folds - 1}")
    return [int(text) for text in texts]


def main(argv=None):
    o = parse(Options, __doc__, argv)
    if o.resume:                                            # its options, but for those given now
        _, saved = load_checkpoint(Path(o.out, "pretrained.pt"))
        o = parse(Options, __doc__, argv, saved["options"] | {"out": o.out})
    for name, known in (("preset", PRESETS), ("dtype", ("auto", "float32", "bfloat16"))):
        data.check(getattr(o, name) in known,
                   f"--{name} {getattr(o, name)}: expected one of {', '.join(known)}")
    for name, value in TRAINING[o.preset].items():
        setattr(o, name, getattr(o, name) or value)
    if o.quick:
        o.steps, o.batch_size = min(o.steps, 20), min(o.batch_size, 8)
    before = {number: signal.getsignal(number) for number in STOPS}
    try:
        train(o, data.load(o.data, cache=Path(o.out, "cache"), quick=o.quick))
    finally:                                                # to the caller, as a notebook
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    data.command(main)
