"""Ensembles: medians over seeds and models, gains over a baseline, and intervals that are checked.

    python finetune.py --seeds 3 && python -m applications.ensembles [--out out]

Prints eval.py's table with rows for the median of each model's seeds, of all models and of the
mixture of models that is best at the validation sites, which no member learned from; the gain of
each row over the baseline, paired by site, with the p-value of a sign test; and how true the 90 %
intervals of predict.py are at the test sites. They follow from the errors at the validation sites
by the level of the prediction (conformal, doi 10.1080/01621459.2017.1307116), each site predicted
by the members that left it out (CV+, doi 10.1214/20-AOS1965): these sites only told them when to
stop.
"""

import argparse
import math
from itertools import combinations

import numpy as np

import data
from applications.figures import by_site
from eval import load_runs, series_scores, table

SHARES = np.arange(0.05, 1, 0.1)        # the quantiles that stand for the distribution: 5 to 95 %


def together(models):
    """{name: lists of runs whose median is one run}: of each model's seeds and of all models, of
    one fold and of sites drawn by one --seed; `models` as eval.load_runs gives them."""
    result, everything = {}, {" + ".join(models): sum(models.values(), [])}
    for name, runs in (models | everything).items():
        parts = {}
        for run in runs:
            parts.setdefault((run["fold"], run["options"]["seed"]), []).append(run)
        if len(parts) < len(runs):
            result[name] = [*parts.values()]
    return result


def median(runs):
    """One run in place of several of a fold: the median of their predictions."""
    return runs[0] | {"sim": np.median([run["sim"] for run in runs], 0)}


def left_out(runs):
    """obs and sim, (n, T) each, at the validation sites of any run: the median of those runs that
    left the site out."""
    obs, sims = {}, {}
    for run in runs:
        for i, site in enumerate(run["validation_ids"]):
            obs[site] = run["validation_obs"][i]
            sims.setdefault(site, []).append(run["validation_sim"][i])
    return np.array([*obs.values()]), np.array([np.median(sims[site], 0) for site in obs])


def best_mixture(runs):
    """The runs of those models whose median scores best at sites they left out, by their
    clipped NSE; and {names: that score} of every mixture."""
    names, tried = sorted({run["model"] for run in runs}), {}
    # of equals, the larger mixture; of very many models only all together and each by itself
    for n in range(len(names), 0, -1) if len(names) < 10 else (len(names), 1):
        for some in combinations(names, n):
            obs, sim = left_out([run for run in runs if run["model"] in some])
            if obs.shape[1] == 1:                           # values: all sites are one series
                obs, sim = obs.T, sim.T
            tried[some] = series_scores(obs, sim)["clipped"]
    best = max(tried, key=lambda some: np.nan_to_num(tried[some], nan=-np.inf))
    return [run for run in runs if run["model"] in best], tried


def tell_gains(rows, baseline):
    """Print each row's gain in NSE over the row of the baseline, site by site."""
    base = by_site(rows.get(baseline, []))
    for name, runs in rows.items():
        if base and name != baseline:
            mine = by_site(runs)
            both = [site for site in mine if site in base]
            gain = np.array([mine[site]["nse"] - base[site]["nse"] for site in both])
            print(f"gain of {name} over {baseline}: median {np.nanmedian(gain):+.3f}, better at "
                  f"{(gain > 0).sum()} of {len(gain)} sites, p {sign_test(gain):.1e}")


def sign_test(difference):
    """Two-sided exact p-value that a difference is as often positive as negative."""
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    n = wins + losses                                       # neither ties nor NaN
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2 ** n) if n else math.nan


