"""The safetensors format, read and written by hand: a length, a JSON header, and the bytes of every tensor.

Derivation: whiteboard/interop/safetensors.md     Source: the format's description, github.com/huggingface/safetensors
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import contextlib
import json
import math
import mmap
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

LONGEST_HEADER = 100_000_000     # bytes; the public reader's limit
DTYPES = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "U32": np.uint32, "I32": np.int32,
    "U64": np.uint64, "I64": np.int64, "F16": np.float16, "F32": np.float32, "F64": np.float64, "C64": np.complex64,
    "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu, "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz, "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit; the message names the file and what is wrong in it."""


class SafeTensors(Mapping):
    """{name: array} of one file. The arrays are read-only views of the mapped file: nothing is read until it is used.

    path: a .safetensors file
    Raises CheckpointError for a file that breaks a rule of the format; OSError when it cannot be opened.
    """

    def __init__(self, path):
        self.path = Path(path)
        with open(self.path, "rb") as file:
            size = file.seek(0, 2)
            _rule(size >= 8, self.path, f"has {size} bytes: too short for the length of a header")
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        length = int.from_bytes(self._bytes[:8], "little")
        _rule(length <= LONGEST_HEADER, self.path, f"announces a header of {length} bytes, more than {LONGEST_HEADER}")
        _rule(8 + length <= size, self.path, f"announces a header of {length} bytes, but has {size}: is it cut off?")
        _rule(self._bytes[8:9] == b"{", self.path, "has a header that does not begin with {")
        header = _parse(self._bytes[8:8 + length], self.path)
        self.metadata = _checked_metadata(header.pop("__metadata__", {}), self.path)
        self._start = 8 + length
        self._tensors = {name: _checked_tensor(name, info, self.path) for name, info in header.items()}
        _check_ranges(self._tensors, size - self._start, self.path)

    def __getitem__(self, name):
        dtype, shape, begin, _ = self._tensors[name]
        flat = np.frombuffer(self._bytes, np.dtype(dtype).newbyteorder("<"), math.prod(shape), self._start + begin)
        return flat.reshape(shape)

    def __iter__(self):
        return iter(self._tensors)

    def __len__(self):
        return len(self._tensors)


