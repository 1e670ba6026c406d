"""Weights are read from files as torch, safetensors and numpy write them, and nothing in a file is run.

Archives are written here opcode by opcode, as torch.save writes them, so that torch is not needed.
"""

import collections
import json
import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

from mim_jax.config import ConfigError
from mim_jax.convert.reading.weights_file import read

RNG = np.random.default_rng(0)
STORAGE = {
    "float32": "Float",
    "float64": "Double",
    "float16": "Half",
    "bfloat16": "BFloat16",
    "int64": "Long",
    "int32": "Int",
    "int16": "Short",
    "int8": "Char",
    "uint8": "Byte",
    "bool": "Bool",
    "complex64": "ComplexFloat",
}
Global = collections.namedtuple("Global", "module name")
Call = collections.namedtuple("Call", "function args")  # REDUCE
New = collections.namedtuple("New", "kind state")  # NEWOBJ, then BUILD
Record = collections.namedtuple("Record", "pid")


def opcodes(x) -> bytes:
    """A pickle's program for x, without its first and last opcode."""
    many = lambda items: b"(" + b"".join(map(opcodes, items))
    match x:
        case Global():
            return f"c{x.module}\n{x.name}\n".encode()
        case Call():
            return opcodes(x.function) + opcodes(x.args) + b"R"
        case New():
            return opcodes(x.kind) + b")\x81" + opcodes(x.state) + b"b"
        case Record():
            return opcodes(x.pid) + b"Q"
        case dict():
            return b"}" + many(y for pair in x.items() for y in pair) + b"u"
        case tuple():
            return many(x) + b"t"
    return pickle.dumps(x, 2)[2:-1]


def program(x) -> bytes:
    return b"\x80\x02" + opcodes(x) + b"."


def utils(name):
    return Global("torch._utils", name)


