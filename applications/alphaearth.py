"""AlphaEarth's 64 values of a place (arXiv 2507.22291) beside or in place of our embedding.

    python train.py && python -m applications.alphaearth                    clay, synthetic world
    python -m applications.alphaearth --target ndvi --data alphaearth:DIR --vectors \\
        DIR/embeddings.npz --model alphaearth,glm --holdout pur --fold all

`alphaearth` reads the vectors alone, `alphaearth-resconn` the attributes, too; resconn, mlp and glm
are those of values.py. --vectors FILE: a csv with columns A00 to A63, or an npz with an (n, 64)
array, either with id or with lat and lon; whole numbers from -127 to 127 are decoded, -128 is
missing. alphaearth:DIR holds points (npz: lat, lon, and s2 (n, k) with s2_names, s2_ndvi among
them). Without --vectors the synthetic world gets some: its latents, mixed, with noise.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

import data
from applications import soil, values
from applications.common import one_file, read_npz

NEAR = 5.0                                                  # km to the place of a vector, at most
CHANNELS = [f"a{i:02d}" for i in range(64)]                 # of a csv, in lower case

values.LAYERS["vectors"] = values.Tokens
VARIANTS = values.VARIANTS | {"alphaearth": ("vectors",),
                              "alphaearth-resconn": ("vectors", "attributes")}


def read(folder):
    """Points and their NDVI, which stands among the attributes until it is made the target."""
    path = one_file(folder, "*.npz")
    arrays = read_npz(path, text=("s2_names",), lat="n", lon="n", s2="nk", s2_names="k")
    names = arrays["s2_names"].tolist()
    data.check("s2_ndvi" in names, f"{path}: no s2_ndvi among {names}")
    ndvi, no_dates = arrays["s2"][:, names.index("s2_ndvi")], np.array([], "datetime64[D]")
    for i, latlon in enumerate(zip(arrays["lat"], arrays["lon"])):
        yield data.Record(f"{path.stem}_{i:04d}", path, latlon, {"ndvi": ndvi[i]}, no_dates, {})


def read_vectors(path):
    """vectors (n, 64) of unit length, NaN where missing; and id (n,), or lat and lon (n,) each."""
    if path.suffix == ".csv":
        table = data.read_table(path, CHANNELS[0])
        data.check({*CHANNELS} <= table.keys(), f"{path}: expected the columns A00 to A63")
        table["vectors"] = np.stack([table[name] for name in CHANNELS], 1)
    else:
        table = read_npz(path)
        wide = [array for array in table.values() if array.shape[1:] == (64,)]
        data.check(wide, f"{path}: no array (n, 64) among {[*table]}")
        table["vectors"] = wide[0].astype(np.float32)
    v = table["vectors"]
    fine = [np.shape(table.get(name)) == v.shape[:1] for name in ("id", "lat", "lon")]
    data.check(fine[0] or all(fine[1:]), f"{path}: expected an id, or lat and lon, of each vector")
    if (np.nan_to_num(v) % 1 == 0).all() and (abs(v) > 1).any():     # as archives store them
        v = np.where(v == -128, np.nan, np.sign(v) * (v / 127.5) ** 2)
    length = np.linalg.norm(v, axis=1)                      # a mean of some is a little shorter
    wrong = length[(length < 0.5) | (length > 1.1)]
    data.check(not len(wrong), f"{path}: {len(wrong)} vectors of a length like {wrong[:1]}, not 1")
    return table | {"vectors": v}


def join_vectors(sites, path):
    """The vectors of a file for these sites, (N, 64): of the same id, or else the nearest place.

    NaN where there is none within NEAR km. ValueError if the file has an id twice, or a vector for
    none of the sites.
    """
    table = read_vectors(path)
    if "id" in table:
        data.check(len({*table["id"]}) == len(table["id"]), f"{path}: an id twice")
        near = np.float32(sites.ids[:, None] == table["id"])                    # (N, n)
    else:
        places = np.stack([table["lat"], table["lon"]], 1)                      # (n, 2)
        near = data.on_sphere(sites.latlon) @ data.on_sphere(places).T          # cosines (N, n)
        near = np.nan_to_num(near, nan=-1)                  # an unknown place is far from all
    nearest, found = near.argmax(1), near.max(1) > np.cos(NEAR / 6371)          # (N,) each
    data.check(found.any(), f"{path}: has a vector for none of the sites")
    print(f"{path}: vectors for {found.sum()} of {len(found)} sites")
    return np.where(found[:, None], table["vectors"][nearest], np.nan)          # (N, 64)


def load_sites(o):
    """Sites with --target as their target (N, 1) and extra["vectors"] (N, 1, 64), 0 = unknown."""
    sites = data.load(o.data, cache=Path(o.out, "cache"), quick=o.quick)
    if o.vectors:
        vectors = join_vectors(sites, Path(o.vectors))
    else:
        data.check("latents" in sites.extra, f"--data {o.data} has no vectors: give --vectors FILE")
        rng, latents = np.random.default_rng(0), sites.extra["latents"]         # (N, 8)
        noise = 0.3 * rng.standard_normal((len(latents), 64))
        vectors = np.tanh(latents @ rng.standard_normal((8, 64)) + noise)
    vectors = np.nan_to_num(vectors).astype(np.float32)[:, None]
    return soil.attribute_as_target(replace(sites, extra={"vectors": vectors}), o.target)


def main(argv=None):
    values.main(__doc__, load_sites, argv, VARIANTS, target="clay", vectors="")


if __name__ == "__main__":
    data.command(main)