def open_folder(folder):
    """{name: array} of a checkpoint folder, in one file or, when that is not there, sharded with an index.

    Raises CheckpointError for a folder without a checkpoint, an index that names a file or a tensor that is not
    there, or a shard that holds a tensor the index does not give to it.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return SafeTensors(folder / "model.safetensors")
    _rule(index.exists(), folder, "holds neither model.safetensors nor model.safetensors.index.json")
    home = read_json(index).get("weight_map")
    strings = isinstance(home, dict) and all(isinstance(shard, str) for shard in home.values())
    _rule(strings, index, "has no weight_map of tensor names to file names")
    shards = {}
    for shard in sorted(set(home.values())):
        _rule(shard == Path(shard).name and (folder / shard).is_file(), index, f"names the shard {shard!r}, which is not in the folder")
        shards[shard] = SafeTensors(folder / shard)
    lost = [name for name, shard in home.items() if name not in shards[shard]]
    _rule(not lost, index, f"names tensors their shards do not hold: {', '.join(sorted(lost))}")
    stray = [f"{name} in {shard}" for shard, tensors in shards.items() for name in tensors if home.get(name) != shard]
    _rule(not stray, index, f"does not name tensors the shards hold: {', '.join(sorted(stray))}")
    return _Shards(shards, home)


def write(path, tensors, metadata=None):
    """Write {name: array} as one file, whole or not at all: to a temporary file beside it, flushed to disk, then renamed.

    metadata: {name: text}. Raises ValueError for a dtype the format does not have; OSError (a full disk) after removing
    the temporary file: what stood at `path` before still stands.
    """
    path, names = Path(path), {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"} | (metadata or {})}, 0
    for name, array in tensors.items():
        if array.dtype not in names:
            raise ValueError(f"{name} is of dtype {array.dtype}, which safetensors does not have")
        header[name] = {"dtype": names[array.dtype], "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(header, ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)                               # so that the tensors begin at a multiple of eight
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array).tobytes())


@contextlib.contextmanager
def replacing(path):
    """A binary file that takes the place of `path` when the block ends well, and vanishes when it does not."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder):
    """Make renames in a folder outlive a power cut, where the system can open folders."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class _Shards(Mapping):
    """Several files as one mapping."""

    def __init__(self, shards, home):
        self._shards, self._home = shards, home

    def __getitem__(self, name):
        return self._shards[self._home[name]][name]

    def __iter__(self):
        return iter(self._home)

    def __len__(self):
        return len(self._home)


def read_json(path):
    """A JSON file that holds one object. Raises CheckpointError when it does not."""
    return _parse(Path(path).read_bytes(), path)


def _rule(holds, path, message):
    if not holds:
        raise CheckpointError(f"{path} {message}")


def _parse(data, path):
    """A JSON object, more strictly than Python does it: no duplicate keys, no NaN, no -0, no half characters."""
    def unique(pairs):
        twice = [key for key, times in Counter(key for key, _ in pairs).items() if times > 1]
        _rule(not twice, path, f"has duplicate keys: {', '.join(map(repr, twice))}")
        return dict(pairs)

    def constant(text):
        raise CheckpointError(f"{path} holds the number {text}, which JSON does not have")

    def whole(text):
        _rule(text != "-0" and len(text) <= 25, path, f"holds the number {text[:30]}")
        return int(text)

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant, parse_int=whole)
        json.dumps(value, ensure_ascii=False).encode("utf-8")         # half of a surrogate pair is no character
    except (UnicodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} holds no valid JSON: {error}") from None
    _rule(isinstance(value, dict), path, f"holds no JSON object, but {str(value)[:30]}")
    return value


def _checked_metadata(metadata, path):
    strings = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    _rule(strings, path, "has a __metadata__ that is not a table of strings")
    return metadata


def _checked_tensor(name, info, path):
    """One entry of the header -> (dtype, shape, begin, end), in bytes from the end of the header."""
    where = f"tensor {name!r}"
    _rule(isinstance(info, dict) and info.keys() == {"dtype", "shape", "data_offsets"}, path,
          f"{where}: has {sorted(info) if isinstance(info, dict) else info!r}, expected dtype, shape and data_offsets")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    _rule(isinstance(dtype, str) and dtype in DTYPES, path, f"{where}: dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    counts = isinstance(shape, list) and isinstance(offsets, list) and all(type(n) is int and 0 <= n < 2 ** 64 for n in shape + offsets)
    _rule(counts and len(offsets) == 2, path, f"{where}: shape {shape!r} and data_offsets {offsets!r} must be whole numbers from 0 to 2**64 - 1")
    begin, end = offsets
    itemsize = np.dtype(DTYPES[dtype]).itemsize
    addressable = len(shape) <= 64 and math.prod([max(n, 1) for n in shape]) * itemsize < 2 ** 63
    _rule(addressable, path, f"{where}: shape {shape} is too large to address")
    n_bytes = math.prod(shape) * itemsize
    _rule(end - begin == n_bytes, path, f"{where}: {dtype} {shape} takes {n_bytes} bytes, data_offsets {offsets} hold {end - begin}")
    return DTYPES[dtype], tuple(shape), begin, end


def _check_ranges(tensors, size, path):
    """The tensors lie side by side: every byte after the header belongs to exactly one of them."""
    expected = 0
    for name, (_, _, begin, end) in sorted(tensors.items(), key=lambda item: item[1][2:]):
        _rule(begin == expected, path, f"tensor {name!r}: begins at byte {begin}, the one before ends at {expected}: "
              f"the ranges {'overlap' if begin < expected else 'leave a gap'}")
        expected = end
    _rule(expected <= size, path, f"holds {size} bytes of tensors, the header speaks of {expected}: is it cut off?")
    _rule(expected == size, path, f"holds {size} bytes of tensors, the header speaks of {expected} only")


def demo():
    """A file written byte by byte, read back, and then spoilt."""
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F8_E4M3","shape":[1,3],"data_offsets":[8,11]}}'
    data = np.array([1.5, -2.0], "<f4").tobytes() + bytes([0x38, 0x7E, 0x01])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        path.write_bytes(len(header).to_bytes(8, "little") + header + data)
        tensors = SafeTensors(path)
        a, b = np.array(tensors["a"]), tensors["b"].astype(np.float32)
        print(f"shapes    {path.stat().st_size} bytes = 8 + a header of {len(header)} + {len(data)} of tensors: a {a.shape}, b {b.shape}")
        print(f"by hand   a = {a}, b: the E4M3 bytes 38 7e 01 are {b[0]}")
        refused = 0
        for what, spoilt in (("cut off", data[:-1]), ("too long", data + b"\0")):
            path.write_bytes(len(header).to_bytes(8, "little") + header + spoilt)
            try:
                SafeTensors(path)
            except CheckpointError as error:
                refused += 1
                print(f"{what:9s} {str(error).replace(str(path), path.name)}")
    print(f"claim     values as written, {refused} of 2 spoilt files refused")
    assert refused == 2 and a.tolist() == [1.5, -2.0] and b.tolist() == [[1.0, 448.0, 2.0 ** -9]]


if __name__ == "__main__":
    from minideepseek.interop.safetensors import demo  # the imported copy, so that every name exists once
    demo()