class Archive:
    """What torch.save makes of a tree with `tensor`s in it."""

    def __init__(self):
        self.storages = []

    def storage(self, array, kind=None):
        self.storages.append(array.tobytes())
        kind = kind or STORAGE[array.dtype.name] + "Storage"
        pid = ("storage", Global("torch", kind), str(len(self.storages) - 1), "cuda:0", array.size)
        return Record(pid)

    def tensor(self, array, storage=None, offset=0, size=None, stride=None, extra=()):
        """A contiguous array, or a window on a storage."""
        stride = stride or tuple(s // array.itemsize for s in array.strides)
        args = (storage or self.storage(array), offset, size or array.shape, stride, False, collections.OrderedDict())
        return Call(utils("_rebuild_tensor_v2"), (*args, *extra))

    def save(self, path, top, *, without=(), **records):
        files = {"data.pkl": program(top), "byteorder": b"little", "version": b"3\n", **records}
        files |= {f"data/{i}": raw for i, raw in enumerate(self.storages)}
        with zipfile.ZipFile(path, "w") as archive:
            for name, raw in files.items():
                if name not in without:
                    archive.writestr(f"weights/{name}", raw)
        return path


def same(found, want):
    assert list(found) == list(want)
    for name, array in want.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.pth"


# what is read


def test_every_dtype(path):
    want = {name: RNG.integers(0, 2, (2, 3)).astype(name) for name in STORAGE}
    want |= {"scalar": np.float32(7).reshape(()), "empty": np.zeros((0, 3), np.float32)}
    a = Archive()
    tensors = {name: a.tensor(x) for name, x in want.items()}
    for name in ("uint16", "uint32", "float8_e4m3fn"):  # dtypes without a storage type of their own
        want[name] = np.arange(1, 7).astype(name).reshape(2, 3)
        raw = a.storage(want[name].view(np.uint8).reshape(-1), "UntypedStorage")
        args = (raw, 0, (2, 3), (3, 1), False, collections.OrderedDict(), Global("torch", name))
        tensors[name] = Call(utils("_rebuild_tensor_v3"), args)
    same(read(a.save(path, tensors)), want)
    assert read(path)["bfloat16"].dtype == ml_dtypes.bfloat16


def test_windows_on_one_storage(path):
    base, a = np.arange(24, dtype=np.float32), Archive()
    storage = a.storage(base)
    part = lambda offset, size, stride: a.tensor(base, storage, offset, size, stride)
    parameter = Call(utils("_rebuild_parameter"), (part(0, (4, 6), (6, 1)), True, collections.OrderedDict()))
    tagged = (utils("_rebuild_tensor_v2"), Global("torch", "Tensor"), part(0, (24,), (1,)).args, {"tag": 1})
    top = {
        "all": parameter,
        "turned": part(0, (6, 4), (1, 6)),
        "part": part(7, (2, 3), (12, 2)),
        "repeated": part(3, (2, 5), (0, 1)),
        "tagged": Call(Global("torch._tensor", "_rebuild_from_type_v2"), tagged),
        "step": 3,
        "nothing": None,
    }
    grid = base.reshape(4, 6)
    want = {"all": grid, "turned": grid.T, "part": grid[1::2, 1::2], "repeated": np.stack([base[3:8]] * 2), "tagged": base}
    same(read(a.save(path, top)), want)


@pytest.mark.parametrize("keys", [("model",), ("state_dict",), ("module",), ("model_ema",), ("model", "state_dict"), ()])
def test_the_weights_of_a_training_checkpoint(path, keys):
    weight, a = RNG.normal(size=(2, 2)).astype(np.float32), Archive()
    state = Call(Global("collections", "OrderedDict"), ())
    state = {"encoder.weight": a.tensor(weight), "step": 3, "parts": {"bias": a.tensor(weight[0])}}
    top, moments = state, {"state": {0: {"exp_avg": a.tensor(weight)}}}
    for key in reversed(keys):
        top = {"optimizer": moments, "epoch": 7, "args": New(Global("argparse", "Namespace"), {"lr": 1.0}), key: top}
    same(read(a.save(path, top)), {"encoder.weight": weight, "parts.bias": weight[0]})


def test_the_first_key_wins(path):
    a, (one, two) = Archive(), np.float32([[1], [2]])
    top = {"model_ema": {"w": a.tensor(two)}, "model": {"w": a.tensor(one)}}
    same(read(a.save(path, top)), {"w": one})


def test_a_pickled_module_has_the_names_of_its_state_dict(path):
    a, arrays = Archive(), RNG.normal(size=(4, 3)).astype(np.float32)
    w, b, table, hidden = map(a.tensor, arrays)
    module = lambda name, parameters, **more: New(
        Global("dall_e.encoder", name),
        {"training": False, "_parameters": parameters, "_buffers": {}, "_modules": {}, "width": 3, **more},
    )
    passing = Call(Global("__builtin__", "set"), (["hidden"],))
    conv = module("Conv2d", {"w": w, "b": b, "unused": None})
    inner = module("Sequential", {}, _modules={"conv": conv, "relu": module("ReLU", {})})
    buffers = {"table": table, "hidden": hidden}
    top = module("Encoder", {}, _buffers=buffers, _non_persistent_buffers_set=passing, _modules={"blocks": inner, "tied": conv})
    want = {
        "table": arrays[2],
        "blocks.conv.w": arrays[0],
        "blocks.conv.b": arrays[1],
        "tied.w": arrays[0],
        "tied.b": arrays[1],
    }
    same(read(a.save(path, top)), want)
    same(read(a.save(path, {"model": top, "epoch": 1})), want)


def test_numpy_and_safetensors(tmp_path):
    want = {"a.weight": RNG.normal(size=(2, 3)).astype(np.float32), "b": np.arange(4), "c": np.ones(3, np.float16)}
    np.savez(tmp_path / "w.npz", **want)
    same(read(tmp_path / "w.npz"), want)
    want |= {"d": np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3), "e": np.float32(1).reshape(())}
    (tmp_path / "w.safetensors").write_bytes(safetensors(want))
    same(read(tmp_path / "w.safetensors"), want)


def safetensors(arrays, lie=0):
    header, raw = {"__metadata__": {"format": "pt"}}, b""
    for name, x in arrays.items():
        kind = {"float32": "F32", "int64": "I64", "float16": "F16", "bfloat16": "BF16"}[x.dtype.name]
        header[name] = {"dtype": kind, "shape": list(x.shape), "data_offsets": [len(raw), len(raw) + x.nbytes + lie]}
        raw += x.tobytes()
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + raw


# what is not run


