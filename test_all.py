"""All tests: python test_all.py [part of a name], or pytest. Real data: $MINSTEFALAND_REAL."""

import os
import re
import sys
import unittest
from functools import partial
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen
from tempfile import mkdtemp
from unittest import mock

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
close = partial(torch.testing.assert_close, rtol=0, atol=1e-5, equal_nan=True, check_dtype=False)


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
    torch.manual_seed(0)
    place = 180 * torch.rand(50, 2).double() - 90
    basis, xyz = model.spherical_harmonics(place, 40), data.on_sphere(place)
    kernel = np.polynomial.legendre.legval(xyz @ xyz.T, (2 * np.arange(41) + 1) / (4 * np.pi))
    assert np.abs(basis @ basis.T - kernel).max() < 1e-9    # the addition theorem
    e, gelu = model.VariableEmbedding(3, 16, 8), torch.nn.GELU()
    x, hide = torch.randn(4, 7, 3).sqrt(), torch.rand(4, 7, 3) < 0.3            # half of x is NaN
    units = gelu(x[..., None] * e.w1 + e.b1)                                    # (4, 7, V, hidden)
    tokens = torch.einsum("btvh,dvh->btvd", units, e.w2.view(16, 3, 8)) + e.b2
    close(e(x, hide), torch.where((hide | x.isnan())[..., None], e.mask_vector, tokens).sum(2))
    y = model.Dropout(0.1)(torch.ones(999_999))
    assert abs((y == 0).double().mean() - 26 / 256) < 1e-3 and abs(y.mean() - 1) < 2e-3
    ours, x = model.EncoderLayer(model.Config(n_heads=2)).eval(), torch.randn(3, 9, 64)
    theirs = torch.nn.TransformerEncoderLayer(64, 2, 128, 0, "gelu", batch_first=True)
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values())))
    close(ours(x), theirs(x))
    for nested, nodes in ((False, 4 + 3), (True, 4 + 3 + 2 + 1)):
        m, x = model.UNet(5, 3, nested, width=8), torch.randn(2, 5, 24, 32)
        assert len(m.nodes) == nodes and m(x).shape == (2, 3, 24, 32)
        m(x).sum().backward()                               # every node takes part
        assert all(p.grad.abs().sum() > 0 for p in m.parameters() if p.dim() == 4)
        raises(ValueError, "28 x 32.*multiples of 8", m, torch.randn(2, 5, 28, 32))


def test_masks_and_loss():
    m, *_ = small(p_always=0.0, p_static=0.25, windows=1)
    dynamic, static, location = m.draw_masks(4000, 120)
    (p, tmax, tmin), (clay, sand, height, area) = dynamic.unbind(-1), static.unbind(-1)
    assert torch.equal(tmax, tmin) and torch.equal(clay, sand) and not torch.equal(p, tmax)
    assert not area.any() and set(p.sum(1).tolist()) - {0} == set(range(30, 91))
    assert (p[:, 1:] != p[:, :-1]).sum(1).max() <= 2        # one contiguous window
    always = small(p_always=0.2, p_dynamic=0.0)[0].draw_masks(4000, 120)[0][..., 0]
    assert set(always.sum(1).tolist()) == {0, 120}
    shares = [x.double().mean() for x in (p.any(1), clay, height, location, always)]
    assert np.allclose(shares, [0.5, 0.25, 0.25, 0.6, 0.2], atol=0.03)
    m, forcing, *rest = small()
    hidden = m.draw_masks(5, 60)
    encoded = m.encode(forcing, *rest, hidden)
    parts = zip(m.decode(encoded), (forcing, rest[0]), hidden, *m(forcing, *rest, hidden))
    for output, truth, hide, error, count in parts:
        squares = (output - truth)[hide].square()
        assert count == (~squares.isnan()).sum()
        close(error / count, squares.nanmean())
    other = torch.where(hidden[0], forcing + 9, forcing)    # what is hidden counts as truth only
    close(m.encode(other, *rest, hidden), encoded)
    m(forcing.requires_grad_(), *rest, [torch.ones_like(h) for h in hidden])[0].sum().backward()
    assert torch.equal(forcing.grad == 0, forcing.isnan())
    close(model.masked_loss(torch.tensor([6, 4]), torch.tensor([3, 1])), torch.tensor(2 + 0.5 * 4))
    raises(ValueError, "nothing to learn", model.masked_loss, torch.zeros(2), torch.zeros(2))


