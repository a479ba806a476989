"""From experiment to use: predictions, with their uncertainty, where nothing was measured.

    python finetune.py --holdout none --seeds 3 --data csv:DIR      learn from all sites with data
    python -m applications.predict csv:DIR                          predict all, with data or not

The members of the ensemble are the models saved beside the runs of one setting: all seeds of that
kind of model, or of those kinds together, whose median is best at the validation sites, which no
member learned from. Their median is the prediction, its 90 % interval that of intervals.py. Writes
out/predictions/NAME.npz and, in the folder NAME: sites.csv, for series a csv a site, and with
matplotlib two pictures. Started twice, it continues.
"""

import argparse
import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

import data
import finetune
from applications import adapters, alphaearth, budyko, controls, hybrid, landslide, soil  # noqa
from applications import soil_moisture  # noqa
from applications.ensembles import best_mixture, common_validation
from applications.intervals import Calibration
from train import apply_standardisation, arrange

BATCH = 16                                                  # sites at a time


def take(sites, index):
    """Some of the sites."""
    extra = {name: values[index] for name, values in sites.extra.items()}
    return replace(sites, ids=sites.ids[index], latlon=sites.latlon[index], extra=extra,
                   static=sites.static[index], forcing=sites.forcing[index],
                   target=sites.target[index])


def distances(sites, settings):
    """To the nearest training site, in km and in deviations of an attribute: (N,) each."""
    places, names = settings["places"], settings["static_names"]
    xyz, others = data.on_sphere(sites.latlon), data.on_sphere(places["latlon"].numpy())
    cosine = np.nan_to_num(xyz @ others.T, nan=-1).max(1)
    km = 6371 * np.arccos(np.clip(cosine, -1, 1))
    km[np.isnan(xyz).any(1)] = np.nan
    values = apply_standardisation(arrange(sites.static, sites.static_names, tuple(names)),
                                   settings["scaling"]["static"])               # (N, S)
    nearest = []
    for site in values:
        squares = (site - places["static"].numpy()) ** 2                        # (training, S)
        known = np.isfinite(squares)
        mean = np.where(known, squares, 0).sum(1) / np.maximum(known.sum(1), 1)
        nearest.append(np.sqrt(mean[known.any(1)].min(initial=np.inf)))
    return km, np.array(nearest)


def missing_variables(sites, models):
    """What the models know and a site does not have: a list of names for each site."""
    wanted = set()
    for model in models:
        config = model.settings["config"] or {"dynamic_names": (), "static_names": ()}
        wanted |= {*config["dynamic_names"], *config["static_names"]}
        for inputs in model.inputs:
            wanted |= {*model.settings[inputs + "_names"]}
    own = {*sites.dynamic_names, *sites.static_names}
    data.check(wanted & own,
               f"the sites have none of what the models know: {', '.join(sorted(wanted))}")
    result = []
    for static, forcing in zip(sites.static, sites.forcing):
        known = [name for name, x in zip(sites.static_names, static) if not np.isnan(x)]
        known += [name for name, x in zip(sites.dynamic_names, forcing.T) if not np.isnan(x).all()]
        result.append(sorted(wanted - {*known}))
    return result, len(wanted)


def load_members(folder, part):
    """The saved models of one setting, and what their runs say."""
    paths = sorted(path for path in Path(folder, "runs").glob("*.npz") if part in path.name)
    data.check(paths, f"no runs with '{part}' in their names in {folder}/runs: first python "
               "finetune.py --holdout none --seeds 3", FileNotFoundError)
    runs = []
    for path in paths:
        run = dict(np.load(path))
        runs.append(run | json.loads(str(run["about"])) | {"path": path})
    settings = sorted({f"{run['setting']} {run['options']}" for run in runs})
    data.check(len(settings) == 1 and len({run["fold"] for run in runs}) == 1,
               f"'{part}' fits runs of {len(settings)} settings and several folds: choose by "
               "--runs PART of their names")
    runs, tried = best_mixture(runs)
    for kinds, score in sorted(tried.items(), key=lambda item: -item[1]):
        print(f"at the validation sites {score:.3f}: {' + '.join(kinds)}")
    digest, paths = hashlib.sha256(), [run["path"] for run in runs]
    for path in paths:
        digest.update(path.with_suffix(".pt").read_bytes())
    return [finetune.load(path.with_suffix(".pt")) for path in paths], runs, digest.hexdigest()


def predict(sites, models, runs, folder, about):
    """Median and interval at every site, (N, T, 3), in a file of `folder`; and a csv for each."""
    series = models[0].task.scoring == "series"
    calibration = None                                      # a probability is its own uncertainty
    if models[0].task.scoring != "class":
        obs, members = common_validation(runs)
        calibration = Calibration(obs, np.median(members, 0))
    missing, known = missing_variables(sites, models)
    note, values = folder / "about.json", folder / "values.npy"
    if note.is_file():
        data.check(note.read_text() == about, f"{folder} holds predictions of other models or "
                   "data: move it away, or choose another --name")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        shape = len(sites.ids), len(sites.dates) if series else 1, 3
        np.lib.format.open_memmap(values, "w+", np.float32, shape)[:] = np.nan
        data.write_atomically(note, lambda file: file.write(about.encode()))
    result = np.load(values, mmap_mode="r+")
    possible = np.array([len(names) < known for names in missing])
    if series:
        possible = np.array([not np.isnan(forcing).all() for forcing in sites.forcing])
        print(f"{(~possible).sum()} of {len(possible)} sites have no weather: not predicted")
    todo = np.flatnonzero(possible & np.isnan(result[:, :, 0]).all(1))
    began = shown = time.time()
    for first in range(0, len(todo), BATCH):
        index = todo[first:first + BATCH]
        some = take(sites, index)
        sims = np.array([model.predict(some) for model in models])              # (K, n, T)
        median = np.median(sims, 0)
        if series:                                          # no weather, no prediction
            median[np.isnan(some.forcing).all(-1)] = np.nan
        quantiles = calibration.quantiles(median) if calibration else np.sort(sims, 0)
        for i, *of_site in zip(index, median, quantiles[0], quantiles[-1]):
            if series:
                write_series(folder / f"{file_name(sites.ids[i])}.csv", sites.dates, of_site,
                             models[0].task)
            result[i] = np.stack(of_site, 1)                # last: marks the site as done
        if time.time() - shown > 10:
            shown, done = time.time(), first + len(index)
            left = (shown - began) / done * (len(todo) - done) / 60
            print(f"{done} of {len(todo)} sites, {left:.1f} min left", flush=True)
    result.flush()
    return result, missing