SYSTEM = Global(os.system.__module__, "system")
ATTACKS = {
    "call": lambda command: Call(SYSTEM, (command,)),
    "build": lambda command: New(Global("subprocess", "Popen"), {"args": command}),
    "eval": lambda command: Call(Global("builtins", "eval"), (f"__import__('os').system({command!r})",)),
    "getattr": lambda command: Call(Call(Global("builtins", "getattr"), (Global("os", "path"), "os.system")), (command,)),
    "key": lambda command: {Call(SYSTEM, (command,)): 1},
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_is_run(path, tmp_path, attack):
    touched, a, weight = tmp_path / "touched", Archive(), np.ones(3, np.float32)
    top = ATTACKS[attack](f"touch {touched}")
    with pytest.raises(ConfigError, match="weights.pth' holds no tensors"):
        read(a.save(path, top))
    same(read(a.save(path, {"weight": a.tensor(weight), "extra": top})), {"weight": weight})
    hooks = Call(utils("_rebuild_parameter"), (a.tensor(weight), True, top))
    same(read(a.save(path, {"weight": hooks})), {"weight": weight})
    assert not touched.exists()


def test_the_attack_is_a_real_one(tmp_path):
    pickle.loads(program(ATTACKS["call"](f"touch {tmp_path / 'touched'}")))
    assert (tmp_path / "touched").exists()


# what is refused


def refused(path, message, top, a=None, **options):
    with pytest.raises(ConfigError, match=f"weights.pth'.*{message}"):
        read((a or Archive()).save(path, top, **options))


@pytest.mark.parametrize("offset, size, stride", [(1, (6,), (1,)), (0, (2, 3), (4, 1)), (0, (10**9, 10**9), (1, 1))])
def test_a_window_beyond_its_storage_is_refused(path, offset, size, stride):
    a, x = Archive(), np.ones(6, np.float32)
    refused(path, "'w'.*reaches beyond.*24 bytes", {"w": a.tensor(x, None, offset, size, stride)}, a)


@pytest.mark.parametrize("offset, size, stride", [(-1, (6,), (1,)), (5, (6,), (-1,)), (0, (2,), (1, 1)), (0, ("6",), (1,))])
def test_a_window_that_is_none_is_refused(path, offset, size, stride):
    a, x = Archive(), np.ones(6, np.float32)
    refused(path, "'w' has size", {"w": a.tensor(x, None, offset, size, stride)}, a)


def test_other_archives_are_refused(path):
    a, x = Archive(), np.ones(6, np.float32)
    tensor = {"w": a.tensor(x)}
    refused(path, "big-endian", tensor, a, byteorder=b"big")
    refused(path, "TorchScript", tensor, a, **{"constants.pkl": b""})
    refused(path, "lacks the record weights/data/0 of tensor 'w'", tensor, a, without=("data/0",))
    a.storages[0] = a.storages[0][:20]
    refused(path, "has 20 bytes instead of 24", tensor, a)
    conjugate = a.tensor(x, extra=({"conj": True},))
    refused(path, "kind that is not read", {"w": conjugate}, a)
    refused(path, "_rebuild_qtensor", {"w": Call(utils("_rebuild_qtensor"), conjugate.args)}, a)
    refused(path, "of type QInt8Storage", {"w": a.tensor(x, a.storage(x, "QInt8Storage"))}, a)
    refused(path, r"top level \(keys \['epoch'\]\)", {"epoch": 3})
    refused(path, r"top level \(list\)", [3])
    refused(path, "damaged.*a reference to 'module'", Record(("module", 1, 2, 3, 4)))


@pytest.mark.parametrize("key", ["model", "part"])
def test_what_contains_itself_is_refused(path, key):
    looped = b"\x80\x02}q\x07" + opcodes(key) + b"h\x07s."  # d = {}; d[key] = d
    refused(path, "contains itself", None, **{"data.pkl": looped})


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "starts with b''"),
        (b"<!DOCTYPE html><html>", "starts with b'<!DOCTYPE"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "bare pickle.*torch.save"),
        (pickle.dumps({"w": np.ones(3)}), "bare pickle"),
        (b"PK\x03\x04" + bytes(200), "damaged or incomplete"),
        ((10**6).to_bytes(8, "little") + b'{"w": ', "damaged or incomplete.*header"),
        (b"\x05\0\0\0\0\0\0\0{oops", "damaged or incomplete.*header"),
        (safetensors({"w": np.ones(3, np.float32)})[:-1], "damaged or incomplete.*not fully covered"),
        (safetensors({"w": np.ones(3, np.float32)}, lie=-4), "damaged or incomplete.*shape"),
    ],
)
def test_other_files_are_refused(path, content, message):
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"(?s)weights.pth'.*{message}"):
        read(path)


def test_damage_is_found_wherever_it_is(path):
    """Cut anywhere or with any byte of a tensor turned: refused, never other numbers."""
    a, x = Archive(), np.arange(64, dtype=np.float32)
    whole = a.save(path, {"w": a.tensor(x)}).read_bytes()
    for length in range(4, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match="weights.pth"):
            read(path)
    at = whole.index(x.tobytes()) + 100
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(ConfigError, match="damaged.*CRC"):
        read(path)


def test_files_that_are_not_there_or_hold_nothing(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.pt.*No such file"):
        read(tmp_path / "nowhere.pt")
    np.savez(tmp_path / "objects.npz", w=np.array([{}], object))
    with pytest.raises(ConfigError, match="objects.npz.*allow_pickle"):
        read(tmp_path / "objects.npz")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("README", "hello")
    with pytest.raises(ConfigError, match="neither of torch.save nor of numpy.*README"):
        read(tmp_path / "other.zip")
    (tmp_path / "none.safetensors").write_bytes(safetensors({}))
    with pytest.raises(ConfigError, match="holds no tensors"):
        read(tmp_path / "none.safetensors")
