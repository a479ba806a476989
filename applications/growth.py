"""How the cost of pretraining grows, measured here, and a plan for what does not fit here.

    python -m applications.growth                   five minutes
    python -m applications.growth --quick           two small settings

Sites, days in a window and width are varied one at a time, each setting in a process of one thread
of its own, with weather mapped from disk: the synthetic world's, repeated. The plan: the seconds of
a sample are a sum of what grows with T D^2 (products), T D (all between them) and T^2 D
(attention), and of a share of what each step costs by itself. What it is worth is shown: each
setting is predicted from all others. Of several processes `torchrun … train.py` tells the pace.
"""

import os
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from torch.optim.optimizer import register_optimizer_step_post_hook

import data
import train


class Setting(NamedTuple):
    """What is varied, and by default the middle of it."""
    sites: int = 1000
    days: int = 365                             # T, in a window
    width: int = 64                             # D
    layers: int = 2                             # N, of the encoder
    batch: int = 16                             # windows a step


VALUES = {"sites": (1000, 10_000, 100_000), "days": (90, 180, 365, 730, 1460),
          "width": (32, 64, 128, 256, 512)}
RANGES = {name: [Setting()._replace(**{name: value}) for value in VALUES[name]] for name in VALUES}


def measure(s, steps):
    """Pretrain for some steps: seconds to the first, seconds of a step."""
    o, after_steps = train.options(["--holdout", "none", "--device", "cpu"]), []
    o.steps, o.batch_size, o.short = steps, s.batch, 0
    o.config = {"max_days": s.days, "d_model": s.width, "d_ff": 2 * s.width,
                "n_layers": s.layers, "n_heads": s.width // 32}
    sites, row = data.synthetic_world(n_sites=500, years=s.days // 365 + 1), np.arange(s.sites)
    sites.ids, sites.target = row.astype(str), sites.target[row % 500, :1]      # no target is read
    sites.latlon, sites.static = sites.latlon[row % 500], sites.static[row % 500]

    def note(*_):
        after_steps.append(time.time())
    register_optimizer_step_post_hook(note)
    with TemporaryDirectory() as o.out, open(Path(o.out, "weather"), "wb") as weather:
        for _ in range(0, s.sites, 500):
            sites.forcing.tofile(weather)
        shape = s.sites, *sites.forcing.shape[1:]
        sites.forcing = np.memmap(weather.name, np.float32, "r", shape=shape)
        began = time.time()
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            train.train(o, sites)
    return after_steps[0] - began, np.median(np.diff(after_steps))


def terms(s):
    """What the seconds of a sample are a sum of, but for the factors: (4,)."""
    tokens, products = s.days + 1, 8 * s.layers + 7         # of D x D; the LSTM's are 6 of them
    return np.array([tokens * products * s.width ** 2, tokens * s.layers * s.width,
                     tokens ** 2 * s.layers * s.width, 1 / s.batch])


def fit(seconds):
    """{setting: seconds of a sample} -> the factors (4,) of the least relative errors, none of
    them negative."""
    x = np.stack([terms(s) / measured for s, measured in seconds.items()])      # (n, 4)
    kept = np.ones(4)
    for _ in range(4):                                      # what would be negative leaves
        factors = np.linalg.lstsq(x * kept, np.ones(len(x)), rcond=None)[0]
        kept = kept * (factors > 0)
    return factors * kept


def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small settings")
    quick, rows, steps = parser.parse_args(argv).quick, sum(RANGES.values(), []), 12
    if quick:
        rows, steps = [Setting(100, 90, 32, batch=size) for size in (16, 8)], 3
    os.environ["OMP_NUM_THREADS"] = "1"                     # of the new processes
    seconds, guesses = {}, {}                               # of a sample, by setting
    for s in dict.fromkeys(rows):                           # the middle but once
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            first, step = pool.submit(measure, s, steps).result()
        seconds[s] = step / s.batch
        print(f"{s.sites:>7,} sites, {s.days:>4} days, width {s.width:>3}: {1 / seconds[s]:6.1f} "
              f"samples/s, first step after {first:.1f} s", flush=True)
    for s in seconds:
        others = {other: measured for other, measured in seconds.items() if other != s}
        guesses[s] = terms(s) @ fit(others)
    print("predicted from all others:", *[f"{guesses[s] / seconds[s] - 1:+.0%}" for s in seconds])
    factors, names = fit(seconds), ("T (8 N + 7) D²", "T N D", "T² N D", "a step")
    print("seconds a sample:", " + ".join(f"{x:.1e} {name}" for x, name in zip(factors, names)))
    hours = 33_000 * 256 * terms(Setting(width=256, layers=4, batch=256)) @ factors / 3600
    print("the paper's pretraining (8,634 sites, 39 years, 33,000 steps of 256 windows), here, one "
          f"process: {8634 * 39 * 365.25 * 6 * 4 / 1e9:.1f} GB of weather, {hours:,.1f} hours")


if __name__ == "__main__":
    data.command(main)
