"""All tests: python test_all.py [part of a name], or pytest. Real data: $MINSTEFALAND_REAL."""

import os
import re
import sys
import time
import unittest
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen
from tempfile import mkdtemp

import numpy as np
import torch
from numpy import nan

import data
import eval as evaluate
import finetune
import model
import train

REAL = Path(os.environ.get("MINSTEFALAND_REAL", Path(train.__file__).parents[1] / "shared/real"))
needs_real_data = unittest.skipUnless(REAL.exists(), f"no folder {REAL}")
raises = unittest.TestCase().assertRaisesRegex


def small(**changes):
    """A model, and a batch of 5 sites and 60 days for it with some values missing."""
    torch.manual_seed(0)
    m = model.StefaLand(model.Config(
        ("p", "tmax", "tmin"), ("clay", "sand", "height", "area"), ("p", "t", "t"),
        ("soil", "soil", "terrain", "context"), d_model=16, d_hidden=8, **changes)).eval()
    forcing, static, latlon = torch.randn(5, 60, 3), torch.randn(5, 4), 90 * torch.rand(5, 2)
    forcing[0, 5:9, 1], forcing[2, :, 0], static[1, 2] = nan, nan, nan
    return m, forcing, static, latlon, torch.arange(1.0, 61).expand(5, 60)


def test_layers_equal_their_definitions():
    z, weight = map(torch.tensor, np.polynomial.legendre.leggauss(16))
    grid = torch.cartesian_prod(z.asin().rad2deg(), 360 / 32 * torch.arange(32).double())
    basis = model.spherical_harmonics(grid, 6)                                  # (16 32, 49)
    gram = np.pi / 16 * basis.T @ (basis * weight.repeat_interleave(32)[:, None])
    assert basis.shape[1] == 49 and (gram - torch.eye(49)).abs().max() < 1e-12  # orthonormal
    assert model.spherical_harmonics(torch.tensor([[89.9, 10.0]]), 40).isfinite().all()
    torch.manual_seed(0)
    e, total, gelu = model.VariableEmbedding(3, 16, 8), torch.zeros(4, 7, 16), torch.nn.GELU()
    x, hide = torch.randn(4, 7, 3).sqrt(), torch.rand(4, 7, 3) < 0.3            # half of x is NaN
    for b, t, v in np.ndindex(4, 7, 3):
        token = e.w2[:, 8 * v:8 * v + 8] @ gelu(x[b, t, v] * e.w1[v] + e.b1[v]) + e.b2[v]
        total[b, t] += e.mask_vector[v] if hide[b, t, v] or x[b, t, v].isnan() else token
    assert torch.allclose(e(x, hide), total, atol=1e-5)
    x, layer, y = torch.randn(3, 11, 8), model.Linear(8, 5), model.Dropout(0.1)(torch.ones(999_999))
    assert torch.allclose(layer(x), x @ layer.weight.T + layer.bias, atol=1e-6)
    assert abs((y == 0).double().mean() - 26 / 256) < 1e-3 and abs(y.mean() - 1) < 2e-3
    layer, x = model.EncoderLayer(model.Config(d_model=64, n_heads=2)).eval(), torch.randn(3, 9, 64)
    q, k, v = layer.qkv(x).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)     # (B, h, T, D/h)
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    assert torch.allclose(layer.attention(x), layer.out(mixed), atol=1e-5)


def test_masks_and_loss():
    m, *_ = small(p_always=0.0, p_static=0.25, windows=1)
    dynamic, static, location = m.draw_masks(4000, 120)
    (p, tmax, tmin), (clay, sand, height, area) = dynamic.unbind(-1), static.unbind(-1)
    assert torch.equal(tmax, tmin) and torch.equal(clay, sand) and not torch.equal(p, tmax)
    assert not area.any() and set(p.sum(1).tolist()) - {0} == set(range(30, 91))
    assert (p[:, 1:] != p[:, :-1]).sum(1).max() <= 2        # one contiguous window
    for hidden, chance in ((p.any(1), 0.5), (clay, 0.25), (height, 0.25), (location, 0.6)):
        assert abs(hidden.double().mean() - chance) < 0.03
    p = small(p_always=0.2, p_dynamic=0.0)[0].draw_masks(4000, 120)[0][..., 0]
    assert set(p.sum(1).tolist()) == {0, 120} and abs(p.double().mean() - 0.2) < 0.03
    m, forcing, *rest = small()
    hidden = m.draw_masks(5, 60)
    encoded = m.encode(forcing, *rest, hidden)
    parts = zip(m.decode(encoded), (forcing, rest[0]), hidden, *m(forcing, *rest, hidden))
    for output, truth, hide, error, count in parts:
        scored = hide & ~truth.isnan()
        expected = (output - truth)[scored].square().sum()
        assert count == scored.sum() and torch.allclose(error, expected, rtol=1e-5)
    other = torch.where(hidden[0], forcing + 9, forcing)    # what is hidden counts as truth only
    assert torch.allclose(m.encode(other, *rest, hidden), encoded)
    m(forcing.requires_grad_(), *rest, [torch.ones_like(h) for h in hidden])[0].sum().backward()
    assert torch.equal(forcing.grad == 0, forcing.isnan())


