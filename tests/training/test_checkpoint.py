import errno
import json
import os
import shutil

import numpy as np
import pytest

from minideepseek.interop import safetensors
from minideepseek.interop.safetensors import DTYPES, CheckpointError, SafeTensors, write
from minideepseek.training.checkpoint import NAME, PREVIOUS, Checkpoint, fingerprint, load_checkpoint, save_checkpoint

FACTS = {"recipe": {"seed": 0, "peak": 3e-3}, "text": None, "name": "Zoë's \"town\"", "list": [1, 2.5, True]}
ARRAYS = {"weights.W": np.arange(6, dtype=np.float32).reshape(2, 3), "m.W": np.full(3, 1e-30), "ids": np.array([3, -1])}
NARROW = [name for name, dtype in DTYPES.items() if np.dtype(dtype).type.__module__ == "ml_dtypes"]      # bfloat16, float8
CALLS = ("fsync the new file", "rename .tmp to .new", "fsync the folder", "link the old file", "rename the link to previous",
         "rename .new to the name", "fsync the folder again")          # in the order of a save over an older checkpoint


def at_step(step):
    return Checkpoint(step, {name: array + step for name, array in ARRAYS.items()}, FACTS)


def saved(folder, *steps):
    for step in steps:
        save_checkpoint(folder, at_step(step))
    return folder


def same(ours, theirs):
    assert ours.step == theirs.step and ours.facts == theirs.facts and list(ours.arrays) == list(theirs.arrays)
    for name, array in ours.arrays.items():
        other = theirs.arrays[name]
        assert array.dtype == other.dtype and array.shape == other.shape and array.tobytes() == other.tobytes(), name


def intercept(monkeypatch, number, act):
    """Let call `number` (from 0) of os.fsync, os.replace and os.link, counted together, do `act()` instead."""
    calls = []

    def counted(name, real):
        def call(*args, **options):
            calls.append(name)
            return act() if len(calls) == number + 1 else real(*args, **options)
        return call

    for name in ("fsync", "replace", "link"):
        monkeypatch.setattr(os, name, counted(name, getattr(os, name)))
    return calls


def no():
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_is_saved_is_loaded(tmp_path):
    same(load_checkpoint(saved(tmp_path, 17)), at_step(17))
    same(load_checkpoint(tmp_path / NAME), at_step(17))
    assert os.listdir(tmp_path) == [NAME]                       # the first has none before it
    loaded = load_checkpoint(tmp_path)
    loaded.arrays["weights.W"][0, 0] = 5                        # its own memory: a run trains on it
    same(load_checkpoint(tmp_path), at_step(17))


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_and_form(tmp_path, name):
    values = np.array([[0, 1, 1], [1, 0, 1]]).astype(DTYPES[name])
    arrays = {"matrix": values, "transposed": values.T, "scalar": values[0, 1].reshape(()), "empty": values[:0], "strided": values[:, ::2]}
    save_checkpoint(tmp_path, Checkpoint(0, arrays, {}))
    same(load_checkpoint(tmp_path), Checkpoint(0, arrays, {}))


def test_every_bit_of_a_float_comes_back(tmp_path):
    values = np.array([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 5e-324, 1 / 3])
    values.view(np.uint64)[0] += 12345                          # a nan with a message in it
    save_checkpoint(tmp_path, Checkpoint(3, {"x": values}, {}))
    assert load_checkpoint(tmp_path).arrays["x"].tobytes() == values.tobytes()


def test_the_one_before_is_kept(tmp_path):
    saved(tmp_path, 10, 20, 30)
    assert sorted(os.listdir(tmp_path)) == [PREVIOUS, NAME]
    same(load_checkpoint(tmp_path), at_step(30))
    same(load_checkpoint(tmp_path / PREVIOUS), at_step(20))


def test_the_public_reader_sees_tensors_and_metadata(tmp_path):
    tensors = SafeTensors(saved(tmp_path, 4) / NAME)
    assert tensors.metadata["step"] == "4" and json.loads(tensors.metadata["facts"]) == FACTS and tensors.metadata["machine"] == fingerprint()
    public = pytest.importorskip("safetensors.numpy")
    np.testing.assert_array_equal(public.load_file(tmp_path / NAME)["weights.W"], ARRAYS["weights.W"] + 4)


def flips(folder):
    """(place, spoilt file, what became of it) for one flipped bit in every byte, every bit of the first 8, in turn."""
    path = folder / NAME
    content, rng = path.read_bytes(), np.random.default_rng(0)
    for place in range(len(content)):
        for bit in range(8) if place < 8 else [rng.integers(8)]:
            path.write_bytes(content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1:])
            try:
                yield place, content, load_checkpoint(folder)
            except CheckpointError as error:
                yield place, content, str(error)


