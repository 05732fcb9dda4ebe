import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest

from minideepseek.interop.safetensors import DTYPES, CheckpointError, SafeTensors, open_folder, write

A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
B = {"dtype": "U8", "shape": [3], "data_offsets": [8, 11]}


def put(path, header, data=bytes(11), length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_values_names_and_metadata(tmp_path):
    data = np.array([1.5, -2], "<f4").tobytes() + bytes([7, 8, 9])
    tensors = SafeTensors(put(tmp_path / "m", {"__metadata__": {"format": "pt"}, "b": B, "a": A}, data))
    assert set(tensors) == {"a", "b"} and len(tensors) == 2 and tensors.metadata == {"format": "pt"}
    assert tensors["a"].tolist() == [1.5, -2] and tensors["b"].tolist() == [7, 8, 9]
    with pytest.raises(ValueError, match="read-only"):
        tensors["a"][0] = 1


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_byte_for_byte(tmp_path, name):
    raw = np.arange(1, 97, dtype=np.uint8).tobytes()
    size = np.dtype(DTYPES[name]).itemsize
    raw = raw if name != "BOOL" else bytes([0, 1] * 48)
    array = SafeTensors(put(tmp_path / "m", {"a": {"dtype": name, "shape": [2, 48 // size], "data_offsets": [0, 96]}}, raw))["a"]
    assert array.dtype == DTYPES[name] and array.shape == (2, 48 // size) and array.tobytes() == raw
    if np.dtype(DTYPES[name]).kind == "V":
        array.astype(np.float32)


def test_bfloat16_values(tmp_path):
    values = np.array([1, -0.5, 3.140625], ml_dtypes.bfloat16)
    header = {"a": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]}}
    assert SafeTensors(put(tmp_path / "m", header, values.tobytes()))["a"].astype(np.float32).tolist() == [1, -0.5, 3.140625]


def test_an_unaligned_tensor_a_scalar_and_an_empty_one(tmp_path):
    header = {"u": {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}, "e": {"dtype": "F32", "shape": [0, 5], "data_offsets": [1, 1]},
              "f": {"dtype": "F64", "shape": [1], "data_offsets": [1, 9]}}
    tensors = SafeTensors(put(tmp_path / "m", header, bytes([5]) + np.array([0.1]).tobytes()))
    assert tensors["u"] == 5 and tensors["e"].shape == (0, 5) and tensors["f"][0] == 0.1


def with_b(**changes):
    return {"a": A, "b": B | changes}


@pytest.mark.parametrize("header, message", [
    (b"[]", "a header that does not begin with {"),
    (b' {"a":1}', "a header that does not begin with {"),
    (b"{", "no valid JSON"),
    (b'{"a": {"dtype": "F32"', "no valid JSON"),
    (b"{\xff}", "no valid JSON"),
    (b'{"a":' + b"[" * 100_000, "no valid JSON"),
    (b'{"\\ud800": {"dtype":"U8","shape":[11],"data_offsets":[0,11]}}', "no valid JSON"),
    (b'{"a":{"dtype":"U8","shape":[11],"data_offsets":[0,11]},"a":{"dtype":"U8","shape":[11],"data_offsets":[0,11]}}', "duplicate keys: 'a'"),
    (b'{"a":{"dtype":"U8","dtype":"U8","shape":[11],"data_offsets":[0,11]}}', "duplicate keys: 'dtype'"),
    (b'{"a":{"dtype":"U8","shape":[11],"data_offsets":[-0,11]}}', "the number -0"),
    (b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,11]}}', "the number NaN"),
    (with_b(dtype="F7"), "dtype 'F7' is not one of"),
    (with_b(dtype=3), "dtype 3 is not one of"),
    (with_b(shape=[-3]), "must be whole numbers"),
    (with_b(shape=[3.0]), "must be whole numbers"),
    (with_b(shape=[True, 3]), "must be whole numbers"),
    (with_b(shape=3), "must be whole numbers"),
    (with_b(shape=[2 ** 64]), "must be whole numbers"),
    (with_b(shape=[2 ** 63, 2 ** 63]), "too large to address"),
    (with_b(shape=[2 ** 63, 2 ** 63, 0], data_offsets=[8, 8]), "too large to address"),
    (with_b(shape=[1] * 65), "too large to address"),
    (with_b(shape=[4]), "takes 4 bytes, data_offsets [8, 11] hold 3"),
    (with_b(data_offsets=[11, 8]), "hold -3"),
    (with_b(data_offsets=[8]), "must be whole numbers"),
    (with_b(data_offsets=[7, 10]), "begins at byte 7, the one before ends at 8: the ranges overlap"),
    (with_b(data_offsets=[9, 12]), "begins at byte 9, the one before ends at 8: the ranges leave a gap"),
    ({"b": B}, "begins at byte 8, the one before ends at 0: the ranges leave a gap"),
    ({"a": A}, "holds 11 bytes of tensors, the header speaks of 8 only"),
    (with_b(shape=[4], data_offsets=[8, 12]), "holds 11 bytes of tensors, the header speaks of 12: is it cut off?"),
    (with_b(extra=1), "expected dtype, shape and data_offsets"),
    ({"a": A, "b": 5}, "tensor 'b': has 5, expected"),
    ({"__metadata__": {"n": 1}, "a": A, "b": B}, "__metadata__"),
    ({"__metadata__": "text", "a": A, "b": B}, "__metadata__"),
])
def test_every_broken_rule_is_named(tmp_path, header, message):
    with pytest.raises(CheckpointError) as caught:
        SafeTensors(put(tmp_path / "spoilt.safetensors", header))
    assert message in str(caught.value) and "spoilt.safetensors" in str(caught.value)


@pytest.mark.parametrize("content, message", [
    (b"", "has 0 bytes: too short"),
    (b"\0" * 7, "has 7 bytes: too short"),
    (struct.pack("<Q", 5) + b"{}", "announces a header of 5 bytes, but has 10: is it cut off?"),
    (struct.pack("<Q", 2 ** 63) + b"{}", "announces a header of 9223372036854775808 bytes, more than 100000000"),
])
def test_header_lengths(tmp_path, content, message):
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        SafeTensors(tmp_path / "m")
    assert message in str(caught.value)


def test_a_file_without_tensors_and_a_padded_header_are_valid(tmp_path):
    assert len(SafeTensors(put(tmp_path / "m", b"{}      ", b""))) == 0


def two_shards(folder, home):
    put(folder / "one.safetensors", {"a": A}, bytes(8))
    put(folder / "two.safetensors", {"b": B | {"data_offsets": [0, 3]}}, bytes([1, 2, 3]))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": home}))
    return folder


def test_shards_are_one_mapping(tmp_path):
    tensors = open_folder(two_shards(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"}))
    assert set(tensors) == {"a", "b"} and len(tensors) == 2 and tensors["b"].tolist() == [1, 2, 3]


@pytest.mark.parametrize("home, message", [
    ({"a": "one.safetensors", "b": "three.safetensors"}, "names the shard 'three.safetensors', which is not in the folder"),
    ({"a": "../one.safetensors", "b": "two.safetensors"}, "names the shard '../one.safetensors'"),
    ({"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}, "names tensors their shards do not hold: c"),
    ({"a": "two.safetensors", "b": "two.safetensors"}, "names tensors their shards do not hold: a"),
    ({"b": "two.safetensors", "a": 3}, "has no weight_map"),
    ([], "has no weight_map"),
])
def test_a_wrong_index(tmp_path, home, message):
    with pytest.raises(CheckpointError) as caught:
        open_folder(two_shards(tmp_path, home))
    assert message in str(caught.value)


def test_a_tensor_the_index_forgets(tmp_path):
    folder = two_shards(tmp_path, {"b": "two.safetensors"})
    put(folder / "two.safetensors", {"b": B | {"data_offsets": [0, 3]}, "x": B | {"data_offsets": [3, 6]}}, bytes(6))
    with pytest.raises(CheckpointError, match="does not name tensors the shards hold: x in two.safetensors"):
        open_folder(folder)


def test_a_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="holds neither model.safetensors nor"):
        open_folder(tmp_path)


def test_what_is_written_is_read(tmp_path):
    tensors = {name: np.arange(6, dtype=np.uint8).reshape(2, 3).astype(dtype) for name, dtype in DTYPES.items()} | {"é": np.zeros((0, 2)), "scalar": np.array(3.5)}
    write(tmp_path / "m", tensors, {"step": "7"})
    back = SafeTensors(tmp_path / "m")
    assert back.metadata == {"format": "pt", "step": "7"} and list(back) == list(tensors)
    for name, array in tensors.items():
        assert back[name].dtype == array.dtype and back[name].shape == array.shape and back[name].tobytes() == array.tobytes()
    assert (8 + int.from_bytes((tmp_path / "m").read_bytes()[:8], "little")) % 8 == 0


def test_the_public_library_reads_what_we_write(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    tensors = {"a": np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32), "b": np.arange(5)}
    write(tmp_path / "m", tensors)
    for name, array in safetensors.load_file(tmp_path / "m").items():
        np.testing.assert_array_equal(array, tensors[name])


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    write(tmp_path / "m", {"a": np.zeros(3)})
    before = (tmp_path / "m").read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        write(tmp_path / "m", {"a": np.ones(3)})
    assert (tmp_path / "m").read_bytes() == before and os.listdir(tmp_path) == ["m"]
    with pytest.raises(ValueError, match="a is of dtype complex128, which safetensors does not have"):
        write(tmp_path / "m", {"a": np.zeros(3, complex)})