def test_sites_do_not_mix_and_bad_input_is_refused():
    m, forcing, static, latlon, doy = small()
    full, nowhere = (m.encode(forcing, static, place, doy) for place in (latlon, None))
    for some in ([3, 0, 4, 1, 2], [1]):
        alone = m.encode(*(x[some] for x in (forcing, static, latlon, doy)))
        assert torch.allclose(full[some], alone, atol=1e-5)
    assert torch.equal(nowhere, m.encode(forcing, static, latlon * nan, doy))
    assert not torch.allclose(nowhere, full) and m.encode(forcing, static).isfinite().all()
    for complaint, *inputs in (
            ("2 dynamic.*tmin", forcing[..., :2], static), ("5 sites.*of 2", forcing, static[:2]),
            ("3 static.*clay", forcing, static[:, :3]), ("missing", forcing * nan, static * nan),
            ("400 days.*365", torch.zeros(5, 400, 3), static)):
        raises(ValueError, complaint, m.encode, *inputs)
    raises(ValueError, "nothing to learn", model.masked_loss, torch.zeros(2), torch.zeros(2))


@needs_real_data
def test_release_parity():
    z, read = np.load(REAL / "release/release_io.npz"), model.StefaLand.from_release
    state = {key[6:]: z[key] for key in z.files if key.startswith("state/")}
    m = read(state, int(z["heads"])).eval()
    x, s, mask = (torch.tensor(z[key]) for key in ("x", "s", "mask"))
    encoded, masked = (m.encode(x, s, hidden=h) for h in (None, (mask, None, None)))
    got = (m.embed(x, s), encoded, *m.decode(encoded), m.decode(masked)[0])
    names = ("tokens", "encoded", "out_dynamic", "out_static", "out_dynamic_masked")
    for key, value in zip(names, got, strict=True):
        assert np.abs(value.detach().numpy() - z[key]).max() < 1e-5, key
    for kind in ("dynamic_names", "static_names"):
        assert getattr(m, kind) == tuple(z[kind])
    raises(ValueError, "surprise", read, state | {"surprise": z["x"]}, 4)
    del state["decoder_norm.bias"]
    raises(ValueError, "decoder_norm.bias", read, state, 4)


def test_synthetic_world_and_evaporation():
    worlds = [vars(data.synthetic_world(seed, 80, 2)) for seed in (0, 0, 1)]
    a, b, c = ({k: np.asarray(x).tobytes() for k, x in world.items()} for world in worlds)
    assert a == b and a["static"] != c["static"]
    began, s = time.time(), data.load("synthetic")
    assert time.time() - began < 10 and s.forcing.shape == (700, 2192, 6)
    rain, pet, flow = s.forcing[..., 0], s.forcing[..., 3].mean(1), s.target.mean(1)
    assert 1.5 < rain.mean() < 4 and 0.2 < (rain > 0).mean() < 0.45 and 2 < pet.mean() < 4
    assert 0.3 < (flow / rain.mean(1)).mean() < 0.6 and (flow < rain.mean(1)).all()
    assert (s.target >= 0).all() and 0.25 < np.isnan(s.static).mean() < 0.4
    wet, slide = (data.load(target=name).target for name in ("soil_moisture", "landslide"))
    assert 0 <= wet.min() and wet.max() < 0.5 and wet.std(1).min() > 0.001
    steep = s.patches[:, 1, 8, 8]
    assert {*slide} == {0, 1} and steep[slide == 1].mean() > steep[slide == 0].mean() + 3
    # FAO-56 example 8: 3 September at 20 S; the equator at an equinox (37.7): Oudin, Hargreaves
    assert abs(data.extraterrestrial_radiation(-20.0, 246) - 32.2) < 0.1
    for share, *t in ((25 / 100, 20.0), (0.0023 * 37.8 * 12 ** 0.5, 20.0, 26.0, 14.0)):
        assert abs(data.potential_evaporation(0.0, 80, *t) - 37.7 / 2.45 * share) < 0.1
    assert data.potential_evaporation(80.0, 1, -30.0) == 0