def test_a_flipped_bit_never_gives_another_checkpoint(tmp_path):
    """Anywhere: length, header, facts, data. The error names the file and the one before, and that one is whole."""
    refused = total = 0
    for _, content, result in flips(saved(tmp_path, 10, 20)):
        total += 1
        if isinstance(result, str):
            refused += 1
            assert str(tmp_path / NAME) in result and f"the one before is {tmp_path / PREVIOUS}: rename it to {NAME}" in result
        else:
            same(result, at_step(20))
    assert total == len(content) + 56 and refused > 0.85 * total
    same(load_checkpoint(tmp_path / PREVIOUS), at_step(10))


def test_a_flipped_bit_is_refused(tmp_path):
    accepted = [(place, content[place - 12:place + 12]) for place, content, result in flips(saved(tmp_path, 10, 20))
                if not isinstance(result, str) and b'"format"' not in content[place - 16:place + 16]]      # "format": "pt" is a custom, not ours
    assert not accepted


def test_a_file_cut_off_or_too_long(tmp_path):
    path = saved(tmp_path, 10) / NAME
    content = path.read_bytes()
    for spoilt in [*[content[:n] for n in range(0, len(content), 7)], content[:-1], content + b"\0"]:
        path.write_bytes(spoilt)
        with pytest.raises(CheckpointError, match=NAME):
            load_checkpoint(tmp_path)


def test_a_newer_format(tmp_path):
    meta = SafeTensors(saved(tmp_path, 10) / NAME).metadata
    write(tmp_path / NAME, ARRAYS, meta | {"minideepseek": "2"})
    with pytest.raises(CheckpointError, match="has format 2, this program knows up to 1: update it"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("change", [{"sha256": None}, {"step": None}, {"facts": None}, {"minideepseek": None}, {"step": "-1"}, {"step": "x"}, {"minideepseek": ""},
                                    {"minideepseek": "1.0"},
                                    {"step": "²"}])
def test_a_file_that_is_no_checkpoint(tmp_path, change):
    meta = SafeTensors(saved(tmp_path, 10) / NAME).metadata
    write(tmp_path / NAME, ARRAYS, {key: value for key, value in (meta | change).items() if value is not None})
    with pytest.raises(CheckpointError, match="is not a checkpoint of a run"):
        load_checkpoint(tmp_path)


def test_other_files_and_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=NAME):
        load_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_checkpoint(tmp_path / "nowhere")
    (tmp_path / "text").write_text("Long ago, Anna is in the mill.")
    with pytest.raises(CheckpointError, match="text announces a header"):
        load_checkpoint(tmp_path / "text")
    write(tmp_path / "weights", ARRAYS)
    with pytest.raises(CheckpointError, match="weights is not a checkpoint of a run$"):       # no hint: it is not a run's file
        load_checkpoint(tmp_path / "weights")
    (tmp_path / NAME).write_bytes(b"")
    with pytest.raises(CheckpointError, match="too short for the length of a header$"):       # no hint: there is none before it
        load_checkpoint(tmp_path)


def test_the_checksum_looks_at_everything(tmp_path):
    def signature(step, facts, arrays):
        save_checkpoint(tmp_path, Checkpoint(step, arrays, facts))
        return SafeTensors(tmp_path / NAME).metadata["sha256"]

    plain, W = signature(1, {}, ARRAYS), ARRAYS["weights.W"]
    others = [signature(2, {}, ARRAYS), signature(1, {"": 0}, ARRAYS), signature(1, {}, dict(reversed(ARRAYS.items()))),
              *[signature(1, {}, ARRAYS | {"weights.W": other}) for other in (W.reshape(3, 2), W.view(np.int32), np.nextafter(W, np.float32(9)))],
              signature(1, {}, {name.replace("m.", "v."): array for name, array in ARRAYS.items()})]
    assert len({plain, *others}) == 8 and plain == signature(1, {}, {name: array.copy() for name, array in ARRAYS.items()})


def test_a_save_makes_these_calls(tmp_path, monkeypatch):
    saved(tmp_path, 10)
    calls = intercept(monkeypatch, 99, no)
    saved(tmp_path, 20)
    assert calls == ["fsync", "replace", "fsync", "link", "replace", "replace", "fsync"] and len(calls) == len(CALLS)


AFTER = [(10, 5), (10, 5), (10, 5), (10, 5), (10, 5), (10, 10), (20, 10)]      # steps of the checkpoint and the previous when call n does not happen


