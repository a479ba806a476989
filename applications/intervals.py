"""How true are the 90 % intervals of predict.py? Their score at held-out sites.

    python finetune.py --seeds 3 --draw 0 --fold all && python -m applications.intervals [--out out]

The interval of an ensemble's median follows from its errors at the validation sites, by the level
of the prediction (conformal, doi 10.1080/01621459.2017.1307116). No member learned from these
sites, but each stopped early by them, on training days; the errors are those of the test days.
"""

import argparse

import numpy as np

import data
from applications.ensembles import common_validation, interval_scores
from eval import load_runs

SHARES = np.arange(0.05, 1, 0.1)        # the quantiles that stand for the distribution: 5 to 95 %


class Calibration:
    """Quantiles of the errors of an ensemble's median, by the level of the median.

    obs, sim (n, T) at validation sites; errors of values that are never negative are those of
    their square roots. With few values there is but one level.
    """

    def __init__(self, obs, sim):
        known = np.isfinite(obs + sim)
        obs, sim = obs[known], sim[known]                                       # (n,) each
        data.check(len(obs) > 1, "no validation site has observations: nothing to calibrate with")
        self.root = obs.min() >= 0
        order = np.argsort(sim)
        parts = np.array_split(order, 10 if len(obs) >= 1000 else 1)
        level, error = self.scale(sim), self.scale(obs) - self.scale(sim)
        self.levels = np.array([level[part].mean() for part in parts])          # (levels,)
        self.offsets = np.array([np.quantile(error[part], SHARES) for part in parts])

    def scale(self, values):
        return np.sqrt(np.maximum(values, 0)) if self.root else values

    def quantiles(self, sim):
        """(...) -> (10, ...): the values that an observation is below with the chance SHARES."""
        level = self.scale(sim)
        result = [level + np.interp(level, self.levels, offset) for offset in self.offsets.T]
        result = np.sort(result, 0)
        return np.maximum(result, 0) ** 2 if self.root else result


def check_intervals(folder):
    """Print how many observations at held-out sites are within the 90 % interval, raw (the members'
    quantiles) and calibrated, its width, crps, and the median's mae; and so in dry and wet halves.
    """
    for setting, models in load_runs(folder).items():
        together = {name: runs for name, runs in models.items()
                    if len({run["seed"] for run in runs}) > 1}
        if len(models) > 1:
            together[" + ".join(models)] = sum(models.values(), [])
        for name, runs in together.items():
            print(f"\n{setting}: {name}")
            rows = {"raw": [], "calibrated": []}
            for fold in sorted({run["fold"] for run in runs}):
                members = [run for run in runs if run["fold"] == fold]
                sims = np.array([run["sim"] for run in members])                # (K, n, T)
                obs, sims_validation = common_validation(members)
                calibration = Calibration(obs, np.median(sims_validation, 0))
                raw = np.quantile(sims, SHARES, axis=0)                         # (10, n, T)
                calibrated = calibration.quantiles(np.median(sims, 0))
                rows["raw"].append((members[0]["obs"], raw))
                rows["calibrated"].append((members[0]["obs"], calibrated))
            for kind, of_folds in rows.items():
                obs = np.concatenate([obs for obs, _ in of_folds])              # (N, T)
                quantiles = np.concatenate([q for _, q in of_folds], 1)         # (10, N, T)
                mean = np.ma.masked_invalid(obs).mean(1).filled(np.nan)         # (N,)
                dry = mean < np.nanmedian(mean)
                for part, chosen in (("all", dry | True), ("dry half", dry), ("wet half", ~dry)):
                    q = quantiles[:, chosen]
                    scores = interval_scores(obs[chosen], q[0], q[-1], q)
                    line = "  ".join(f"{key} {value:.3f}" for key, value in scores.items())
                    print(f"{kind:<12}{part:<10}{line}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out", help="folder whose runs/ finetune.py wrote [out]")
    check_intervals(parser.parse_args(argv).out)


if __name__ == "__main__":
    data.command(main)
