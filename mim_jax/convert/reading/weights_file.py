"""Weights from files of PyTorch, safetensors and numpy, read without PyTorch; nothing that a file asks for is run.

What torch.save writes is a zip archive: a pickle that describes tensors, and their raw storages beside it. A pickle is a
program and may name any function. Here every name in it becomes an inert object that only remembers what it was given; the
tensors are then built from what the objects remember, once the program has ended.
"""

import collections
import pickle
import zipfile
from typing import NamedTuple

import ml_dtypes  # noqa: F401  teaches numpy the names bfloat16 and float8_*
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from mim_jax.config import ConfigError

STATE_KEYS = ("model", "state_dict", "module", "model_ema")  # where training codes keep the weights, the first one wins
TORCH_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8",
    "BoolStorage": "bool", "ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128",
}  # fmt: skip
TORCH_DTYPES = (*TORCH_STORAGES.values(), "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2")
RESAVE = "torch.save(torch.load(path, map_location='cpu'), new_path)"


def read(path, wanted=None) -> dict[str, np.ndarray]:
    """The tensors of a file by name: .npz, .safetensors, or what torch.save writes since 1.6 (.pt .pth .pkl).

    Told apart by content, not by name. Of a training checkpoint the first of STATE_KEYS is read and nothing else, or, with
    `wanted`, a function [names] -> names or None for no choice, those of all tensors under their names from the top. A pickled
    module has the names of its state dict. Arrays keep their dtype, may share memory and must not be written to. Raises
    ConfigError for what is missing, damaged, of another format or without tensors.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(16)
            if head.startswith(b"PK"):
                arrays = _read_zip(path, wanted)
            elif head[8:9] == b"{":
                arrays = load_file(path)
            elif head.startswith(b"\x80") and head[1:2] <= b"\x05":
                again = f"If you trust it, load and save it again with a current torch: {RESAVE}"
                raise ConfigError(f"'{path}' is a bare pickle, as torch wrote before 1.6. {again}")
            else:
                raise ConfigError(f"'{path}' starts with {head!r} and is none of: .npz, .safetensors, an archive of torch.save")
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"cannot read the weights '{path}': {error.strerror or error}") from error
    except Exception as error:  # the formats have no one error for damage: zip, pickle and numpy each raise their own
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise ConfigError(f"'{path}' is damaged or incomplete, fetch it again ({reason})") from error
    if not arrays:
        raise ConfigError(f"'{path}' holds no tensors")
    return arrays


def metadata(path) -> dict[str, str]:
    """What a safetensors file says of itself; {} for a file that says nothing, or of another format."""
    try:
        with safe_open(path, "np") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def _read_zip(path, wanted) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if pickles := sorted((name for name in names if name.split("/")[-1] == "data.pkl"), key=len):
            return TorchArchive(archive, pickles[0].removesuffix("data.pkl"), path).tensors(wanted)
    if not any(name.endswith(".npy") for name in names):
        raise ConfigError(f"'{path}' is a zip archive, but neither of torch.save nor of numpy.savez: {names[:3]}")
    with np.load(path, allow_pickle=False) as arrays:
        try:
            return dict(arrays)
        except ValueError as error:
            if "allow_pickle" not in str(error):
                raise
            run = "which could run code when read (allow_pickle): save arrays of numbers alone"
            raise ConfigError(f"'{path}' holds Python objects, {run}") from error


# -- archives of torch.save --------------------------------------------------------------------------------------------


class Inert:
    """Any class or function that a pickle names, and whatever would come of calling it: arguments and state, kept."""

    name = ""  # dotted; each global of a pickle is a subclass with its own

    def __new__(cls, *args, **options):
        made = super().__new__(cls)
        made.args, made.state = args, None
        return made

    def __call__(self, *args, **options):
        return Inert(*args)

    def __setstate__(self, state):
        self.state = state

    def ignore(self, *items):
        """Items of lists, sets and dicts of an unknown class."""

    append = extend = add = __setitem__ = ignore


class Storage(NamedTuple):
    """A record of raw bytes, by its name in the archive."""

    kind: str
    key: str
    count: int  # of elements


class Inspector(pickle.Unpickler):
    """Runs a pickle in which every global but OrderedDict is inert."""

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        return type("Inert", (Inert,), {"name": f"{module}.{name}"})

    def persistent_load(self, pid):
        what, kind, key, _, count = pid[:5]
        if what != "storage":
            raise pickle.UnpicklingError(f"a reference to '{what}' instead of a storage")
        return Storage(kind.name.rpartition(".")[2], key, count)


class TorchArchive:
    """An open archive of torch.save; `prefix` is the folder in it, `path` its own name, for messages."""

    def __init__(self, archive: zipfile.ZipFile, prefix: str, path):
        self.archive, self.prefix, self.path = archive, prefix, path
        self.loaded = {}  # raw storages by name: tensors may share one

    def tensors(self, wanted=None) -> dict[str, np.ndarray]:
        """{name in the state dict: array}; `wanted`, and ConfigError: see `read`."""
        names = self.archive.namelist()
        if self.prefix + "constants.pkl" in names:
            save = "torch.save(torch.jit.load(path).state_dict(), new_path)"
            raise ConfigError(f"'{self.path}' is a TorchScript program; save its weights alone: {save}")
        order = self.prefix + "byteorder"
        if order in names and self.archive.read(order) != b"little":
            raise ConfigError(f"'{self.path}' was written big-endian; on a little-endian machine: {RESAVE}")
        with self.archive.open(self.prefix + "data.pkl") as file:
            top = Inspector(file).load()
        nodes = self.leaves(weights(top))
        if wanted:
            below = {name: node for name, node in self.leaves(top) if is_tensor(node)}
            nodes = [(name, below[name]) for name in names] if (names := wanted(list(below))) else nodes
        found = ((name, self.tensor(node, name)) for name, node in nodes)
        arrays = {name: array for name, array in found if array is not None}
        if not arrays:
            what = f"keys {list(map(str, top))[:8]}" if isinstance(top, dict) else getattr(top, "name", type(top).__name__)
            raise ConfigError(
                f"'{self.path}' holds no tensors, neither at its top level ({what}) nor under {', '.join(STATE_KEYS)};"
                " objects of other classes are not built, whatever the file asks for"
            )
        return arrays

    def leaves(self, node, name: str = "", above: tuple = ()):
        """Yields (dotted name, what is there) of all that has nothing below it."""
        if (below := children(node)) is None:
            yield name, node
            return
        if id(node) in above:
            raise ConfigError(f"'{self.path}': '{name}' contains itself")
        for key, child in below.items():
            yield from self.leaves(child, f"{name}.{key}" if name else str(key), (*above, id(node)))

    def tensor(self, node, name: str) -> np.ndarray | None:
        """The array that torch would have rebuilt; None for what is no tensor."""
        if not is_tensor(node):
            return None
        kind = node.name.rpartition(".")[2]
        match kind, node.args:
            case (("_rebuild_parameter" | "_rebuild_parameter_with_state"), (data, *_)):
                return self.tensor(data, name)
            case "_rebuild_from_type_v2", (function, _, args, *_):  # a tensor with attributes of its own
                return self.tensor(function(*args), name)
            case "_rebuild_tensor_v2", (Storage() as storage, offset, size, stride, _, _):
                return self.view(name, storage, TORCH_STORAGES.get(storage.kind), (offset, size, stride))
            case "_rebuild_tensor_v3", (Storage() as storage, offset, size, stride, _, _, dtype):
                return self.view(name, storage, dtype.name.removeprefix("torch."), (offset, size, stride))
        # also a tensor with one more argument: it marks a conjugate or negated view
        raise ConfigError(f"'{self.path}': tensor '{name}' is of a kind that is not read here ({kind}); save it as a plain one")

    def view(self, name: str, storage: Storage, dtype: str | None, window) -> np.ndarray:
        """A strided window (offset, size, stride) on a storage; numpy refuses one that reaches outside."""
        where, (offset, size, stride) = f"'{self.path}': tensor '{name}'", window
        if dtype not in TORCH_DTYPES:
            raise ConfigError(f"{where} is of type {dtype or storage.kind}, which is not read here")
        if not all(type(n) is int and n >= 0 for n in (offset, *size, *stride)) or len(size) != len(stride):
            raise ConfigError(f"{where} has size {size}, stride {stride} and offset {offset}")
        dtype = np.dtype(dtype)
        if 0 in size:
            return np.zeros(size, dtype)
        raw = self.raw(name, storage, 1 if storage.kind == "UntypedStorage" else dtype.itemsize)
        try:
            return np.ndarray(size, dtype, raw, offset * dtype.itemsize, [n * dtype.itemsize for n in stride])
        except (TypeError, ValueError) as error:
            beyond = f"reaches beyond its storage of {len(raw):,} bytes"
            raise ConfigError(f"{where} of size {size}, stride {stride} and offset {offset} {beyond}") from error

    def raw(self, name: str, storage: Storage, itemsize: int) -> bytes:
        record, wanted = f"{self.prefix}data/{storage.key}", storage.count * itemsize
        if record not in self.loaded:
            try:
                info = self.archive.getinfo(record)
            except KeyError as error:
                raise ConfigError(f"'{self.path}' lacks the record {record} of tensor '{name}'") from error
            if info.file_size != wanted:  # checked before anything is unpacked
                has = f"has {info.file_size:,} bytes instead of {wanted:,}"
                raise ConfigError(f"'{self.path}': the record {record} of tensor '{name}' {has}")
            self.loaded[record] = self.archive.read(info)
        return self.loaded[record]


def is_tensor(node) -> bool:
    """Whether torch would have rebuilt a tensor here."""
    return isinstance(node, Inert) and node.name.startswith(("torch._utils._rebuild", "torch._tensor._rebuild"))


def weights(top, depth: int = 0):
    """The part of a training checkpoint that holds the weights: down the STATE_KEYS, as far as they lead."""
    if isinstance(top, dict) and depth < 10:  # a dict may contain itself
        for key in STATE_KEYS:
            if children(top.get(key)) is not None:
                return weights(top[key], depth + 1)
    return top


def children(node) -> dict | None:
    """{name: what is directly below a dict or a pickled torch.nn.Module}; None for anything else."""
    if isinstance(node, dict):
        return node
    state = node.state if isinstance(node, Inert) else None
    if not isinstance(state, dict) or "_modules" not in state:
        return None
    passing = state.get("_non_persistent_buffers_set", ())
    if isinstance(passing, Inert):  # old pickles have no sets: set([...])
        passing = passing.args[0] if passing.args else ()
    buffers = {name: x for name, x in state.get("_buffers", {}).items() if name not in passing}
    return {**state.get("_parameters", {}), **buffers, **state["_modules"]}
