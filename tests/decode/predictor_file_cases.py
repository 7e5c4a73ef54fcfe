"""What may be wrong with a predictor's files: what is done to a folder, and what the error says of it."""

import json
import pickle
import struct

import safetensors.torch
import torch

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def load_file(path):
    """Tensors of a file that may be overwritten while they are in use, which those of `safetensors.torch.load_file` may not."""
    return safetensors.torch.load(path.read_bytes())


def tensors(change):
    """Changes the tensors of the folder."""

    def apply(folder):
        found = load_file(folder / WEIGHTS)
        safetensors.torch.save_file(
            {name: tensor.contiguous() for name, tensor in change(found).items()}, folder / WEIGHTS
        )

    return apply


def filled(name, value):
    def change(found):
        found[name].view(-1)[-1] = value
        return found

    return tensors(change)


def recast(dtype):
    return tensors(lambda found: {name: tensor.to(dtype) for name, tensor in found.items()})


def fields(**changes):
    """Changes fields of the configuration."""

    def apply(folder):
        found = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**found, **changes}))

    return apply


def without(name):
    def apply(folder):
        found = json.loads((folder / CONFIG).read_text())
        del found[name]
        (folder / CONFIG).write_text(json.dumps(found))

    return apply


def config(content):
    return lambda folder: (folder / CONFIG).write_bytes(content)


def weights(content):
    def apply(folder):
        path = folder / WEIGHTS
        path.write_bytes(content(path.read_bytes()) if callable(content) else content)

    return apply


def around_config(before, after=b""):
    return lambda folder: (folder / CONFIG).write_bytes(before + (folder / CONFIG).read_bytes() + after)


def header(**entries):
    """A safetensors file of the header alone."""
    text = json.dumps(entries).encode()
    return weights(struct.pack("<Q", len(text)) + text)


NUMBERS = "expected finite ones within ±65504"
NAMES = "expected transition, weight"
UNREADABLE = "cannot be read as safetensors: "