def archives(old="", new=""):
    """Write a Caravan and a CAMELS archive, `old` replaced in names and texts, for data.load."""
    files = {  # with | between the lines
        "attributes/us/attributes_other_us.csv": "gauge_id,name,gauge_lat,gauge_lon,area,p_mean|"
            'us_1,"A, at B",40.5,-75,100,3.5|us_2,C,41,285.5,200,|us_9,no series,42,-74,1,2',
        "attributes/us/attributes_hydroatlas_us.csv": "gauge_id,slp_dg_sav,cly_pc_sav|us_1,55,20",
        "timeseries/csv/us/us_1.csv": "date,streamflow,total_precipitation_sum,temperature_2m_mean,"
            "snow|2000-01-01,1.5,0,10,9|2000-01-03,,2,11,9|2000-01-04,0.5,4,,9",
        "timeseries/csv/us/us_2.csv": "date,temperature_2m_min,temperature_2m_max|2000-01-02,0,10",
        "basin_mean_forcing/01/01013500_lump_cida_forcing_leap.txt": "  47.24| 250.00|86400000|"
            "Year Mnth Day Hr\tdayl(s)\tprcp(mm/day)\tsrad(W/m2)\ttmax(C)\ttmin(C)\tvp(Pa)|"
            "1980 01 01 12\t43200\t3\t200\t10\t0\t610.8|1980 01 02 12\t43200\t0\t100\t8\t2\t500",
        "usgs_streamflow/01/01013500_streamflow_qc.txt":
            "01013500 1980 01 01   100.00 A|01013500 1980 01 02  -999.00 M",
        "camels_topo.txt": "gauge_id;gauge_lat;gauge_lon;elev_mean|01013500;47.2;-68.6;251",
        "camels_geol.txt": "gauge_id;carbonate_rocks_frac;geol_porostiy|01013500;0.25;NA",
        "camels_hydro.txt": "gauge_id;q_mean|01013500;1.7",
        "net/s1/net_net_s1_sm_0.05_0.05_X_20000101_20000103.stm": "net net s1 45.0 9.0 120 .05 .05 "
            "X-1|2000/01/01 00:00 0.2 G M|2000/01/01 12:00 0.3 G M|2000/01/01 13:00 0.9 D01 M|"
            "2000/01/03 00:00 0.1 G M",
        "net/s1/net_net_s1_sm_0.20_0.20_X_20000101_20000103.stm": "net net s1 45.0 9.0 120 .2 .2 "
            "X-2|2000/01/01 00:00 0.4 G M",
        "net/s2/net_net_s2_sm_0.05_0.05_X_20000101_20000101.stm": "net net s2 46.0 9.0 90 .05 .05 "
            "X-1|2000/01/01 00:00 0.4 G M",
        "net/s1/s1.csv": "date,precipitation,temperature|2000-01-01,3,5|2000-01-02,0,6",
        "w_profiles.tsv": "profile_id\tlatitude\tlongitude|7\t10\t20|8\t11\t21|9\t12\t22",
        "w_physical.tsv": "profile_id\tupper_depth\tlower_depth\tclay_value_avg\tsilt_value_avg\t"
            "sand_value_avg|7\t0\t10\t10\t20\t70|7\t10\t50\t40\t20\t40|8\t0\t30\t10\t10\t10|"
            "9\t0\t20\t\t50\t50"}
    folder = Path(mkdtemp())
    for name, text in files.items():
        path = folder / name.replace(old, new)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace(old, new).replace("|", "\n"), encoding="utf-8")
    return f"caravan:{folder},camels:{folder}"


def test_archives_are_read_joined_and_cached():
    spec, cache = archives(), mkdtemp()
    s, again = data.load(spec, cache=cache), data.load(spec, cache=cache)
    np.testing.assert_equal(vars(again), vars(s))
    assert len(os.listdir(cache)) == 1 and list(s.ids) == ["us_1", "us_2", "01013500"]
    assert np.array_equal(s.dates, np.arange("1980-01-01", "2000-01-05", dtype="M8[D]"))  # no gaps
    v = dict(zip(s.static_names + s.dynamic_names, [*s.static.T, *s.forcing.transpose(2, 0, 1)]))
    for got, expected in (
            (s.latlon, [[40.5, -75], [41, -74.5], [47.2, -68.6]]),              # 285.5 E is 74.5 W
            (v["slope"], [5.5, nan, nan]), (v["area"], [100, 200, 86.4]), (s.target[1], nan),
            (v["clay"], [20, nan, nan]), (v["carbonate"], [nan, nan, 25]),
            (v["elevation"], [nan, nan, 251]), (v["precipitation"][0, -4:], [0, nan, 2, 4]),
            (v["tmax"][0], nan), (v["temperature"][1, -3], 5), (v["temperature"][2, 0], 5),
            (v["shortwave"][2, 0], 200 / 2), (v["humidity"][2, 0], 100 / np.exp(17.27 * 5 / 242.3)),
            (s.target[0, -4:], [1.5, nan, nan, 0.5]), (s.target[2, :2], [2.8316846592, nan])):
        assert np.allclose(got, expected, equal_nan=True), f"{got} is not {expected}"
    assert v["pet"][1, -3] > 0 and "q_mean" not in v
    path = Path(spec.split(",camels:")[1], "timeseries/csv/us/us_1.csv")
    path.write_text(path.read_text().replace("1.5", "2.5"))
    assert np.nanmax(data.load(spec, cache=cache).target[0]) == 2.5
    bare = data.load(archives("camels_", "other_").split(",")[1], cache=None)   # no attributes
    assert bare.static_names == ("elevation", "area") and np.isnan(bare.latlon[0, 1])