def file_name(site):
    return str(site).replace("/", "_")


def write_series(path, dates, columns, task):
    """date, median, low, high; the unit stands in the header."""
    names = [f"{name} ({task.unit})" for name in ("median", "low", "high")]
    lines = [",".join(["date", *names])]
    lines += [f"{date},{median:.5g},{low:.5g},{high:.5g}"
              for date, median, low, high in zip(dates, *columns) if not np.isnan(median)]
    data.write_atomically(path, lambda file: file.write(("\n".join(lines) + "\n").encode()))


def write_sites(path, sites, result, missing, settings, unit):
    """id, place, means of median and of low and high, distances to training, what was missing."""
    km, attributes = distances(sites, settings)
    means = np.array([np.nanmean(of_site, 0) if np.isfinite(of_site).any() else [np.nan] * 3
                      for of_site in result])                                   # (N, 3)
    lines = [f"id,lat,lon,mean ({unit}),spread ({unit}),distance (km),"
             "distance (attributes),fed as missing"]
    for row in zip(sites.ids, *sites.latlon.T, means[:, 0], means[:, 2] - means[:, 1], km,
                   attributes, missing):
        numbers = ",".join(f"{x:.5g}" for x in row[1:-1])
        lines.append(f"{row[0]},{numbers},{' '.join(row[-1])}")
    data.write_atomically(path, lambda file: file.write(("\n".join(lines) + "\n").encode()))
    return means


def draw(folder, sites, result, means, task):
    """map.png: mean and width of the interval; hydrographs.png: six sites, the last year."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no pictures: they need matplotlib")
        return
    figure = Figure((10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    spread = means[:, 2] - means[:, 1]
    for axis, values, title in zip(axes, (means[:, 0], spread), ("mean", "width of the interval")):
        dots = axis.scatter(sites.latlon[:, 1], sites.latlon[:, 0], 20, values, cmap="viridis",
                            vmax=np.nanpercentile(values, 95))
        figure.colorbar(dots, ax=axis, extend="max", label=f"{task.target} ({task.unit})")
        axis.set(title=title, xlabel="longitude (degrees)", ylabel="latitude (degrees)")
    data.write_atomically(folder / "map.png", lambda file: figure.savefig(file, format="png"))
    if result.shape[1] > 1:
        figure = Figure((10, 12), layout="constrained")
        order = np.argsort(means[:, 0])
        chosen = order[np.linspace(0, len(order) - 1, min(6, len(order))).astype(int)]
        for axis, i in zip(figure.subplots(len(chosen), squeeze=False)[:, 0], chosen):
            days = slice(-365, None)
            median, low, high = result[i, days].T
            axis.fill_between(sites.dates[days], low, high, color="0.8", label="90 %")
            axis.plot(sites.dates[days], median, "C0", label="median")
            axis.set(title=sites.ids[i], ylabel=task.unit)
            axis.margins(x=0)
        axis.legend()
        data.write_atomically(folder / "hydrographs.png",
                              lambda file: figure.savefig(file, format="png"))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="the sites: csv:DIR, caravan:DIR …")
    parser.add_argument("--out", default="out", help="folder of runs/ and of predictions/ [out]")
    parser.add_argument("--runs", default=" none, ", help="part of the names of the runs whose "
                        "models are used, of one setting [' none, ', of --holdout none]")
    parser.add_argument("--name", default="", help="of the predictions; empty: from the data's")
    o = parser.parse_args(argv)
    models, runs, digest = load_members(o.out, o.runs)
    task = models[0].task
    sites = data.load(o.data, task.target, cache=Path(o.out, "cache"))
    kind, _, path = o.data.partition(":")
    name = o.name or "-".join(filter(None, (kind, Path(path).name)))
    folder = Path(o.out, "predictions", name)
    about = json.dumps({"models": digest, "data": o.data, "sites": len(sites.ids),
                        "days": [str(sites.dates[0]), str(sites.dates[-1])]})
    print(f"{len(models)} models of {runs[0]['setting']}")
    result, missing = predict(sites, models, runs, folder, about)
    means = write_sites(folder / "sites.csv", sites, result, missing, models[0].settings, task.unit)
    arrays = dict(ids=sites.ids, latlon=sites.latlon, dates=sites.dates, unit=task.unit,
                  median=result[..., 0], low=result[..., 1], high=result[..., 2])
    data.write_atomically(Path(f"{folder}.npz"), lambda file: np.savez(file, **arrays))
    draw(folder, sites, result, means, task)
    print(f"{folder}: {np.isfinite(means[:, 0]).sum()} of {len(sites.ids)} sites predicted; all in "
          f"{folder}.npz")


if __name__ == "__main__":
    data.command(main)