@pytest.mark.parametrize("number", [n for n in range(7) if n != 3], ids=lambda n: CALLS[n])
def test_a_disk_that_fails_leaves_a_whole_checkpoint(tmp_path, monkeypatch, number):
    saved(tmp_path, 5, 10)
    with monkeypatch.context() as patch:
        intercept(patch, number, no)
        with pytest.raises(OSError, match="No space left"):
            saved(tmp_path, 20)
    recovers(tmp_path, number)


def recovers(folder, number):
    """After a save over 10 and 5 that ended before call `number`: what is there is whole, and the next saves are as ever."""
    step, previous = AFTER[number]
    same(load_checkpoint(folder), at_step(step))
    same(load_checkpoint(folder / PREVIOUS), at_step(previous))
    saved(folder, 30)
    same(load_checkpoint(folder), at_step(30))
    same(load_checkpoint(folder / PREVIOUS), at_step(step))
    saved(folder, 40)
    same(load_checkpoint(folder / PREVIOUS), at_step(30))
    assert sorted(os.listdir(folder)) == [PREVIOUS, NAME]       # nothing is left lying about


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process that dies within a call is made by fork")
@pytest.mark.parametrize("number", range(7), ids=lambda n: CALLS[n])
def test_a_process_that_dies_leaves_a_whole_checkpoint(tmp_path, monkeypatch, number):
    """No handler and no cleaning up: the process is gone before call `number`."""
    saved(tmp_path, 5, 10)
    child = os.fork()
    if child == 0:
        try:
            intercept(monkeypatch, number, lambda: os._exit(9))
            saved(tmp_path, 20)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    recovers(tmp_path, number)


def test_no_litter_after_the_next_save(tmp_path, monkeypatch):
    saved(tmp_path, 10)
    with monkeypatch.context() as patch:
        intercept(patch, 5, no)
        with pytest.raises(OSError):
            saved(tmp_path, 20)
    saved(tmp_path, 30)
    assert sorted(os.listdir(tmp_path)) == [PREVIOUS, NAME]


def test_where_files_cannot_have_two_names_the_old_one_is_copied(tmp_path, monkeypatch):
    saved(tmp_path, 10)
    monkeypatch.setattr(os, "link", lambda *_: no())
    saved(tmp_path, 20)
    same(load_checkpoint(tmp_path), at_step(20))
    same(load_checkpoint(tmp_path / PREVIOUS), at_step(10))
    monkeypatch.setattr(shutil, "copyfile", lambda *_: no())
    with pytest.raises(OSError, match="No space left"):
        saved(tmp_path, 30)
    same(load_checkpoint(tmp_path), at_step(20))
    same(load_checkpoint(tmp_path / PREVIOUS), at_step(10))
    monkeypatch.undo()
    saved(tmp_path, 40)
    same(load_checkpoint(tmp_path / PREVIOUS), at_step(20))
    assert sorted(os.listdir(tmp_path)) == [PREVIOUS, NAME]


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    saved(tmp_path, 10)

    def denied(path, mode="r", *args, **options):
        if "w" in mode:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open(path, mode, *args, **options)

    monkeypatch.setattr(safetensors, "open", denied, raising=False)
    with pytest.raises(PermissionError, match="Permission denied"):
        saved(tmp_path, 20)
    same(load_checkpoint(tmp_path), at_step(10))
    assert os.listdir(tmp_path) == [NAME]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        saved(tmp_path / "nowhere", 10)


def test_a_folder_without_write_permission(tmp_path):
    saved(tmp_path, 10)
    tmp_path.chmod(0o555)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("this user may write everywhere")
        with pytest.raises(PermissionError):
            saved(tmp_path, 20)
        same(load_checkpoint(tmp_path), at_step(10))
    finally:
        tmp_path.chmod(0o755)


def test_what_cannot_be_saved_changes_nothing(tmp_path):
    saved(tmp_path, 10)
    for arrays, facts, error in ((ARRAYS, {"path": tmp_path}, TypeError), ({"z": np.zeros(2, complex)}, {}, ValueError)):
        with pytest.raises(error):
            save_checkpoint(tmp_path, Checkpoint(20, arrays, facts))
    same(load_checkpoint(tmp_path), at_step(10))
    assert os.listdir(tmp_path) == [NAME]


def test_the_fingerprint_says_what_decides_the_last_bits(monkeypatch):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "3")
    assert f"numpy {np.__version__}" in fingerprint() and "3 threads" in fingerprint()
    monkeypatch.delenv("OPENBLAS_NUM_THREADS")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert "5 threads" in fingerprint()
