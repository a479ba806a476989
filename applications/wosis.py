"""Reader of WoSIS: clay, silt and sand (%) of the topsoil at profiles all over the world.

    python -m applications.soil --data wosis:DIR,csv:DIR

DIR is a snapshot as tab-separated tables, of 2019 (Batjes et al. 2020,
doi 10.5194/essd-12-299-2020): *_profiles.tsv and *_physical.tsv; or of 2023 (Batjes et al. 2024,
doi 10.5194/essd-16-4735-2024): *_profiles.tsv, *_clay.tsv, *_silt.tsv and *_sand.tsv.
"""

from collections import defaultdict

import numpy as np

import data
from applications.common import one_file

TEXTURE = ("clay", "silt", "sand")
LAYER = {"profile_id": ("id", 1), "upper_depth": ("top", 1), "lower_depth": ("bottom", 1)}
PROFILE = {"profile_id": ("id", 1), "latitude": ("lat", 1), "longitude": ("lon", 1)}


def read(folder):
    """A Record for each profile: texture of 0 to 30 cm, its layers weighted by their thickness.

    Left out: profiles without texture there, or whose parts do not add up to 100 ± 5 %.
    """
    total, thickness = defaultdict(float), defaultdict(float)               # of each profile
    for (profile, top, bottom), parts in read_layers(folder).items():
        inside = min(bottom, 30) - max(top, 0)                              # cm; NaN if unknown
        if inside > 0 and len(parts) == len(TEXTURE):
            total[profile] += inside * np.array([parts[name] for name in TEXTURE])     # (3,)
            thickness[profile] += inside

    path, left_out, no_dates = one_file(folder, "*_profiles.tsv"), [], np.array([], "datetime64[D]")
    table = read_columns(path, PROFILE)
    for profile, lat, lon in zip(table["id"].tolist(), table["lat"], table["lon"]):
        texture = total[profile] / max(thickness[profile], 1e-9)            # (3,), 0 if unknown
        if abs(np.sum(texture) - 100) < 5.001:
            static = dict(zip(TEXTURE, texture))
            yield data.Record(profile, path, (lat, lon), static, no_dates, {})
        else:
            left_out.append(profile)
    data.tell(f"{path}: left out, no texture of 0 to 30 cm or not 100 % in all", left_out)
    data.tell(f"{path}: lacks the profiles", sorted(thickness.keys() - table["id"].tolist()))


def read_layers(folder):
    """{(profile, top, bottom in cm): {part: %}} of all layers, without the parts not measured."""
    parts = {f"{part}_value_avg": (part, 1) for part in TEXTURE}
    tables = [(path, parts) for path in folder.glob("*_physical.tsv")]      # one, of 2019
    if not tables:                                                          # of 2023
        for part in TEXTURE:
            tables.append((one_file(folder, f"*_{part}.tsv"), {"value_avg": (part, 1)}))
    layers = defaultdict(dict)
    for path, parts in tables:
        table = read_columns(path, LAYER | parts)
        keys = list(zip(table["id"].tolist(), table["top"].tolist(), table["bottom"].tolist()))
        for part, _ in parts.values():
            for key, value in zip(keys, table[part].tolist()):
                if not np.isnan(value):
                    layers[key][part] = value
    return layers


def read_columns(path, columns):
    """{our name: (n,) values} of a table that must have all of these columns."""
    table = data.read_table(path, "id", "\t", columns=columns)
    absent = [column for column, (name, _) in columns.items() if name not in table]
    data.check(not absent, f"{path}: no column {', '.join(absent)}")
    return table
