"""The authors' released network (MFFormer_dec_LSTM) with their weights, from the core's layers.

    python -m applications.release FILE.npz     compares it with what theirs returned

    from applications.release import from_release
    network = from_release(torch.load("their.pt"), heads=4)     # their state dict -> ready to use
    e = network.encode(forcing, static)         # (B, T, C), (B, S) -> (B, T+1, D); NaN = missing

It differs from the paper's text: tokens times sqrt(D) before the encoder, ReLU, a LayerNorm after
the encoder and after the LSTM, which reads forward only; no season, no location. FILE.npz holds
their state dict (state/…), heads, inputs x, s and mask, and their outputs under the names below.
Their code: github.com/jaxonson25-hash/StefaLandRelease.
"""

import math
import re
from argparse import ArgumentParser, RawDescriptionHelpFormatter

import numpy as np
import torch
import torch.nn as nn

import data
from applications.common import read_npz
from model import Config, EncoderLayer, Masks, VariableEmbedding, VariableProjection


class Release(nn.Module):
    """Their network; positions: the most tokens (days and the site) that it has places for."""

    def __init__(self, config, positions):
        super().__init__()
        self.dynamic_names, self.static_names = config.dynamic_names, config.static_names
        d, d_hidden = config.d_model, config.d_hidden
        self.dynamic_embedding = VariableEmbedding(len(self.dynamic_names), d, d_hidden)
        self.static_embedding = VariableEmbedding(len(self.static_names), d, d_hidden)
        self.position = nn.Parameter(torch.zeros(positions, d))
        self.encoder = nn.Sequential(*[EncoderLayer(config) for _ in range(config.n_layers)])
        for layer in self.encoder:
            layer.activation = torch.relu
        self.project, self.decoder = nn.Linear(d, d), nn.LSTM(d, d, batch_first=True)
        self.encoder_norm, self.decoder_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.dynamic_projection = VariableProjection(len(self.dynamic_names), d, d_hidden)
        self.static_projection = VariableProjection(len(self.static_names), d, d_hidden)

    def embed(self, forcing, static, hidden=Masks()):
        """T day tokens and, last, the static token, before their scaling: (B, T+1, D)."""
        days = self.dynamic_embedding(forcing, hidden.dynamic)                  # (B, T, D)
        site = self.static_embedding(static, hidden.static)[:, None]            # (B, 1, D)
        return torch.cat([days, site], 1) + self.position[:days.shape[1] + 1]

    def encode(self, forcing, static, hidden=Masks()):
        """Embedding of each day and, last, of the site: (B, T, C), (B, S) -> (B, T+1, D)."""
        x = self.embed(forcing, static, hidden) * math.sqrt(self.position.shape[1])
        x = self.encoder(x)                                                     # (B, T+1, D)
        return self.project(self.encoder_norm(x))                               # (B, T+1, D)

    def decode(self, encoded):
        """All variables, reconstructed: (B, T+1, D) -> (B, T, C), (B, S)."""
        x = self.decoder_norm(self.decoder(encoded)[0])                         # (B, T+1, D)
        return self.dynamic_projection(x)[:, :-1], self.static_projection(x[:, -1:])[:, 0]


RENAME = {  # part of a parameter's name in their release (regular expression) -> ours
    r"embeddings(\d)\.[^.]+\.(w|b)\w+": r"\2\1",            # of one variable; ours of all, joined
    "numerical_": "", "time_series": "dynamic", "masked_values": "mask_vector",
    "positional_encoding.position_embedding": "position", "enc_2_dec_embedding": "project",
    "transformer_encoder.layers.": "", "self_attn.in_proj_": "qkv.", "self_attn.out_proj": "out",
    "linear": "ff"}
SIZES = {"dynamic_embedding.w1", "static_embedding.w1", "position", "encoder.0.ff1.bias"}


def from_release(state, heads):
    """Their network from its state dict; ValueError lists the keys that are left over or missing.

    One of them is used approximately: they index the static mask *values* by the row of the batch,
    we embed their mean.
    """
    theirs = {}                                             # our name -> their keys
    for key in state:
        name = key
        for pattern, ours in RENAME.items():
            name = re.sub(pattern, ours, name)
        theirs.setdefault(name, []).append(key)
    values = {}                                             # our name -> value
    for name, keys in theirs.items():
        axis = 1 if name.endswith("embedding.w2") else 0
        values[name] = torch.cat([torch.as_tensor(state[key]) for key in keys], axis)

    absent = SIZES - values.keys()
    data.check(not absent, f"release state: missing {sorted(absent)}")
    positions, d = values["position"].shape
    config = Config(dynamic_names=variables(theirs["dynamic_embedding.w1"]),
                    static_names=variables(theirs["static_embedding.w1"]), d_model=d, n_heads=heads,
                    n_layers=sum(name.endswith("qkv.bias") for name in values),
                    d_ff=len(values["encoder.0.ff1.bias"]))
    model = Release(config, positions)
    own = model.state_dict()                                # the tensors themselves, by name
    absent, unknown = own.keys() - values.keys(), theirs.keys() - own.keys()
    data.check(not absent and not unknown,
               f"release state: missing {sorted(absent)}, not understood "
               f"{[key for name in sorted(unknown) for key in theirs[name]]}")
    mean = values.pop("static_embedding.mask_vector").mean(0)                   # (S,)
    for name, value in values.items():
        own[name].copy_(value.reshape(own[name].shape))
    # the tokens of the means: each attribute by itself, the others hidden by zeros
    embedding, others = model.static_embedding, ~torch.eye(len(mean), dtype=torch.bool)
    embedding.mask_vector.data.zero_()
    embedding.mask_vector.data = embedding(mean.expand(others.shape), others).detach()  # (S, D)
    return model.eval()


def variables(keys):
    """time_series_embedding.embeddings1.<variable>.weight … -> their variables, in order."""
    return tuple(key.split(".")[2] for key in keys)


@torch.no_grad()
def differences(path):
    """{output: largest difference} of our network from theirs; path: an npz as at the top."""
    file = read_npz(path, x="btc", s="bs", mask="btc", heads="")
    state = {name[6:]: value for name, value in file.items() if name.startswith("state/")}
    x, s, mask = (torch.from_numpy(file[name]) for name in ("x", "s", "mask"))
    network = from_release(state, heads=int(file["heads"]))
    encoded, masked = network.encode(x, s), network.encode(x, s, Masks(dynamic=mask))
    outputs = {"tokens": network.embed(x, s), "encoded": encoded}
    outputs["out_dynamic"], outputs["out_static"] = network.decode(encoded)
    outputs["out_dynamic_masked"], _ = network.decode(masked)
    return {name: np.abs(value.numpy() - file[name]).max() for name, value in outputs.items()}


def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE.npz")
    for name, difference in differences(parser.parse_args(argv).file).items():
        print(f"{name:<20} differs by {difference:.1e}")


if __name__ == "__main__":
    data.command(main)
