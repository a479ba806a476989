"""AlphaEarth's 64 values of a place instead of our embedding (arXiv 2507.22291).

    python -m applications.alphaearth                       NDVI of the synthetic world
    python -m applications.alphaearth --data alphaearth:DIR --vectors DIR/embeddings.npz
    python train.py && python -m applications.alphaearth --task streamflow --model \\
        resconn,alphaearth,alphaearth-resconn,lstm

FILE of --vectors is a csv with columns A00 to A63, or an npz with an (n, 64) array, either with id
or with lat and lon; any task of finetune.py and applications/soil.py takes it. alphaearth:DIR holds
points (npz: lat, lon, and s2 (n, k) with s2_names, s2_ndvi among them), whose NDVI is predicted.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

import data
import finetune
from applications import common, soil       # soil for its tasks: clay, silt, sand

CHANNELS = [f"a{i:02d}" for i in range(64)]                 # of a csv, in lower case
NEAR = 5.0                                                  # km to the place of a vector, at most


@dataclass
class Options(finetune.Options):
    vectors: str = finetune.option("data", "", "csv or npz of AlphaEarth's vectors, joined by id, "
                                               f"or by place within {NEAR:.0f} km")


def add_vectors(sites, options):
    """`sites` whose extra["vectors"], (N, 64), are those of --vectors; NaN where there is none."""
    if options.vectors:
        vectors = join_vectors(sites, Path(options.vectors))
    else:
        data.check("latents" in sites.extra,
                   "no vectors are known of these sites: give --vectors FILE")
        rng, latents = np.random.default_rng(0), sites.extra["latents"]         # (N, 8)
        noise = 0.3 * rng.standard_normal((len(latents), 64))
        vectors = np.tanh(latents @ rng.standard_normal((8, 64)) + noise)
    return replace(sites, extra=sites.extra | {"vectors": vectors.astype(np.float32)})


def join_vectors(sites, path):
    """The vectors of a file for these sites, (N, 64): of the same id, or else the nearest place.

    NaN where there is none within NEAR km. ValueError if the file lacks what it takes, has an id
    twice, or a vector for none of the sites.
    """
    table = vectors_of_csv(path) if path.suffix == ".csv" else vectors_of_npz(path)
    if "id" in table:
        same = sites.ids[:, None] == np.array(table["id"])                      # (N, n)
        twice = sites.ids[same.sum(1) > 1]
        data.check(not len(twice), f"{path}: the id {twice[:1]} twice")
        nearest, found = same.argmax(1), same.any(1)                            # (N,) each
    else:
        places = np.stack([table["lat"], table["lon"]], 1)                      # (n, 2)
        wrong = places[(abs(places) > (90, 360)).any(1)]
        data.check(not len(wrong), f"{path}: latitude and longitude {wrong[:1]} out of range")
        cosine = data.on_sphere(sites.latlon) @ data.on_sphere(places).T        # (N, n)
        cosine = np.nan_to_num(cosine, nan=-1)              # an unknown place is far from all
        nearest, found = cosine.argmax(1), cosine.max(1) > np.cos(NEAR / 6371)
    data.check(found.any(), f"{path}: has a vector for none of the sites")
    print(f"{path}: vectors for {found.sum()} of {len(found)} sites")
    return np.where(found[:, None], table["vectors"][nearest], np.nan)          # (N, 64)


def vectors_of_csv(path):
    """{"vectors": (n, 64), "id": (n,)}, or with lat and lon for want of an id."""
    table = data.Table(path, CHANNELS)
    vectors = np.stack([table.numbers(name) for name in CHANNELS], 1)           # (n, 64)
    if "id" in table.columns:
        return {"vectors": vectors, "id": table.columns["id"]}
    table = data.Table(path, ["lat", "lon"])
    return {"vectors": vectors, "lat": table.numbers("lat"), "lon": table.numbers("lon")}


def vectors_of_npz(path):
    """Likewise, of an npz; its vectors are the array with 64 columns, under whatever name."""
    arrays = common.read_npz(path)
    wide = [name for name, values in arrays.items() if values.shape[1:] == (64,)]
    data.check(wide, f"{path}: no array (n, 64) among {[*arrays]}")
    axes = {"id": "n"} if "id" in arrays else {"lat": "n", "lon": "n"}
    arrays = common.read_npz(path, text=("id",), **{wide[0]: "nk"}, **axes)     # now checked
    return {"vectors": arrays[wide[0]]} | {name: arrays[name] for name in axes}


def read_points(folder):
    """Points and their NDVI, which stands among the attributes until it is made the target."""
    path = common.one_file(folder, "*.npz")
    arrays = common.read_npz(path, text=("s2_names",), lat="n", lon="n", s2="nk", s2_names="k")
    names = arrays["s2_names"].tolist()
    data.check("s2_ndvi" in names, f"{path}: no s2_ndvi among {names}")
    ndvi = arrays["s2"][:, names.index("s2_ndvi")]                              # (n,)
    for i, latlon in enumerate(zip(arrays["lat"], arrays["lon"])):
        yield data.Record(f"{path.stem}_{i:04d}", path, latlon, {"ndvi": ndvi[i]}, {})


data.READERS["alphaearth"] = read_points
finetune.VARIANTS["alphaearth"] = finetune.Variant("vectors", inputs=())
finetune.VARIANTS["alphaearth-resconn"] = finetune.Variant("vectors")
finetune.TASKS["ndvi"] = finetune.Task(
    "ndvi", models="alphaearth,glm", baseline="glm", inputs=("static",), head=common.MLPHead,
    scoring="value", prepare=partial(common.attribute_as_target, "ndvi"))


def main(argv=None):
    """finetune's, with the vectors joined to the sites of whatever task it is."""
    for name, task in finetune.TASKS.items():
        finetune.TASKS[name] = replace(task, prepare=partial(prepare, task.prepare))
    common.main("ndvi", __doc__, Options, argv)


def prepare(of_task, sites, options):
    sites = add_vectors(sites, options)
    return of_task(sites, options) if of_task else sites


if __name__ == "__main__":
    main()