class Calibration:
    """Quantiles of an observation given an ensemble's median, by the level of the median.

    obs, sim (n, T) at n sites that no member learned from. Errors of what is never negative are
    those of square roots. The days of a site err together, so that it is the sites that count:
    errors are taken as if one more site erred the other way, and wider by the ratio of Student's t
    with n degrees of freedom to the normal distribution: 3.8 times for one site, 1.1 for ten.
    """

    def __init__(self, obs, sim):
        known = np.isfinite(obs + sim)                                          # (n, T)
        n = int(known.any(1).sum())
        data.check(n, "no validation site has observations: nothing to calibrate with")
        print(f"validation sites of the 90 % interval: {n}" + " (few: --seed adds some)" * (n < 10))
        self.root = obs[known].min() >= 0
        level = self.scale(sim[known])                                          # (values,)
        error = self.scale(obs[known]) - level
        wider = np.quantile(np.random.default_rng(0).standard_t(n, 200_000), 0.95) / 1.645
        self.levels, self.offsets = [], []                  # (levels,), (levels, 10)
        n_levels = max(min(10, n // 3, len(level) // 100), 1)
        for part in np.array_split(np.argsort(level), n_levels):
            errors = np.concatenate([error[part], -error[part][::n]])
            self.levels.append(level[part].mean())
            self.offsets.append(wider * np.quantile(errors, SHARES))

    def scale(self, values):
        return np.sqrt(np.maximum(values, 0)) if self.root else values

    def quantiles(self, sim):
        """(...) -> (10, ...): the values that an observation is below with the chance SHARES."""
        level, offsets = self.scale(sim), np.transpose(self.offsets)            # (10, levels)
        result = np.array([level + np.interp(level, self.levels, row) for row in offsets])
        return np.maximum(result, 0) ** 2 if self.root else result


def interval_scores(obs, quantiles):
    """Of obs (N, T) and their quantiles SHARES (10, N, T): the share of obs within the outermost,
    of all, of the half of the sites with the lower mean and of the other; the mean width; mae of
    the median; crps (doi 10.1198/016214506000001437, eq. 21). In the unit of obs."""
    known = np.isfinite(obs)                                                    # (N, T)
    mean = np.ma.masked_invalid(obs).mean(1, keepdims=True).filled(np.nan)
    dry = known & (mean < np.nanmedian(mean))
    inside = (quantiles[0] <= obs) & (obs <= quantiles[-1])
    o, x = obs[known], quantiles[:, known]                                      # (n,), (10, n)
    between = np.arange(-9, 10, 2) @ x / 100                # half the mean difference of two of x
    return {"coverage": inside[known].mean(), "dry half": inside[dry].mean(),
            "wet half": inside[known & ~dry].mean(), "width": (x[-1] - x[0]).mean(),
            "mae": abs(np.median(x, 0) - o).mean(), "crps": (abs(x - o).mean(0) - between).mean()}


def check_intervals(name, parts):
    """Print how true 90 % intervals are at test sites: raw, the members' quantiles; calibrated."""
    rows = {"raw": [], "calibrated": []}
    for runs in parts:
        rows["raw"].append(np.quantile([run["sim"] for run in runs], SHARES, axis=0))
        rows["calibrated"].append(Calibration(*left_out(runs)).quantiles(median(runs)["sim"]))
    for kind, of_folds in rows.items():
        obs = np.concatenate([runs[0]["obs"] for runs in parts])                # (N, T)
        scores = interval_scores(obs, np.concatenate(of_folds, 1))
        texts = [f"{key} {value:.3f}" for key, value in scores.items()]
        print(f"90 % of {name}, {kind}", *texts, sep="  ")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out", help="folder whose runs/ finetune.py wrote [out]")
    parser.add_argument("--baseline", default="lstm", help="model to compare with [%(default)s]")
    o = parser.parse_args(argv)
    settings = load_runs(o.out)
    data.check(settings, f"{o.out}/runs: no runs with test sites, start with python finetune.py")
    for setting, models in settings.items():
        ensembles, medians = together(models), {}
        for name, parts in ensembles.items():
            medians[f"{name}, median"] = [median(runs) for runs in parts]
            if name not in models:                          # of all models
                best = [best_mixture(runs)[0] for runs in parts]
                medians["chosen by validation, median"] = [median(runs) for runs in best]
        table({setting: models | medians})
        tell_gains(models, o.baseline)
        tell_gains(medians, f"{o.baseline}, median")
        for name, parts in ensembles.items():
            check_intervals(name, parts)


if __name__ == "__main__":
    data.command(main)