# case -> (what is done to the folder, file at fault, what the error says of it)
REFUSED = {
    # weights
    "a map with NaN": (filled("weight", float("nan")), WEIGHTS, f"weight: got values from nan to nan, {NUMBERS}"),
    "a map with infinity": (filled("weight", float("inf")), WEIGHTS, NUMBERS),
    "a transition with NaN": (filled("transition", float("nan")), WEIGHTS, "transition: got values from nan to nan"),
    "a transition with minus infinity": (filled("transition", float("-inf")), WEIGHTS, "transition: got values from -inf to"),
    "values of 1e30": (filled("weight", 1e30), WEIGHTS, f"to 1e+30, {NUMBERS}"),
    "int8 weights": (recast(torch.int8), WEIGHTS, "got dtype I8, expected one of float64, float32, float16, bfloat16"),
    "int64 weights": (recast(torch.int64), WEIGHTS, "got dtype I64"),
    "boolean weights": (recast(torch.bool), WEIGHTS, "got dtype BOOL"),
    "float8 weights": (recast(torch.float8_e4m3fn), WEIGHTS, "got dtype F8_E4M3"),
    "complex weights": (recast(torch.complex64), WEIGHTS, "got dtype C64"),
    "no weight": (tensors(lambda t: {"transition": t["transition"]}), WEIGHTS, f"tensors: got transition, {NAMES} (missing: weight; unknown: none)"),
    "no transition": (tensors(lambda t: {"weight": t["weight"]}), WEIGHTS, f"got weight, {NAMES} (missing: transition; unknown: none)"),
    "no tensors": (tensors(lambda t: {}), WEIGHTS, f"got none, {NAMES}"),
    "a weight renamed": (tensors(lambda t: {"weights": t["weight"], "transition": t["transition"]}), WEIGHTS, "(missing: weight; unknown: weights)"),
    "one tensor too many": (tensors(lambda t: {**t, "bias": torch.zeros(3)}), WEIGHTS, "(missing: none; unknown: bias)"),
    "many tensors too many": (tensors(lambda t: {**t, **{f"w{i}": torch.zeros(1) for i in range(99)}}), WEIGHTS, "and 91 more"),
    "no transition in the configuration": (fields(transition_rank=0), WEIGHTS, "expected weight (missing: none; unknown: transition)"),
    "no transition's rank in the configuration": (without("transition_rank"), WEIGHTS, "unknown: transition"),
    "saved from DataParallel": (tensors(lambda t: {f"module.{k}": v for k, v in t.items()}), WEIGHTS, "unknown: module.transition, module.weight); save the predictor itself, not a wrapper"),
    "saved compiled": (tensors(lambda t: {f"_orig_mod.{k}": v for k, v in t.items()}), WEIGHTS, "missing: transition, weight; unknown: _orig_mod.transition, _orig_mod.weight"),
    "fewer maps than offsets": (fields(num_offsets=4), WEIGHTS, "weight: got shape [3, 32, 32], expected [4, 32, 32] by config.json"),
    "another width": (fields(hidden_size=16), WEIGHTS, "got shape [3, 32, 32], expected [3, 16, 16]"),
    "another rank": (fields(transition_rank=4), WEIGHTS, "transition: got shape [2, 32, 5], expected [2, 32, 4]"),
    "a map as a vector": (tensors(lambda t: {**t, "weight": t["weight"].flatten()}), WEIGHTS, "weight: got shape [3072], expected [3, 32, 32]"),
    "maps without elements": (tensors(lambda t: {**t, "weight": t["weight"][:0]}), WEIGHTS, "got shape [0, 32, 32]"),
    # safetensors
    "weights truncated": (weights(lambda data: data[:-7]), WEIGHTS, UNREADABLE),
    "a header truncated": (weights(lambda data: data[:50]), WEIGHTS, UNREADABLE),
    "bytes after the tensors": (weights(lambda data: data + b"\0" * 64), WEIGHTS, UNREADABLE),
    "weights of garbage": (weights(bytes(range(256)) * 9), WEIGHTS, UNREADABLE),
    "an empty file of weights": (weights(b""), WEIGHTS, UNREADABLE),
    "a header of 2 GB": (weights(struct.pack("<Q", 2 << 30) + b"{"), WEIGHTS, UNREADABLE),
    "a header past every file": (weights(b"\xff" * 8), WEIGHTS, UNREADABLE),
    "a header of nested brackets": (weights(struct.pack("<Q", 100_000) + b"[" * 100_000), WEIGHTS, UNREADABLE),
    "a header of shapes without data": (header(weight={"dtype": "F32", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 1 << 62]}), WEIGHTS, UNREADABLE),
    "a pickle under that name": (weights(pickle.dumps({"weight": [1.0]})), WEIGHTS, UNREADABLE),
    "a torch.save under that name": (lambda folder: torch.save(load_file(folder / WEIGHTS), folder / WEIGHTS), WEIGHTS, UNREADABLE),
    # configuration, the fields
    "true as a number": (fields(num_nodes=True), CONFIG, "num_nodes: got True, expected an integer"),
    "a string as a number": (fields(insertion_layer="20"), CONFIG, "insertion_layer: got '20', expected an integer"),
    "null as a number": (fields(insertion_layer=None), CONFIG, "insertion_layer: got None, expected an integer"),
    "a fraction as a layer": (fields(insertion_layer=2.5), CONFIG, "insertion_layer: got 2.5, expected an integer"),
    "a fraction as a number of nodes": (fields(num_nodes=6.5), CONFIG, "num_nodes: got 6.5, expected an integer"),
    "a whole float": (fields(num_nodes=6.0), CONFIG, "num_nodes: got 6.0, expected an integer"),
    "a list as a number": (fields(num_layers=[4]), CONFIG, "num_layers: got [4], expected an integer"),
    "a number as a string": (fields(tree_kind=1), CONFIG, "tree_kind: got 1, expected a string"),
    "null as a string": (fields(base_model=None), CONFIG, "base_model: got None, expected a string"),
    "an object as a string": (fields(architecture={}), CONFIG, "architecture: got {}, expected a string"),
    "a long list as a string": (fields(architecture=[0] * 10**5), CONFIG, "architecture: got [0, 0, 0, 0, 0, 0, ...], expected a string"),
    "an unknown field": (fields(num_heads=4), CONFIG, "'num_heads': got an unknown field, expected only num_offsets, hidden_size"),
    "a field named self": (fields(self=1), CONFIG, "'self': got an unknown field"),
    "a required field missing": (without("insertion_layer"), CONFIG, "insertion_layer: got none, expected one (required)"),
    "no fields": (config(b"{}"), CONFIG, "num_offsets: got none, expected one (required)"),
    "a field twice": (lambda folder: (folder / CONFIG).write_text((folder / CONFIG).read_text().replace("{", '{"num_nodes": 4,', 1)), CONFIG, "num_nodes: got it twice, expected each name once"),
    "a billion offsets": (fields(num_offsets=10**9), CONFIG, "num_offsets: got 1000000000, expected 1..255"),
    "no offsets": (fields(num_offsets=0), CONFIG, "num_offsets: got 0, expected 1..255"),
    "a huge width": (fields(hidden_size=1 << 40), CONFIG, "hidden_size: got 1099511627776, expected 1..1048576"),
    "a number past 64 bits": (fields(num_layers=10**30), CONFIG, "num_layers: got 1000000000000000000000000000000, expected an integer"),
    "a number of 5000 digits": (config(b'{"num_layers": ' + b"9" * 5000 + b"}"), CONFIG, "limit"),
    "an empty vocabulary": (fields(vocab_size=0), CONFIG, "vocab_size: got 0, expected 1..2147483647"),
    "a negative vocabulary": (fields(vocab_size=-7), CONFIG, "vocab_size: got -7"),
    "one layer": (fields(num_layers=1), CONFIG, "num_layers: got 1, expected 2.."),
    "an insertion layer at the top": (fields(insertion_layer=4), CONFIG, "insertion_layer: got 4, expected 1..3 (4 layers)"),
    "a negative insertion layer": (fields(insertion_layer=-1), CONFIG, "insertion_layer: got -1, expected 1..3"),
    "an infinite insertion layer": (fields(insertion_layer=float("inf")), CONFIG, "Out of range float values"),
    "a NaN as a layer": (fields(insertion_layer=float("nan")), CONFIG, "Out of range float values"),
    "a transition wider than the model": (fields(transition_rank=33), CONFIG, "transition_rank: got 33, expected 0..32 (hidden_size)"),
    "too many nodes": (fields(num_nodes=10**9), CONFIG, "num_nodes: got 1000000000, expected 1..256"),
    "negative nodes": (fields(num_nodes=-3), CONFIG, "num_nodes: got -3, expected 1..256"),
    "more lookahead nodes than nodes": (fields(num_lookahead=9), CONFIG, "num_lookahead: got 9, expected 1..8 (num_nodes)"),
    "an unknown kind of tree": (fields(tree_kind="../../etc"), CONFIG, "tree_kind: got '../../etc', expected one of dynamic, static"),
    "a lone surrogate": (fields(architecture="\ud800"), CONFIG, "lone surrogate '\\ud800'"),
    # configuration, the file
    "a list": (config(b"[1, 2]"), CONFIG, "got list, expected an object"),
    "null": (config(b"null"), CONFIG, "got NoneType, expected an object"),
    "an empty configuration": (config(b""), CONFIG, "not JSON: Expecting value at character 1"),
    "half a configuration": (lambda folder: (folder / CONFIG).write_bytes((folder / CONFIG).read_bytes()[:60]), CONFIG, "not JSON: "),
    "nested brackets": (config(b"[" * 100_000), CONFIG, "nested too deeply"),
    "a field of nested brackets": (config(b'{"num_nodes": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"), CONFIG, "nested too deeply"),
    "nested objects": (config(b'{"a":' * 100_000), CONFIG, "nested too deeply"),
    "a binary configuration": (config(b"\x80\x02}q\x00."), CONFIG, "not UTF-8 text: invalid start byte at byte 1"),
    "zeros": (config(b"\0" * 200), CONFIG, "not JSON: "),
    "a byte order mark": (around_config(b"\xef\xbb\xbf"), CONFIG, "not JSON: Unexpected UTF-8 BOM"),
    "UTF-16": (lambda folder: (folder / CONFIG).write_bytes((folder / CONFIG).read_text().encode("utf-16")), CONFIG, "not UTF-8 text"),
    "a configuration of 20 MB": (around_config(b" " * (20 << 20)), CONFIG, "got more than 16777216 bytes, expected a JSON object"),
    "two configurations": (around_config(b"", b"{}"), CONFIG, "not JSON: Extra data"),
}  # fmt: skip


def dangling(name):
    def apply(folder):
        (folder / name).unlink()
        (folder / name).symlink_to(folder / "nowhere")

    return apply


def directory(name):
    def apply(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return apply


ABSENT = {f"{name}, {what}": (do(name), name) for name in (CONFIG, WEIGHTS) for what, do in (
    ("missing", lambda name: lambda folder: (folder / name).unlink()), ("a link to nowhere", dangling), ("a folder", directory)
)}  # fmt: skip
