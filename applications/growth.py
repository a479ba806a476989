"""How the cost of pretraining grows, measured here, and a plan for what does not fit here.

    python -m applications.growth [--out out]       five minutes; draws growth.png (matplotlib)

Sites, days in a window, width and processes are varied one at a time, each setting in processes of
its own, with weather mapped from disk. The plan: the seconds of a sample are a sum of what grows
with T D^2 (products), T D (all between them) and T^2 D (attention), and of a share of what each
step costs by itself. What it is worth is shown: each setting is predicted from all others.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import data
import train
from applications.figures import new_figure, save


@dataclass
class Setting:
    """What is varied, and by default the middle of it."""
    sites: int = 1000
    days: int = 365                             # T, in a window
    width: int = 64                             # D
    processes: int = 1                          # of one thread each
    layers: int = 2                             # N, of the encoder
    batch: int = 16                             # windows a step and process


RANGES = dict(sites=(1000, 10_000, 100_000), days=(90, 180, 365, 730, 1460),
              width=(32, 64, 128, 256, 512), processes=(1, 2))


def settings():
    """Each range by itself; the middle but once."""
    rows = [Setting(**{name: value}) for name, values in RANGES.items() for value in values]
    return [row for k, row in enumerate(rows) if row not in rows[:k]]


def build(path, n_sites, years):
    """Daily weather of so many sites, in a file: the synthetic world's, repeated."""
    world = data.synthetic_world(n_sites=500, years=years).forcing
    weather = np.lib.format.open_memmap(path, "w+", np.float32, (n_sites, *world.shape[1:]))
    for first in range(0, n_sites, len(world)):
        weather[first:first + len(world)] = world[:n_sites - first]


def measure(setting, path, steps):
    """Pretrain for some steps: {seconds to the first, seconds of a step, MB} of this process.

    MB, on Linux: the most that was resident, what had been read of the mapped weather included.
    """
    s, weather = Setting(**setting), np.load(path, mmap_mode="r")
    world = data.synthetic_world(n_sites=500, years=weather.shape[1] // 365)
    row = np.resize(np.arange(500), s.sites)
    sites = replace(world, ids=np.array([f"site_{i}" for i in range(s.sites)]), forcing=weather,
                    static=world.static[row], latlon=world.latlon[row], extra={},
                    target=world.target[row, :1])
    began, ends, descend = time.time(), [], train.descend

    def timed(*args, **kwargs):
        descend(*args, **kwargs)
        ends.append(time.time())
    train.descend = timed
    train.train(train.Options(
        out=str(Path(path).parent), holdout="none", seq_len=s.days, steps=steps, lr=1e-3,
        batch_size=s.batch * s.processes, config=f"d_model={s.width},d_ff={2 * s.width},"
        f"n_layers={s.layers},n_heads={s.width // 32}"), sites)
    train.descend = descend
    status = Path("/proc/self/status")          # ru_maxrss begins with the launching process's
    peak = int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 1024 if status.exists() else 0
    return dict(first=ends[0] - began, step=float(np.median(np.diff(ends))), peak=peak)


def launch(setting, path, steps):
    """measure() in fresh processes of one thread, by torchrun if there are several."""
    several = ["-m", "torch.distributed.run", "--nproc_per_node", str(setting.processes)]
    command = [sys.executable, *(several if setting.processes > 1 else []), "-m",
               "applications.growth", "--measure", json.dumps([asdict(setting), str(path), steps])]
    result = subprocess.run(command, capture_output=True, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})
    answers = [line for line in result.stdout.splitlines() if line.startswith("{")]
    data.check(answers, f"{setting}: {result.stderr[-1000:]}", RuntimeError)
    return json.loads(answers[0])


def pace(setting, step):
    """Samples per second of all processes, from the seconds of a step."""
    return setting.batch * setting.processes / step


def terms(s):
    """What the seconds of a sample are a sum of, but for the factors: (4,)."""
    tokens, products = s.days + 1, 8 * s.layers + 7         # of D x D; the LSTM's are 6 of them
    return np.array([tokens * products * s.width ** 2, tokens * s.layers * s.width,
                     tokens ** 2 * s.layers * s.width, 1 / s.batch])


def fit(rows, seconds):
    """The factors (4,), none of them negative, of the least relative errors."""
    x = np.array([terms(s) for s in rows]) / np.array(seconds)[:, None]         # (n, 4)
    kept, factors = np.ones(4, bool), np.full(4, -1.0)
    while (factors < 0).any():                              # what would be negative leaves
        factors = np.zeros(4)
        factors[kept] = np.linalg.lstsq(x[:, kept], np.ones(len(x)), rcond=None)[0]
        kept &= factors > 0
    return factors