def test_sites_do_not_mix_and_bad_input_is_refused():
    m, forcing, static, latlon, doy = small()
    full, nowhere = (m.encode(forcing, static, place, doy) for place in (latlon, None))
    close(m.encode(*(x[[3, 1]] for x in (forcing, static, latlon, doy))), full[[3, 1]])
    hide = None, None, torch.ones(5).bool()
    for place, hidden in ((latlon * nan, None), (latlon, hide)):
        close(m.encode(forcing, static, place, doy, hidden), nowhere)
    for place, day in ((latlon * 0, doy), (None, doy + 90), (None, None)):     # place, season count
        assert (m.encode(forcing, static, place, day) - nowhere).abs().max() > 1e-3
    for complaint, *inputs in (
            ("2 dynamic.*tmin", forcing[..., :2], static), ("5 sites.*of 2", forcing, static[:2]),
            ("3 static.*clay", forcing, static[:, :3]), ("missing", forcing * nan, static * nan),
            ("400 days.*365", torch.zeros(5, 400, 3), static)):
        raises(ValueError, complaint, m.encode, *inputs)


@needs_real_data
def test_release_parity_and_dynamic_world():
    z, from_release = np.load(REAL / "release/release_io.npz"), model.StefaLand.from_release
    state = {key[6:]: z[key] for key in z.files if key.startswith("state/")}
    m = from_release(state, int(z["heads"])).eval()
    assert [*m.dynamic_names, *m.static_names] == [*z["dynamic_names"], *z["static_names"]]
    x, s, mask = (torch.tensor(z[key]) for key in ("x", "s", "mask"))
    encoded, masked = (m.encode(x, s, hidden=h) for h in (None, (mask, None, None)))
    got = (m.embed(x, s), encoded, *m.decode(encoded), m.decode(masked)[0])
    names = ("tokens", "encoded", "out_dynamic", "out_static", "out_dynamic_masked")
    for key, value in zip(names, got, strict=True):
        close(value, torch.tensor(z[key]))
    raises(ValueError, "surprise", from_release, state | {"surprise": z["x"]}, 4)
    del state["decoder_norm.bias"]
    raises(ValueError, "decoder_norm.bias", from_release, state, 4)
    z = np.load(REAL / "dynamicworld/reference_io.npz")
    x = data.normalize_s2(z["s2_raw"])
    m = model.DynamicWorld.from_release(REAL / "dynamicworld/forward")
    close(x, z["normalized"])
    logits = m(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    close(logits, torch.from_numpy(z["logits"]), atol=1e-4)
    dates, scenes, clear = data.read_scenes(REAL / "sentinel2_slovenia")
    assert np.array_equal(dates, np.sort(dates)) and clear.mean((1, 2)).tolist() == [1, 0, 0, 1, 1]
    assert np.allclose(np.sort(scenes.sum((1, 2, 3))), np.sort(z["s2_raw"].sum((1, 2, 3))))


def test_synthetic_world_and_evaporation():
    a, b, c = (vars(data.synthetic_world(seed, 80, 2)) for seed in (0, 0, 1))
    np.testing.assert_equal(a, b)
    assert not np.array_equal(a["latlon"], c["latlon"])
    s, wet, slide = (data.load(target=t) for t in ("streamflow", "soil_moisture", "landslide"))
    rain, flow = s.forcing[..., 0], s.target.mean(1)
    assert s.forcing.shape == (700, 2192, 6) and (flow < rain.mean(1)).all()
    for low, values, high in (
            (1.5, rain.mean(), 4), (0.2, (rain > 0).mean(), 0.45), (2, s.forcing[..., 3].mean(), 4),
            (0.3, (flow / rain.mean(1)).mean(), 0.6), (0, s.target, np.inf), (0, wet.target, 0.5),
            (0.001, wet.target.std(1), 1), (0.25, np.isnan(s.static).mean(), 0.4)):
        assert low <= np.min(values) and np.max(values) <= high
    stable, steep = (slide.patches[slide.target == k, 1, 8, 8].mean() for k in (0, 1))
    assert steep > stable + 3
    # FAO-56 example 8: 3 September at 20 S; the equator at an equinox (37.7): Oudin, Hargreaves
    assert abs(data.extraterrestrial_radiation(-20.0, 246) - 32.2) < 0.1
    for share, *t in ((25 / 100, 20.0), (0.0023 * 37.8 * 12 ** 0.5, 20.0, 26.0, 14.0)):
        assert abs(data.potential_evaporation(0.0, 80, *t) - 37.7 / 2.45 * share) < 0.1
    assert data.potential_evaporation(0.0, 80, -30.0) == 0


FILES = {  # of a small archive of each kind, with | between the lines
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
    "net/s1/net_net_s1_sm_0.05_X.stm": "net net s1 45.0 9.0 120 .05 .05 X-1|2000/01/01 00:00 0.2 "
        "G M|2000/01/01 12:00 0.3 G M|2000/01/01 13:00 0.9 D01 M|2000/01/03 00:00 0.125 G M",
    "net/s1/net_net_s1_sm_0.20_X.stm": "net net s1 45.0 9.0 120 .2 .2 X-2|2000/01/01 00:00 0.4 G M",
    "net/s2/net_net_s2_sm_0.05_X.stm": "net net s2 46.0 9.0 90 .05 .05 X|2000/01/01 00:00 0.4 G M",
    "net/s1/s1.csv": "date,precipitation|2000-01-01,3|2000-01-02,0",
    "w_profiles.tsv": "profile_id\tlatitude\tlongitude|7\t10\t20|8\t11\t21|9\t12\t22",
    "w_physical.tsv": "profile_id\tupper_depth\tlower_depth\tclay_value_avg\tsilt_value_avg\t"
        "sand_value_avg|7\t0\t10\t10\t20\t70|7\t10\t50\t40\t20\t40|8\t0\t30\t10\t10\t10|"
        "9\t0\t20\t\t50\t50"}


def archives(old="", new="", only=""):
    """A folder with FILES, the pattern `old` replaced in those whose name has `only`."""
    folder = Path(mkdtemp())
    for name, text in FILES.items():
        path, text = folder / name, text.replace("|", "\n")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(re.sub(old, new, text) if only in name else text, "utf-8", newline="")
    return folder


def test_archives_are_read_joined_and_cached():
    folder, cache = archives(), mkdtemp()
    both = f"caravan:{folder},camels:{folder}"
    s = data.load(both, cache=cache)
    with mock.patch.dict(data.READERS, caravan=None, camels=None):              # not parsed again
        np.testing.assert_equal(vars(data.load(both, cache=cache)), vars(s))
    path = folder / "timeseries/csv/us/us_1.csv"
    path.write_text(path.read_text().replace("1.5", "2.5"))
    assert np.nanmax(data.load(both, cache=cache).target[0]) == 2.5
    assert list(s.ids) == ["us_1", "us_2", "01013500"]
    assert np.array_equal(s.dates, np.arange("1980-01-01", "2000-01-05", dtype="M8[D]"))  # no gaps
    pet = [data.potential_evaporation(*x, 5.0, 10.0, 0.0) for x in ((41, 2), (47.24, 1))]
    for got, expected in (
            (s.latlon, [[40.5, -75], [41, -74.5], [47.2, -68.6]]),              # 285.5 E is 74.5 W
            # elevation, slope, clay, carbonate, rock_porosity, p_mean, area; not the flow's q_mean
            (s.static, [[nan, 5.5, 20, nan, nan, 3.5, 100], [*[nan] * 6, 200],
                        [251, nan, nan, 25, nan, nan, 86.4]]),
            # precipitation, temperature, tmax, tmin, pet, shortwave, humidity
            (s.forcing[0, -4:, :3], [[0, 10, nan], [nan] * 3, [2, 11, nan], [4, nan, nan]]),
            (s.forcing[1, -3], [nan, 5, 10, 0, pet[0], nan, nan]),
            (s.forcing[2, 0], [3, 5, 10, 0, pet[1], 200 / 2, 100 / np.exp(17.27 * 5 / 242.3)]),
            (s.target[0, -4:], [1.5, nan, nan, 0.5]), (s.target[1], nan),
            (s.target[2, :2], [2.8316846592, nan])):
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    for path in folder.glob("camels_*"):
        path.unlink()
    bare = data.load(f"camels:{folder}", cache=None)        # what the forcing files know
    assert bare.static_names == ("elevation", "area") and np.isnan(bare.latlon[0, 1])


def test_archives_of_the_other_tasks():
    folder = archives()
    for kind, options, expected in (
            ("ismn", dict(target="soil_moisture"), dict(    # s2 has no weather
                ids=["net_s1"], static=[[120]], forcing=[[[3], [0], [nan]]],
                target=[[0.25, nan, 0.125]])),
            ("wosis", {}, dict(                             # 8 adds up to 30 %, 9 has no clay
                ids=["7"], static=[[30, 20, 50]], latlon=[[10, 20]])),
            ("caravan", dict(static_only=True), dict(
                ids=["us_1", "us_2", "us_9"], forcing=[[[nan]]] * 3))):
        s = vars(data.load(f"{kind}:{folder}", cache=None, **options))
        np.testing.assert_equal({name: s[name] for name in expected}, expected)
    s, path = data.load(f"caravan:{folder},camels:{folder}", cache=None), folder / "points.npz"
    np.savez(path, lat=[40.5, 47.22, nan], lon=[-75, -68.6, 0], v=np.eye(3, 64, dtype="f4"))
    vectors = data.join_vectors(s, path).vectors            # the last site is 2 km away
    np.testing.assert_equal(vectors[:, :2], [[1, 0], [nan, nan], [0, 1]])
    path, row = folder / "points.csv", "us_2" + 64 * ",0.5"
    path.write_text("\n".join([",".join(["id", *(f"A{i:02d}" for i in range(64))]), row]))
    np.testing.assert_equal(data.join_vectors(s, path).vectors[:, 0], [nan, 0.5, nan])
    path.write_text(path.read_text() + "\n" + row)
    raises(ValueError, "id .*us_2.* twice", data.join_vectors, s, path)
    image, y = np.full((1, 20, 20), -51, np.int8), np.full((20, 20), 7.0)
    y[0] = -9999
    np.save(folder / "x.npy", image)
    np.save(folder / "y.npy", y)
    s = data.load(f"tiles:{folder}", "height", cache=None)
    assert np.allclose(s.patches, -0.16) and (s.target == 7).sum() == 19 * 20   # -(51 / 127.5)^2
    image[0, 5, 5] = -128                                   # AlphaEarth's mark of no data
    np.save(folder / "x.npy", image)
    raises(ValueError, "without data", data.load, f"tiles:{folder}", "height", cache=None)


def test_changed_archives_load_or_say_why():
    def load(*changes):
        """All arrays of the changed archives, or what is wrong with them."""
        folder = archives(*changes)
        spec = ",".join(f"{kind}:{folder}" for kind in ("caravan", "camels", "ismn", "wosis"))
        try:
            sites = vars(data.load(spec, cache=None))
        except (ValueError, FileNotFoundError) as error:
            assert folder.name in str(error)
            return str(error)
        assert not np.isinf(sites["forcing"]).any() and not np.isinf(sites["static"]).any()
        return sites

    whole, number = load(), r"\d+\.\d+"
    for change in ((r"\A", "\ufeff"), (r"\n", "\r\n"), (r"\Z", "\n\n")):       # BOM, CRLF, blanks
        np.testing.assert_equal(load(*change), whole)
    for old, new, complaint in (
            (r"(?s).{9}\Z", "", "us_1.csv, line 4: 1 fields, expected"), (r"(?s).+", "", "no rows"),
            (r"(?s)\n.*", "", "no rows"), (r"(?s)(.+)", r"\1\n\1", "us_1.csv, line 5: "),
            ("[,;\t]", "|", "no column"), (",", ',"', "csv: "), (r"\n", "\n1,", "line 2: 6 fields"),
            ("us_2,C", "us_1,C", "_other_us.csv: site us_1 twice"), ("41,285", "95,0", "us_2.*95"),
            ("2000-01-03", "2000-01-01", "us_1 has the same date twice"), ("-01", "-31", "-31'"),
            ("2000-01-03", "today", "us_1.csv, line 3: date is 'today'"), ("86400000", "0", "area"),
            (number, "1e39", "'1e39'"), (number, "-inf", "'-inf'"), (number, "a'b", "'a'b'"),
            ("45.0 9.0", "45.0", "stm, line 1: 8 fields")):
        said = [text for text in (load(old, new, name) for name in FILES) if isinstance(text, str)]
        assert re.search(complaint, "\n".join(said)), (old, new, said)
    raises(FileNotFoundError, "nowhere", data.load, "caravan:/nowhere")
    raises(ValueError, "pigeon.*caravan", data.load, "pigeon:/")


@needs_real_data
def test_real_archives():
    s = data.load(f"caravan:{REAL / 'caravan'},camels:{REAL / 'camels_us'}", cache=None)
    mean = dict(zip(s.dynamic_names, np.nanmean(s.forcing, (0, 1), float)))
    assert len(s.ids) == 482 + 77 and 2.5 < mean["precipitation"] < 4 and 1.5 < mean["pet"] < 3.5
    # a gauge in both archives has the same flow, in mm/d and from ft3/s and area, and fold
    i, j = np.nonzero(s.ids[:, None] == np.char.add("camels_", s.ids))
    seen, fold = ~np.isnan(s.target[i] + s.target[j]), data.folds(s, "pub", 5)
    flow, other = (s.target[k].mean(1, where=seen) for k in (i, j))
    assert len(i) > 50 and abs(np.median(flow / other) - 1) < 0.02 and (fold[i] == fold[j]).all()
    s = data.load(f"landslide:{REAL / 'landslide'}", "landslide", cache=None)
    assert s.patches.shape == (347, 5, 17, 17) and abs(s.target.mean() - 0.5) < 0.02
    # the centre of a patch is the raster cell that the csv's slope was taken from
    slope = s.static[:, s.static_names.index("slope")]
    assert np.corrcoef(s.patches[:, 0, 8, 8], slope)[0, 1] > 0.99
    s = data.load(f"alphaearth:{REAL / 'alphaearth'}", cache=None)
    s = data.join_vectors(s, REAL / "alphaearth/embeddings.npz")
    assert np.allclose(np.linalg.norm(s.vectors, axis=1), 1, atol=0.2) and len(s.ids) == 1270


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
    options, gradients = "--quick --steps 1 --config dropout=0 --dtype float32", []
    for launcher in ("", "-m torch.distributed.run --nproc_per_node=2"):
        text, saved = run(options, mkdtemp(), launcher)
        gradients.append([10 * state["exp_avg"] for state in saved["optimizer"]["state"].values()])
    assert "2 process(es)" in text and len(gradients[0]) > 20
    for one, two in zip(*gradients, strict=True):
        assert (one - two).abs().max() < 1e-5 + 1e-4 * one.abs().max()


def test_checkpoint_resume_holdout_and_refusal():
    options, out = "--quick --steps 8 --holdout pub --folds 3 --fold 1", mkdtemp()
    path, load = Path(out, "pretrained.pt"), train.load_checkpoint
    raises(FileNotFoundError, "pretrained.pt: run python train.py", load, path)
    text, saved = run(options, mkdtemp())
    assert saved["step"] == 8 and "fold 1 of 3" in text and "static soil" in text
    stopped, _ = run(options + " --save-every 3", out, stop="step 1/")
    resumed, same = run("--resume", out)
    assert "continue with --resume" in stopped and "resuming at step" in resumed
    close(same["model"], saved["model"], atol=0)
    sites, ids = data.load(quick=True), saved["ids"]
    held, seen = data.folds(sites, "pub", 3) == 1, np.isin(sites.ids, ids)
    validation = data.folds(sites, "pub", 10, seed=1) == 0
    assert np.array_equal(seen, ~held & ~validation)
    close(saved["latlon"], torch.tensor(sites.latlon[seen]))
    close(saved["scaling"]["static"], train.fit_scaling(sites.static[seen]))
    assert "other training sites" in run("--resume --fold 2", out, code=1)[0]
    whole = path.read_bytes()
    text, _ = run("--resume --steps 15 --save-every 99 --lr 1e30", out, code=1)
    assert "FloatingPointError: loss" in text and path.read_bytes() == whole
    at = whole.index(same["model"]["position"].numpy().tobytes())               # one weight changed
    for content, reason in (
            (whole[:len(whole) // 2], "not a zip"), (b"text", "not a zip"), (b"", "not a zip"),
            (whole[:at] + b"1234" + whole[at + 4:], "damaged"), ({"a": 1}, "KeyError.*version"),
            (saved | {"version": train.VERSION + 1}, "version 2 is too new"),
            ({k: x for k, x in saved.items() if k != "ids"}, "it lacks ids"),
            (saved | {"x": os.system}, "could be code"), (saved | {"config": {}}, "RuntimeError")):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        raises(ValueError, "pretrained.pt is no checkpoint .*" + reason, load, path)


def test_metrics_equal_their_formulas():
    rng = np.random.default_rng(0)
    o, s = rng.gamma(1, 2, 1000), rng.gamma(1, 2, 1000)
    error, r = s - o, np.corrcoef(o, s)[0, 1]
    kge = 1 - np.sqrt((r - 1) ** 2 + (s.std() / o.std() - 1) ** 2 + (s.mean() / o.mean() - 1) ** 2)
    high_o, high_s = (np.sort(x)[-20:].sum() for x in (o, s))
    low_o, low_s = (np.log(np.sort(x)[:301] / x.min()).sum() for x in (o, s))
    curve_o, curve_s = (np.quantile(x, np.linspace(0, 1, 100)) for x in (o, s))
    close(evaluate.site_metrics(np.append(o, [nan, 3]), np.append(s, [1, nan])), dict(
        rmse=np.sqrt((error ** 2).mean()), ubrmse=error.std(), corr=r, kge=kge,
        nse=1 - (error ** 2).mean() / o.var(), mae=abs(error).mean(), flv=100 * (1 - low_s / low_o),
        pbias=100 * error.sum() / o.sum(), fhv=100 * (high_s / high_o - 1),
        fdc_rmse=np.sqrt(((curve_s - curve_o) ** 2).mean())))
    constant = evaluate.site_metrics(np.full(9, 2.0), s[:9])
    assert np.isnan(constant["nse"]) and np.isnan(constant["corr"]) and constant["rmse"] > 0
    assert all(np.isnan(v) for v in evaluate.site_metrics([nan, 1], [1, nan]).values())
    label, score = rng.random(200) < 0.4, rng.integers(0, 5, 200) / 4
    guess, pairs = score >= 0.5, score[label][:, None] - score[~label]
    precision, recall = label[guess].mean(), guess[label].mean()
    close(evaluate.class_metrics(label, score), dict(
        accuracy=(label == guess).mean(), precision=precision, recall=recall,
        f1=2 / (1 / precision + 1 / recall), auc=(0.5 + np.sign(pairs) / 2).mean()))
    assert np.isnan(evaluate.class_metrics([1, 1], [0.2, 0.9])["auc"])
    close(evaluate.skill(np.array([[0], [1], [1], [1]]), np.array([[0], [0], [1], [1]])), {
        "balanced": (1 + 2 / 3) / 2, "accuracy": 3 / 4, "f1 0": 2 / 3, "f1 1": 4 / 5})
    assert np.isclose(evaluate.sign_test(np.array([1] * 9 + [-1])), 2 * 11 / 1024)
    months = evaluate.monthly(
        np.array([[[8, 8]], [[8, 1]], [[1, 4]]]), np.array([[[1, 1]], [[0, 1]], [[1, 1]]], bool),
        np.array(["2020-01-05", "2020-01-25", "2020-06-01"], "M8[D]"))
    shares = {month: {k: x for k, x in enumerate(row) if x} for month, row in months.items()}
    close(shares, {"2020-01": {1: 1 / 3, 8: 2 / 3, 9: 3 / 4}, "2020-06": {1: 0.5, 4: 0.5, 9: 1.0},
                   "all": {1: 5 / 12, 4: 0.25, 8: 1 / 3, 9: 7 / 8}})


def test_image_tasks_learn_and_hold_out_blocks():
    image = np.arange(2.0 * 30 * 50).reshape(2, 30, 50)
    blocks = [known for _, _, known, _ in data.blocks("x", image, y=image[0])]
    pixels = np.concatenate([known["y"].ravel() for known in blocks])
    assert sorted(pixels[~np.isnan(pixels)]) == [*range(30 * 50)]               # each in one block
    assert np.array_equal(blocks[4]["patch"][:, 10:20, 10:30], image[:, 20:30, 20:40])
    truth, patch = torch.full((3, 40, 40), nan), torch.arange(3.0 * 40 * 40).view(3, 1, 40, 40)
    truth[:, 10:30, 10:30] = patch[:, 0, 10:30, 10:30]
    for seed in range(9):                                   # turned together, less their edges
        out, seen = finetune.crop(truth.flatten(1), patch, 2, np.random.default_rng(seed))
        known = ~out.isnan()
        assert (known.sum(1) == 16 * 16).all() and torch.equal(out[known], seen.flatten(1)[known])
    o, sites = finetune.Options(task="height", steps=30, batch_size=8), data.load(target="height")
    fold = data.folds(sites, "pub", 5)
    first = finetune.run(o, "unet", sites, fold, 0, 0)
    assert evaluate.skill(first["obs"], first["sim"])["R2"] > 0.5
    sites.target[fold == 0] += 999                          # unseen: nothing changes but the truth
    assert np.array_equal(first["sim"], finetune.run(o, "unet", sites, fold, 0, 0)["sim"])


def test_finetuning_at_held_out_sites():
    out, sites = mkdtemp(), data.load(quick=True)
    fold = data.folds(sites, "pub", 5)
    test = fold == 0

    def tune(options):
        finetune.main(f"--quick --out {out} {options}".split())
        return {path: path.stat().st_mtime_ns for path in Path(out, "runs").iterdir()}

    run("--quick --steps 3", out)
    written = tune("--model resconn,lstm,noresconn,linear,scratch,direct")
    assert tune("--model lstm") == written                  # the same settings: not once more
    assert tune("--model lstm --steps 9") != written
    for task, y in (("streamflow", [0, 0.3, 9]), ("soil_moisture", [0.2]), ("height", [-3, 4000])):
        _, forth, back, *_ = finetune.TASKS[task]
        close(back(forth(np.array(y))), np.array(y))
    for task in ("soil_moisture", "soil", "landslide"):     # of a value per site: also its R2, AUC
        tune(f"--task {task} --model {finetune.TASKS[task][-1]},alphaearth-resconn")
    evaluate.main(["--out", out])
    runs = evaluate.load_runs(out)
    for name, (result,) in runs["streamflow synthetic pub5"].items():
        assert np.array_equal(result["ids"], sites.ids[test]) and result["overlap"] == 0, name
        assert np.array_equal(result["obs"], sites.target[test, -len(result["dates"]):]), name
        assert np.isfinite(result["sim"]).all() and (result["sim"] >= 0).all(), name
    (result,) = runs["landslide synthetic pub5"]["cnn"]
    assert 0 < result["sim"].min() and result["sim"].max() < 1                  # probabilities
    (result,), clay = runs["soil synthetic pub5, target clay"]["glm"], sites.static[test, 3]
    assert np.array_equal(result["obs"][:, 0], clay[~np.isnan(clay)])
    blind = finetune.predict_attribute(sites, "forest")     # nor may a fraction give another away
    hidden = np.isin(sites.static_names, ("clay", "silt", "sand", "forest"))
    assert np.array_equal(np.isnan(blind.static).all(0), hidden)
    # no observation of a test site reaches a model, and its attributes do
    o = finetune.Options(out=out, steps=4, batch_size=8)
    first = finetune.run(o, "resconn", sites, fold, 0, 0)["sim"]
    sites.target[test] *= 7
    assert np.array_equal(first, finetune.run(o, "resconn", sites, fold, 0, 0)["sim"])
    o.missing = 1.0
    assert not np.array_equal(first, finetune.run(o, "resconn", sites, fold, 0, 0)["sim"])
    sites.ids = np.char.add("camels_", sites.ids)           # the same gauges in another archive
    raises(ValueError, "seen .* test sites", finetune.run, o, "resconn", sites, fold, 1, 0)
    raises(ValueError, "'elastic': expected", tune, "--adapter elastic")


def test_scaling_and_ridge_yardstick():
    rng = np.random.default_rng(0)
    x = np.full((5000, 4), nan)
    x[:, 0], x[:, 1], x[:, 3] = rng.gamma(0.3, 5, 5000), rng.normal(3, 2, 5000), 7
    scaling = train.fit_scaling(x)
    y = train.scale(x, scaling)
    assert scaling[0].tolist() == [1, 0, 0, 0]              # only the first is skewed
    assert np.allclose(y.mean(0), [0, 0, nan, 0], atol=1e-5, equal_nan=True)
    assert np.allclose(y.std(0), [1, 1, nan, 0], atol=1e-4, equal_nan=True)
    x, noise = rng.normal(size=(200, 5)), rng.normal(size=200)
    y = x @ [1, -2, 0, 0, 3] + 1 + 0.1 * noise
    guess, useless = (train.ridge(x[:150], z[:150], x[150:]) for z in (y, noise))
    assert np.abs(useless - noise[:150].mean()).max() < 0.5
    truth, guess = (torch.tensor(z)[:, None] for z in (y[150:], guess))
    assert train.r_squared(truth, guess, torch.ones(50, 1)) > 0.995
    assert abs(train.r_squared(truth, 0 * guess + truth.mean(), torch.ones(50, 1))) < 1e-9


def test_windows_adapters_and_encoder_cache():
    sites = data.synthetic_world(0, 20, 3)
    days = train.day_slice("1995-12-31/1997-12-30", sites.dates, None)
    assert sites.dates[days][0] == np.datetime64("1995-12-31") and days.stop == len(sites.dates) - 1
    raises(ValueError, "not within", train.day_slice, "1994-01-01/1996-01-01", sites.dates, None)
    for days in (slice(0, 700), slice(400, 1096), days):
        covered = np.zeros(len(sites.dates), bool)
        for start in train.tile(np.array([0]), days, 365, 120)[1]:
            covered[start + 120 * (start > 0):start + 365] = True
        assert covered[days].all()
    for layer in (adapter(16) for adapter in finetune.ADAPTERS.values()):
        assert layer is None or layer(torch.randn(2, 5, 16)).shape == (2, 5, 16)
    torch.manual_seed(0)
    m = model.StefaLand(model.Config(sites.dynamic_names, sites.static_names, d_model=16)).eval()
    scaling = {k: train.fit_scaling(getattr(sites, k)) for k in ("forcing", "static")}
    windows, o = train.Windows(sites, scaling, 365), finetune.Options(out=mkdtemp())
    site, start = (x[:65] for x in train.tile(np.arange(20), slice(0, 1096), 365, 300))
    memory = finetune.encode_windows(m, windows, site, start, True, o)
    o.cache_gb = 0.0
    assert torch.equal(memory, finetune.encode_windows(m, windows, site, start, True, o))
    close(memory[7].float(), m.encode(*windows.get(site[7:8], start[7:8]))[0], atol=1e-2)


if __name__ == "__main__":
    parts = sys.argv[1:] or [""]
    chosen = [unittest.FunctionTestCase(test) for name, test in [*globals().items()]
              if name.startswith("test_") and any(part in name for part in parts)]
    result = unittest.TextTestRunner(verbosity=2).run(unittest.TestSuite(chosen))
    failed, skipped = len(result.failures + result.errors), len(result.skipped)
    print(f"{len(chosen) - failed - skipped} passed, {failed} failed, {skipped} skipped")
    sys.exit(failed > 0)
