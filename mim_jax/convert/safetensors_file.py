"""Writing safetensors with numpy alone: the same arrays and metadata give the same bytes (reading: torch_file.py)."""

import json

import numpy as np

from mim_jax.convert.torch_file import SAFE_DTYPES

NAMES = {np.dtype(dtype): name for name, dtype in SAFE_DTYPES.items()}
ALIGNMENT = 8  # bytes; of the header, as the format asks, so that readers can map the tensors


def write(path, arrays: dict[str, np.ndarray], metadata: dict[str, str]):
    """Eight bytes of the header's length, the header as JSON, the tensors row by row, little-endian, by name."""
    header, place = {"__metadata__": dict(sorted(metadata.items()))}, 0
    for name, array in sorted(arrays.items()):
        header[name] = {
            "dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [place, place + array.nbytes]
        }  # fmt: skip
        place += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, array in sorted(arrays.items()):
            file.write(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data)