def plan(factors, setting, sites, years, steps, speed=1.0):
    """(GB of weather on disk, hours) of a whole pretraining; speed: of a process, ours = 1."""
    seconds = steps * setting.batch * (terms(setting) @ factors) / speed
    return sites * years * 365.25 * 6 * 4 / 1e9, seconds / 3600


def draw(path, rows, answers, guesses):
    """samples/s over each range, measured and predicted; time to start and memory over sites."""
    figure = new_figure(9.5, 5.5)
    panels = [(name, "samples/s") for name in RANGES]
    panels += [("sites", "seconds to the first step"), ("sites", "MB of memory")]
    for axis, (name, quantity) in zip(figure.subplots(2, 3).flat, panels):
        alike = [k for k, row in enumerate(rows)
                 if row == replace(Setting(), **{name: getattr(row, name)})]
        alike.sort(key=lambda k: getattr(rows[k], name))
        x = [getattr(rows[k], name) for k in alike]
        if quantity == "samples/s":
            y = [pace(rows[k], answers[k]["step"]) for k in alike]
            guess = [rows[k].processes / guesses[k] for k in alike]
            axis.plot(x, guess, "x", color="C0", label="predicted from all others")
        else:
            y = [answers[k]["first" if "seconds" in quantity else "peak"] for k in alike]
        axis.plot(x, y, "o-", color="black", label="measured")
        axis.set(xscale="log", yscale="log", xlabel="days in a window" if name == "days" else name,
                 ylabel=quantity, ylim=(min(y) / 2, 2 * max(y)))
        axis.set_xticks(x, [f"{value:,}" for value in x], minor=False)
        axis.set_xticks([], minor=True)
    figure.axes[0].legend()
    save(figure, path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out", help="folder of growth.png [out]")
    parser.add_argument("--steps", type=int, default=12, help="optimiser steps a setting [12]")
    parser.add_argument("--quick", action="store_true", help="two small settings, no figure")
    parser.add_argument("--measure", help=argparse.SUPPRESS)    # a setting, in its own process
    o = parser.parse_args(argv)
    if o.measure:
        return print(json.dumps(measure(*json.loads(o.measure))), flush=True)
    rows, steps, answers = settings(), o.steps, []
    if o.quick:
        rows, steps = [Setting(100, 90, 32, batch=size) for size in (16, 8)], 3
    with TemporaryDirectory() as folder:
        for s in rows:
            years = s.days // 365 + 1
            weather = Path(folder, f"{s.sites}-{years}.npy")
            if not weather.exists():
                build(weather, s.sites, years)
            answers.append(launch(s, weather, steps))
            print(f"{s.sites:>7,} sites, {s.days:>4} days, width {s.width:>3}, {s.processes} "
                  f"process(es): {pace(s, answers[-1]['step']):6.1f} samples/s, first step after "
                  f"{answers[-1]['first']:.1f} s, {answers[-1]['peak']:.0f} MB", flush=True)
    seconds = np.array([answer["step"] / s.batch for s, answer in zip(rows, answers)])
    guesses = np.zeros(len(rows))
    for k, s in enumerate(rows):
        others = [row for row in rows if row != s]
        guesses[k] = terms(s) @ fit(others, np.delete(seconds, k))
    errors = guesses / seconds - 1
    print("each predicted from all others: " + ", ".join(f"{error:+.0%}" for error in errors))
    factors = fit(rows, seconds)
    print("seconds a sample: " + " + ".join(f"{factor:.1e} {name}" for factor, name in zip(
        factors, ("T (8 N + 7) D²", "T N D", "T² N D", "a step"))))
    speed = factors[0] * 31e12 / 6              # 2 operations a product, and twice that backward
    for text, processes, faster in (("here, 2 processes", 2, 1),
                                    ("8 GPUs that sustain 31 TFLOP/s each", 8, speed)):
        s = Setting(width=256, layers=4, processes=processes, batch=256 // processes)
        gigabytes, hours = plan(factors, s, 8634, 39, 33_000, faster)
        print(f"the paper's pretraining (8,634 sites, 39 years, 33,000 steps of 256 windows), "
              f"{text}: {gigabytes:.1f} GB of weather, {hours:,.1f} hours")
    if not o.quick:
        draw(Path(o.out, "growth.png"), rows, answers, guesses)


if __name__ == "__main__":
    data.command(main)
