"""From experiment to use: predictions, with their uncertainty, where nothing was measured.

    python finetune.py --holdout none --seeds 3 --data csv:DIR      learn from all sites with data
    python -m applications.predict csv:DIR                          predict all, with data or not

The members of the ensemble are the models saved beside the runs of one setting that learned from
these data or, if none did, from those of the last run: all seeds of that kind of model, or of those
kinds together, whose median is best at the validation sites. Their median is the prediction, its
90 % interval that of ensembles.py; with few basins further runs of finetune.py, with --seed 10
and so on, add validation sites. Daily series, or values per site (out/values). Writes
out/predictions/NAME.npz and, in the folder NAME: sites.csv, for series a csv a site, and with
matplotlib pictures. Interrupted, it continues; for other sites or models it begins anew.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import data
import finetune
from applications import adapters, controls, hybrid, values  # noqa: F401, for their variants
from applications.common import new_figure, save_figure
from applications.ensembles import Calibration, best_mixture, left_out
from train import apply_standardisation, arrange


def take(sites, index):
    """Some of the sites."""
    extra = {name: rows[index] for name, rows in sites.extra.items()}
    return replace(sites, ids=sites.ids[index], latlon=sites.latlon[index], extra=extra,
                   static=sites.static[index], forcing=sites.forcing[index],
                   target=sites.target[index])


def choose_runs(o):
    """The runs of one setting, fold and data, with --runs in their names, and the sites: runs that
    learned from these very data, if there are any, and of those the ones written last."""
    paths = [path for path in Path(o.out).glob("*/*, fold *.npz") if o.runs in path.name]
    data.check(paths, f"{o.out}: no runs with '{o.runs}' in their names: first python finetune.py "
               "--holdout none --seeds 3", FileNotFoundError)
    runs = []
    for path in sorted(paths, key=os.path.getmtime):
        run = dict(np.load(path))
        run |= json.loads(str(run["about"])) | {"path": path}
        run["kind"] = f"{run['setting']}, fold {run['fold']}, learned from data {run['data']}"
        runs.append(run)
    sites = data.load(o.data, runs[-1]["target"], Path(o.out, "cache"))
    own = [run for run in runs if run["data"] == sites.digest]
    kind = (own or runs)[-1]["kind"]
    print(f"models of {kind}; to predict: data {sites.digest}")
    data.tell("not used", sorted({run["kind"] for run in runs} - {kind}))
    return [run for run in runs if run["kind"] == kind], sites


def distances(sites, settings):
    """To the nearest training site, in km and in deviations of an attribute: (N,) each."""
    places, scaling = settings["places"], settings["scaling"]["static"]
    cosine = data.on_sphere(sites.latlon) @ data.on_sphere(places["latlon"].numpy()).T
    km = 6371 * np.arccos(np.clip(np.fmax.reduce(cosine, axis=1), -1, 1))       # fmax: not NaN
    static = arrange(sites.static, sites.static_names, settings["static_names"])
    trained, nearest = apply_standardisation(places["static"].numpy(), scaling), []     # (n, S)
    for site in apply_standardisation(static, scaling):
        squares = np.ma.masked_invalid((site - trained) ** 2).mean(1).filled(np.nan)    # (n,)
        nearest.append(np.sqrt(np.fmin.reduce(squares)))
    return np.float32(km), np.float32(nearest)


def missing_variables(sites, models):
    """What the models read and a site does not have: a list of names for each site."""
    wanted, names = set(), np.array([*sites.static_names, *sites.dynamic_names])
    for model in models:
        config = model.settings["config"] or {"dynamic_names": (), "static_names": ()}
        wanted |= {*config["dynamic_names"], *config["static_names"]}
        wanted.update(*[model.settings[f"{inputs}_names"] for inputs in model.inputs])
    data.check(wanted & {*names.tolist()},
               f"the sites have none of what the models know: {', '.join(sorted(wanted))}")
    seen = [~np.isnan(forcing).all(0) for forcing in sites.forcing]             # N of (C,)
    known = np.hstack([~np.isnan(sites.static), seen])                          # (N, S + C)
    return [sorted(wanted - {*names[row].tolist()}) for row in known]


def check_sites(sites, models, name):
    """ValueError for records too short, and for ids and a name that cannot be those of files."""
    length = max(model.settings.get("length", 1) for model in models)
    data.check(len(sites.dates) >= length, f"the sites have {len(sites.dates)} days, the models "
               f"read windows of {length}: add earlier days, their fields may be empty")
    for text in [*sites.ids, name]:                         # sites.csv is there already
        data.check(not re.search(r"[/\\]|^\.|^sites$", text), f"{text}: its predictions need "
                   "a file or folder of that name, which cannot be: rename the site, or --name")


def open_result(folder, about, shape):
    """An array (N, T, 3) on disk, NaN where nothing is predicted yet: that of an interrupted
    prediction about the same, else a new one in an empty folder."""
    note, array = folder / "about.txt", folder / "values.npy"
    if not note.is_file() or note.read_text() != about:
        if folder.is_dir():
            print(f"{folder}: predictions of other sites or by other models, replaced")
        note.unlink(missing_ok=True)                        # first: what is left belongs to none
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        np.lib.format.open_memmap(array, "w+", np.float32, shape)[:] = np.nan
        data.write_atomically(note, lambda file: file.write(about.encode()))
    return np.load(array, mmap_mode="r+")


def predict(sites, models, calibration, result, folder, unit):
    """Fill `result` (N, T, 3), median, low and high of every site, and write a csv for each."""
    series = result.shape[1] > 1
    todo = np.flatnonzero(np.isnan(result[..., 0]).all(1))
    for first in range(0, len(todo), 16):                   # few: all their days are in memory
        some = take(sites, todo[first:first + 16])
        sims = np.array([model.predict(some) for model in models])              # (K, n, T)
        median = np.median(sims, 0)
        if series:                                          # no weather, no prediction
            median[np.isnan(some.forcing).all(-1)] = np.nan
        quantiles = calibration.quantiles(median) if calibration else np.sort(sims, 0)
        for i, *of_site in zip(todo[first:], median, quantiles[0], quantiles[-1]):
            known = np.isfinite(of_site).all(0)                                 # (T,)
            if series and known.any():
                write_table(folder / f"{sites.ids[i]}.csv", f"date,median ({unit}),low ({unit}),"
                            f"high ({unit})", sites.dates[known], *np.array(of_site)[:, known])
            result[i] = np.transpose(of_site)               # last: marks the site as done
        print(f"{min(first + 16, len(todo))} of {len(todo)} sites", flush=True)
    result.flush()


def write_table(path, header, *columns):
    """A csv of columns (n,) of dates, texts or numbers."""
    formats = ["%.6g" if isinstance(column[0], np.floating) else "%s" for column in columns]
    rows = np.array(columns, object).T                                          # (n, columns)
    data.write_atomically(path, lambda file: np.savetxt(
        file, rows, formats, ",", header=header, comments="", encoding="utf-8"))


def draw_map(path, sites, means, label):
    """Mean of the median and mean width of the interval at every site; means (N, 3)."""
    figure = new_figure(10, 4)
    views = {"mean": means[:, 0], "width of the interval": means[:, 2] - means[:, 1]}
    for axis, (title, shades) in zip(figure.subplots(1, 2), views.items()):
        dots = axis.scatter(sites.latlon[:, 1], sites.latlon[:, 0], 20, shades, cmap="viridis",
                            vmax=np.nanpercentile(shades, 95))
        figure.colorbar(dots, ax=axis, extend="max", label=label)
        axis.set(title=title, xlabel="longitude (degrees)", ylabel="latitude (degrees)")
    save_figure(figure, path)


def draw_series(path, sites, result, chosen, label):
    """Median, interval and observations at the sites `chosen`, in the last year with any."""
    figure = new_figure(10, 2 * len(chosen))
    for axis, i in zip(figure.subplots(len(chosen), squeeze=False)[:, 0], chosen):
        shown = sites.target[i] if np.isfinite(sites.target[i]).any() else result[i, :, 0]
        last = np.flatnonzero(np.isfinite(shown))[-1] + 1
        days = slice(max(last - 365, 0), last)
        axis.fill_between(sites.dates[days], *result[i, days, 1:].T, color="0.8", label="90 %")
        axis.plot(sites.dates[days], result[i, days, 0], "C0", label="median")
        axis.plot(sites.dates[days], sites.target[i, days], "k", lw=0.8, label="observed")
        axis.set(title=sites.ids[i], ylabel=label)
    axis.legend()
    save_figure(figure, path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="the sites: csv:DIR, caravan:DIR …")
    parser.add_argument("--out", default="out", help="folder of runs and of predictions/ [out]")
    parser.add_argument("--runs", default=" none", help="part of their names [of --holdout none]")
    parser.add_argument("--name", default="", help="of the predictions; empty: from the data's")
    o = parser.parse_args(argv)
    runs, sites = choose_runs(o)
    runs, tried = best_mixture(runs)
    for kinds, score in sorted(tried.items(), key=lambda item: -item[1]):
        print(f"at the validation sites {score:.3f}: {' + '.join(kinds)}")
    target, series = runs[0]["target"], runs[0]["validation_obs"].shape[1] > 1
    unit = getattr(data.VARIABLES.get(target), "unit", "its unit")
    models, content = [], sites.digest.encode()             # content: all that it depends on
    for run in runs:
        path = run["path"].with_suffix(".pt")
        models.append((values if path.parent.name == "values" else finetune).load(path))
        content += run["path"].read_bytes() + path.read_bytes()
    missing = missing_variables(sites, models)
    check_sites(sites, models, o.name)
    # the chance of a class needs no interval: it tells by itself how uncertain it is
    calibration = None if models[0].settings.get("classes") else Calibration(*left_out(runs))
    kind, _, path = o.data.partition(":")
    folder = Path(o.out, "predictions", o.name or "-".join([kind, *Path(path).parts[-1:]]))
    shape = len(sites.ids), len(sites.dates) if series else 1, 3
    result = open_result(folder, hashlib.sha256(content).hexdigest(), shape)
    predict(sites, models, calibration, result, folder, unit)

    # (N, 3): of median, low and high
    means = np.stack([np.ma.masked_invalid(rows).mean(0).filled(np.nan) for rows in result])
    write_table(folder / "sites.csv", f"id,lat,lon,mean ({unit}),spread ({unit}),distance (km),"
                "distance (attributes),fed as missing", sites.ids, *sites.latlon.T, means[:, 0],
                means[:, 2] - means[:, 1], *distances(sites, models[0].settings),
                [" ".join(names) for names in missing])
    arrays = dict(ids=sites.ids, latlon=sites.latlon, dates=sites.dates, unit=unit,
                  median=result[..., 0], low=result[..., 1], high=result[..., 2])
    data.write_atomically(Path(f"{folder}.npz"), lambda file: np.savez(file, **arrays))
    known = np.argsort(means[:, 0])[:np.isfinite(means[:, 0]).sum()]            # NaN come last
    print(f"{folder}: {len(known)} of {len(sites.ids)} sites predicted; all in {folder}.npz")
    if not find_spec("matplotlib"):
        return print("no pictures: they need matplotlib")
    draw_map(folder / "map.png", sites, means, f"{target} ({unit})")
    if series and len(known):
        six = known[np.linspace(0, len(known) - 1, min(6, len(known))).astype(int)]
        draw_series(folder / "hydrographs.png", sites, result, six, f"{target} ({unit})")


if __name__ == "__main__":
    data.command(main)