def test_archives_of_the_other_tasks():
    folder = archives().split(":")[2]
    s = data.load(f"ismn:{folder}", "soil_moisture", cache=None)
    assert list(s.ids) == ["net_s1"] and s.static.tolist() == [[120]]           # s2: no weather
    assert np.allclose(s.target, [[0.25, nan, 0.1]], equal_nan=True) and s.forcing[0, 0, 0] == 3
    s = data.load(f"wosis:{folder}", cache=None)            # 8 adds up to 30 %, 9 has no clay
    assert list(s.ids) == ["7"] and np.allclose(s.static, [[30, 20, 50]]) and s.latlon[0, 1] == 20
    s = data.load(f"caravan:{folder}", cache=None, static_only=True)
    assert list(s.ids) == ["us_1", "us_2", "us_9"] and s.forcing.shape == (3, 1, 1)
    path = Path(mkdtemp(), "points.npz")
    np.savez(path, lat=[40.5, 47.22], lon=[-75, -68.6], v=np.eye(2, 64, dtype="f4"))
    s = data.join_vectors(data.load(f"caravan:{folder},camels:{folder}", cache=None), path)
    assert s.vectors[0, 0] == 1 and np.isnan(s.vectors[1]).all() and s.vectors[2, 1] == 1   # 2 km
    table = ["id", *(f"A{i:02d}" for i in range(64))], ["us_2", *["0.5"] * 64]
    path.with_suffix(".csv").write_text("\n".join(map(",".join, table)))
    s = data.join_vectors(s, path.with_suffix(".csv"))
    assert np.isnan(s.vectors[0]).all() and (s.vectors[1] == 0.5).all()
    path.with_suffix(".csv").write_text("\n".join(map(",".join, [*table, table[1]])))
    raises(ValueError, "id .*us_2.* twice", data.join_vectors, s, path.with_suffix(".csv"))
    folder = archives("45.0 9.0", "45.0").split(":")[2]
    raises(ValueError, "stm, line 1: 8 fields", data.load, f"ismn:{folder}", cache=None)


@needs_real_data
def test_real_landslides_and_vectors():
    s = data.load(f"landslide:{REAL / 'landslide'}", "landslide", cache=None)
    assert s.patches.shape == (347, 5, 17, 17) and abs(s.target.mean() - 0.5) < 0.02
    # the centre of a patch is the raster cell that the csv's slope was taken from
    slope = s.static[:, s.static_names.index("slope")]
    assert np.corrcoef(s.patches[:, 0, 8, 8], slope)[0, 1] > 0.99
    s = data.load(f"alphaearth:{REAL / 'alphaearth'}", cache=None)
    s = data.join_vectors(s, REAL / "alphaearth/embeddings.npz")
    assert np.allclose(np.linalg.norm(s.vectors, axis=1), 1, atol=0.2) and len(s.ids) == 1270


def test_broken_archives_are_refused():
    for old, new, complaint in (
            ("2,11,9", "2,11", "us_1.csv, line 3.*4 fields"), ("86400000", "0", "to 3.*area"),
            ("2,11,9", "two,11,9", "us_1.csv, line 3.*'two'"), ("41,285.5", "95,0", "us_2.*95"),
            ("2000-01-03", "2000-01-01", "us_1 .*same date twice"),
            ("us_2,C", "us_1,C", "_other_.*twice"), ("2000-01-03", "soon", "csv, line 3.*soon"),
            ("2000-01-03", "today", "us_1.csv, line 3: date is 'today'")):
        raises(ValueError, complaint, data.load, archives(old, new), cache=None)
    raises(FileNotFoundError, "nowhere", data.load, "caravan:/nowhere")
    raises(ValueError, "pigeon.*caravan", data.load, "pigeon:/")


def test_fuzzed_archives_load_or_say_why():
    def numbers(text):
        return lambda t: re.sub(r"\d+\.\d+", text, t)

    harmless = {"BOM": lambda t: "\ufeff" + t, "CRLF": lambda t: t.replace("\n", "\r\n"),
                "blank lines": lambda t: t + "\n\n"}
    harmful = {"half": lambda t: t[:len(t) // 2], "empty": lambda t: "",
               "header": lambda t: t.split("\n")[0], "twice": lambda t: t + "\n" + t,
               "separator": lambda t: t.translate(str.maketrans(",;\t", ";,|")),
               "infinite": numbers("1e39"), "-inf": numbers("-inf"), "words": numbers("a'b"),
               "today": lambda t: t.replace("2000", "today"),
               "no date": lambda t: t.replace("-01", "-31"),
               "field": lambda t: t.replace("\n", "\n1,", 2),
               "quote": lambda t: t.replace(",", ',"', 2)}
    kinds = {"attributes": "caravan", "timeseries": "caravan", "basin_mean": "camels",
             "usgs": "camels", "camels_": "camels", "net": "ismn", "w_": "wosis"}
    origin, outcomes = Path(archives().split(":")[2]), []
    for path in sorted(path for path in origin.rglob("*.*") if path.is_file()):
        text, name = path.read_text(encoding="utf-8"), str(path.relative_to(origin))
        kind = next(kind for start, kind in kinds.items() if name.startswith(start))
        target = "soil_moisture" if kind == "ismn" else "streamflow"
        whole = vars(data.load(f"{kind}:{origin}", target, cache=None))
        for change, mutate in (harmless | harmful).items():
            path.write_text(mutate(text), encoding="utf-8", newline="")
            try:
                sites = vars(data.load(f"{kind}:{origin}", target, cache=None))
                assert not np.isinf(sites["forcing"]).any() and not np.isinf(sites["static"]).any()
                if change in harmless:
                    np.testing.assert_equal(sites, whole)
            except (ValueError, FileNotFoundError) as error:
                assert change in harmful and origin.name in str(error), (name, change, error)
                outcomes.append(change)
        path.write_text(text, encoding="utf-8", newline="")
    assert {*outcomes} >= {*harmful} - {"twice"} and len(outcomes) > 60, outcomes


@needs_real_data
def test_real_caravan_and_camels():
    spec, cache = f"caravan:{REAL / 'caravan'},camels:{REAL / 'camels_us'}", mkdtemp()
    s, began = data.load(spec, cache=cache), time.time()
    assert len(data.load(spec, cache=cache).ids) == 482 + 77 and time.time() - began < 2
    mean = dict(zip(s.dynamic_names, np.nanmean(s.forcing, (0, 1), float)))
    assert 2.5 < mean["precipitation"] < 4 and 1.5 < mean["pet"] < 3.5
    # a gauge in both archives has the same flow, in mm/d and from ft3/s and area, and fold
    i, j = np.nonzero(s.ids[:, None] == np.char.add("camels_", s.ids))
    seen, fold = ~np.isnan(s.target[i] + s.target[j]), data.folds(s, "pub", 5)
    flow, other = (s.target[k].mean(1, where=seen) for k in (i, j))
    assert len(i) > 50 and abs(np.median(flow / other) - 1) < 0.02 and (fold[i] == fold[j]).all()


def test_folds():
    s = data.synthetic_world(0, 300, 1)
    pub, pur = data.folds(s, "pub", 5), data.folds(s, "pur", 5)
    assert set(pub) == set(pur) == set(range(5)) and np.bincount(pub).min() > 35
    assert np.bincount(pur).min() > 20 and np.bincount(pur).max() < 100         # of similar size
    assert not np.array_equal(data.folds(s, "pub", 5, seed=1), pub)
    xyz = data.on_sphere(s.latlon)                          # near sites are of one region
    near = np.argsort(-(xyz @ xyz.T), 1)[:, 1:4]
    assert (pur[near] == pur[:, None]).mean() > 0.9 and (pub[near] == pub[:, None]).mean() < 0.4
    raises(ValueError, "pub or pur", data.folds, s, "puf", 5)
    s.ids = s.ids[::3]                                      # whatever other sites there are
    assert np.array_equal(data.folds(s, "pub", 5), pub[::3])


def test_scaling_and_ridge_yardstick():
    rng = np.random.default_rng(0)
    x = [rng.gamma(0.3, 5, 5000), rng.normal(3, 2, 5000), *np.full((2, 5000), [[nan], [7]])]
    y = train.scale(np.stack(x, 1), scaling := train.fit_scaling(np.stack(x, 1)))
    assert scaling[0].tolist() == [1, 0, 0, 0] and np.isnan(y[:, 2]).all() and (y[:, 3] == 0).all()
    assert np.abs(y[:, :2].mean(0)).max() < 1e-5 and np.abs(y[:, :2].std(0) - 1).max() < 1e-4
    x, noise = rng.normal(size=(200, 5)), rng.normal(size=200)
    y = x @ [1, -2, 0, 0, 3] + 1 + 0.1 * noise
    guess, useless = (train.ridge(x[:150], z[:150], x[150:]) for z in (y, noise))
    assert np.abs(guess - y[150:]).max() < 0.5 and np.abs(useless - noise[:150].mean()).max() < 0.5
    y = torch.tensor(y)[:, None]
    assert abs(train.r_squared(y, 0 * y + y.mean(), torch.ones(200, 1))) < 1e-9


def run(options, out, launcher="", stop=None, code=0):
    """What train.py prints, and its checkpoint; SIGTERM once it has printed `stop`."""
    command = [sys.executable, *launcher.split(), train.__file__, *options.split(), "--out", out]
    text, env = "", os.environ | {"OMP_NUM_THREADS": "1"}   # threads crawl on a busy machine
    with Popen(command, text=True, stdout=PIPE, stderr=STDOUT, env=env) as process:
        for line in process.stdout:
            text += line
            if stop and stop in line:
                process.terminate()
    assert process.returncode == code, text
    return text, torch.load(Path(out, "pretrained.pt"), weights_only=True)


def test_two_processes_equal_one():
    options = "--quick --steps 1 --config dropout=0 --dtype float32"
    _, one = run(options, mkdtemp())
    text, two = run(options, mkdtemp(), launcher="-m torch.distributed.run --nproc_per_node=2")
    # Adam magnifies rounding in the weights; exp_avg is a tenth of the gradient
    torch.testing.assert_close(one["model"], two["model"], rtol=0, atol=1e-4)
    one, two = ([s["exp_avg"] for s in x["optimizer"]["state"].values()] for x in (one, two))
    assert "2 process(es)" in text and len(one) > 20
    assert all((x - y).abs().max() < 1e-6 + 1e-4 * x.abs().max() for x, y in zip(one, two))


def test_checkpoint_resume_and_holdout():
    options, out = "--quick --steps 8 --holdout pub --folds 3 --fold 1", mkdtemp()
    text, saved = run(options, mkdtemp())
    assert saved["step"] == 8 and "fold 1 of 3" in text and "static soil" in text
    stopped, _ = run(options + " --save-every 3", out, stop="step 1/")
    resumed, same = run("--resume", out)
    assert "continue with --resume" in stopped and "resuming at step" in resumed
    torch.testing.assert_close(same["model"], saved["model"], rtol=0, atol=0)
    sites, ids = data.load(quick=True), saved["ids"]
    held = sites.ids[data.folds(sites, "pub", 3) == 1]
    assert ids and not {*held} & {*ids} and saved["latlon"].shape == (len(ids), 2)
    model.StefaLand(model.Config(**saved["config"])).load_state_dict(saved["model"])
    scaling = train.fit_scaling(sites.static[np.isin(sites.ids, ids)])
    assert np.allclose(saved["scaling"]["static"], scaling, equal_nan=True)
    before = Path(out, "pretrained.pt").read_bytes()
    text, _ = run("--resume --steps 15 --save-every 99 --lr 1e30", out, code=1)
    assert "FloatingPointError: loss" in text and Path(out, "pretrained.pt").read_bytes() == before


def test_bad_checkpoints_are_refused():
    path, m, load = Path(mkdtemp(), "pretrained.pt"), small()[0], train.load_checkpoint
    raises(FileNotFoundError, "pretrained.pt: run python train.py", load, path)
    good = dict(version=train.VERSION, config=vars(m.config), model=m.state_dict(), step=1,
                scaling={}, options={}, optimizer={}, ids=[])
    torch.save(good, path)
    loaded, saved = load(path)
    assert loaded.config == m.config and saved.keys() == good.keys()
    whole = path.read_bytes()
    at = whole.index(m.position.detach().numpy().tobytes())                     # one weight changed
    for content, reason in (
            (whole[:len(whole) // 2], "not a zip"), (b"text", "not a zip"), (b"", "not a zip"),
            (whole[:at] + b"1234" + whole[at + 4:], "damaged"), ({"a": 1}, "KeyError.*version"),
            (good | {"version": train.VERSION + 1}, "version 2 is too new"),
            ({k: x for k, x in good.items() if k != "ids"}, "it lacks ids"),
            (good | {"x": os.system}, "could be code"), (good | {"config": {}}, "RuntimeError")):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        raises(ValueError, "pretrained.pt is no checkpoint .*" + reason, load, path)


def test_metrics_equal_their_formulas():
    rng = np.random.default_rng(0)
    o, s = rng.gamma(1, 2, 1000), rng.gamma(1, 2, 1000)
    m = evaluate.site_metrics(np.append(o, [nan, 3]), np.append(s, [1, nan]))    # valid pairs only
    error, r = s - o, np.corrcoef(o, s)[0, 1]
    kge = 1 - np.sqrt((r - 1) ** 2 + (s.std() / o.std() - 1) ** 2 + (s.mean() / o.mean() - 1) ** 2)
    for key, value in dict(
            rmse=np.sqrt((error ** 2).mean()), ubrmse=error.std(), corr=r, mae=abs(error).mean(),
            nse=1 - (error ** 2).sum() / ((o - o.mean()) ** 2).sum(), kge=kge,
            pbias=100 * error.sum() / o.sum()).items():
        assert abs(m[key] - value) < 1e-9, key
    assert np.isclose(m["fhv"], 100 * (np.sort(s)[-20:].sum() / np.sort(o)[-20:].sum() - 1))
    same, double = evaluate.site_metrics(o, o), evaluate.site_metrics(o, 2 * o)
    assert same["nse"] == 1 and np.isclose(same["kge"], 1) and same["flv"] == same["fdc_rmse"] == 0
    assert np.isclose(double["fhv"], 100) and np.isclose(double["pbias"], 100)
    assert abs(double["flv"]) < 1e-6                        # a factor only shifts the logs
    constant = evaluate.site_metrics(np.full(9, 2.0), s[:9])
    assert np.isnan(constant["nse"]) and np.isnan(constant["corr"]) and constant["rmse"] > 0
    assert all(np.isnan(v) for v in evaluate.site_metrics([nan, 1], [1, nan]).values())
    label, score = rng.random(200) < 0.4, rng.integers(0, 5, 200) / 4
    pairs = [(a > b) + 0.5 * (a == b) for a in score[label] for b in score[~label]]
    c = evaluate.class_metrics(label, score)
    assert np.isclose(c["auc"], np.mean(pairs))
    assert c["accuracy"] == (label == (score >= 0.5)).mean()
    assert np.isnan(evaluate.class_metrics([1, 1], [0.2, 0.9])["auc"])
    assert np.isclose(evaluate.sign_test(np.array([1] * 9 + [-1])), 2 * 11 / 1024)


def test_unet_and_unet_plus_plus():
    x = torch.randn(2, 5, 24, 32)
    for nested, nodes in ((False, 4 + 3), (True, 4 + 3 + 2 + 1)):
        m = model.UNet(5, 3, nested, width=8)
        assert len(m.nodes) == nodes and m(x).shape == (2, 3, 24, 32)
        m(x).sum().backward()                               # every node takes part
        assert all(p.grad.abs().sum() > 0 for p in m.parameters() if p.dim() == 4)
        raises(ValueError, "28 x 32.*multiples of 8", m, torch.randn(2, 5, 28, 32))


def test_image_tasks_learn_and_hold_out_blocks():
    image, y = np.arange(2 * 30 * 50).reshape(2, 30, 50), np.ones((30, 50))
    blocks = [known for _, _, known, _ in data.blocks("x", image, y=y)]
    assert sum(np.nansum(known["y"]) for known in blocks) == 30 * 50 and len(blocks) == 2 * 3
    inside = blocks[4]["patch"][:, 10:20, 10:30], image[:, 20:30, 20:40]
    assert np.array_equal(*inside) and np.isnan(blocks[4]["y"][:, :10]).all()
    truth, patch = torch.full((3, 40, 40), nan), torch.arange(1600.0).expand(3, 1, -1)
    truth[:, 10:30, 10:30] = patch.view(3, 40, 40)[:, 10:30, 10:30]
    for seed in range(9):                                   # turned together, less their edges
        out, seen = finetune.crop(truth.flatten(1), patch.view(3, 1, 40, 40), 2,
                                  np.random.default_rng(seed))
        known = ~out.isnan()
        assert (known.sum(1) == 16 * 16).all() and torch.equal(out[known], seen.flatten(1)[known])
    o = finetune.Options(task="height", steps=30, batch_size=8)
    sites = data.load("synthetic", "height")
    fold, runs = data.folds(sites, "pub", 5), []
    for _ in range(2):                                      # unseen: nothing changes but the truth
        runs.append(finetune.run(o, "unet", sites, fold, 0, 0))
        sites.target[fold == 0] += 999
    assert np.array_equal(runs[0]["sim"], runs[1]["sim"])
    assert evaluate.skill(runs[0]["obs"], runs[0]["sim"])["R2"] > 0.5
    labels, guess = np.array([[0], [1], [1], [2]]), np.array([[0], [1], [2], [2]])
    scores = evaluate.skill(labels, guess)
    assert np.isclose(scores["balanced"], 2.5 / 3) and np.isclose(scores["f1 1"], 2 / 3)


def test_monthly_land_cover():
    dates = np.array(["2020-01-05", "2020-01-25", "2020-06-01"], "M8[D]")
    classes = np.array([[[8, 8]], [[8, 1]], [[1, 4]]])      # (T, 1, 2)
    clear = np.array([[[1, 1]], [[0, 1]], [[1, 1]]], bool)
    months = evaluate.monthly(classes, clear, dates)
    expected = {"2020-01": {8: 2 / 3, 1: 1 / 3, 9: 3 / 4}, "2020-06": {1: 0.5, 4: 0.5, 9: 1},
                "all": {8: 1 / 3, 1: 5 / 12, 4: 0.25, 9: 7 / 8}}
    for month, shares in expected.items():
        assert np.allclose(months[month], [shares.get(k, 0) for k in range(10)]), month


@needs_real_data
def test_dynamic_world_equals_the_release():
    z = np.load(REAL / "dynamicworld/reference_io.npz")
    x = data.normalize_s2(z["s2_raw"])
    m = model.DynamicWorld.from_release(REAL / "dynamicworld/forward")
    with torch.no_grad():
        logits = m(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    assert np.abs(x - z["normalized"]).max() < 1e-5 and np.abs(logits - z["logits"]).max() < 1e-4
    assert np.array_equal(logits.argmax(-1), z["logits"].argmax(-1))
    dates, scenes, clear = data.read_scenes(REAL / "sentinel2_slovenia")
    assert np.array_equal(dates, np.sort(dates)) and clear.mean((1, 2)).tolist() == [1, 0, 0, 1, 1]
    assert np.allclose(np.sort(scenes.sum((1, 2, 3))), np.sort(z["s2_raw"].sum((1, 2, 3))))


def test_finetuning_at_held_out_sites():
    out, sites = Path(mkdtemp()), data.load(quick=True)
    run("--quick --steps 3", out)
    options = ["--quick", "--out", str(out)]
    finetune.main(options + ["--model", "resconn,lstm,noresconn,linear,scratch,direct"])
    runs = evaluate.load_runs(out)["streamflow synthetic pub5"]
    held = data.folds(sites, "pub", 5) == 0
    for name, (result,) in runs.items():
        assert {*result["ids"]} == {*sites.ids[held]} and np.isfinite(result["sim"]).all(), name
        assert result["overlap"] == 0 and (result["sim"] >= 0).all()
        assert np.array_equal(result["obs"], sites.target[held][:, -len(result["dates"]):])
    evaluate.table({"all": runs})
    done = [path.stat().st_mtime_ns for path in sorted(out.glob("runs/*, lstm, *"))]
    for steps, again in (("10", False), ("9", True)):       # only with other settings once more
        finetune.main(options + ["--model", "lstm", "--steps", steps])
        now = [path.stat().st_mtime_ns for path in sorted(out.glob("runs/*, lstm, *"))]
        assert (now != done) == again
    for task in ("soil_moisture", "soil", "landslide"):     # of a value per site: also its R2, AUC
        models = ",".join([finetune.TASKS[task][-1], "alphaearth-resconn"])
        finetune.main(options + ["--task", task, "--model", models])
    runs = evaluate.load_runs(out)
    assert np.isin(runs["landslide synthetic pub5"]["cnn"][0]["obs"], (0, 1)).all()
    obs, clay = runs["soil synthetic pub5, target clay"]["glm"][0]["obs"], sites.static[held, 3]
    assert np.array_equal(obs[:, 0], clay[~np.isnan(clay)])
    blind = finetune.predict_attribute(sites, "sand")       # no other fraction gives it away
    assert [name for name, x in zip(blind.static_names, blind.static.T) if np.isnan(x).all()] == [
        "clay", "silt", "sand"] and np.array_equal(blind.target, sites.static[:, 5], equal_nan=True)
    # no observation of a test site reaches a model, and its attributes do
    o, fold = finetune.parse(finetune.Options, "", options), data.folds(sites, "pub", 5)
    o.steps, o.batch_size, o.missing = 4, 8, 0.0
    first = finetune.run(o, "resconn", sites, fold, 0, 0)["sim"]
    sites.target[held] *= 7
    assert np.array_equal(first, finetune.run(o, "resconn", sites, fold, 0, 0)["sim"])
    o.missing = 1.0
    assert not np.array_equal(first, finetune.run(o, "resconn", sites, fold, 0, 0)["sim"])
    raises(ValueError, "seen .* test sites", finetune.run, o, "resconn", sites, fold, 1, 0)
    raises(ValueError, "'elastic': expected", finetune.main, options + ["--adapter", "elastic"])
    (out / "half.pt").write_bytes((out / "pretrained.pt").read_bytes()[:5000])
    for error, name, words in ((FileNotFoundError, "no.pt", "train.py first"),
                               (ValueError, "half.pt", "half.pt is no checkpoint")):
        o.checkpoint = str(out / name)
        raises(error, words, finetune.load_encoder, o, 0, sites, [])


def test_windows_adapters_and_encoder_cache():
    dates = np.arange("2000-01-01", "2003-01-01", dtype="datetime64[D]")
    days = train.day_slice("2000-12-31/2002-12-30", dates, None)
    assert dates[days][0] == np.datetime64("2000-12-31") and dates[days][-1] == dates[-2]
    raises(ValueError, "not within", train.day_slice, "1999-01-01/2001-01-01", dates, None)
    for days in (slice(0, 700), slice(400, 1096), days):
        covered = np.zeros(len(dates), bool)
        for start in train.tile(np.array([0]), days, 365, 120)[1]:
            covered[start + 120 * (start > 0):start + 365] = True
        assert covered[days].all()
    for layer in (adapter(16) for adapter in finetune.ADAPTERS.values()):
        assert layer is None or layer(torch.randn(2, 5, 16)).shape == (2, 5, 16)
    sites = data.synthetic_world(0, 20, 2)
    torch.manual_seed(0)
    m = model.StefaLand(model.Config(sites.dynamic_names, sites.static_names, d_model=16)).eval()
    scaling = {k: train.fit_scaling(getattr(sites, k)) for k in ("forcing", "static")}
    windows, o = train.Windows(sites, scaling, 365), finetune.Options(out=mkdtemp())
    site, start = (x[:65] for x in train.tile(np.arange(20), slice(0, 731), 365, 300))
    memory = finetune.encode_windows(m, windows, site, start, True, o)
    o.cache_gb = 0.0
    assert torch.equal(memory, finetune.encode_windows(m, windows, site, start, True, o))
    expected = m.encode(*windows.get(site[7:8], start[7:8]))
    assert torch.allclose(memory[7].float(), expected[0], atol=1e-2)


if __name__ == "__main__":
    chosen = [test for name, test in [*globals().items()] if name.startswith("test_")
              and (not sys.argv[1:] or any(part in name for part in sys.argv[1:]))]
    result = unittest.TextTestRunner(verbosity=2).run(
        unittest.TestSuite(map(unittest.FunctionTestCase, chosen)))
    failed, skipped = len(result.failures + result.errors), len(result.skipped)
    print(f"{len(chosen) - failed - skipped} passed, {failed} failed, {skipped} skipped")
    sys.exit(failed > 0)
