"""Files that safetensors' own library wrote, read piece by piece."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from easyspec.errors import ConfigurationError
from easyspec.model.tensor_file import TensorFile

TENSORS = {
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
    "vector": torch.arange(11, dtype=torch.int64),
    "cube": torch.arange(60, dtype=torch.uint8).view(3, 4, 5),
    "matrix": torch.randn(9, 7),
    "half": torch.randn(5, 6).half(),
    "brain": torch.randn(6, 5).bfloat16(),
    "byte": torch.randn(4, 8).to(torch.float8_e4m3fn),
    "flags": torch.tensor([True, False, True]),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("name", TENSORS)
def test_whole_tensors(path: Path, name: str) -> None:
    file = TensorFile(path)
    assert set(file) == set(TENSORS)
    assert file.shape(name) == tuple(TENSORS[name].shape)
    read = file.read(name)
    assert read.dtype == TENSORS[name].dtype
    assert read.shape == TENSORS[name].shape
    assert torch.equal(read.view(torch.uint8), TENSORS[name].view(torch.uint8)) if read.dim() else read == 3.5
    file.close()


def part_of(data: st.DataObject, size: int) -> range:
    start = data.draw(st.integers(0, size))
    return range(start, data.draw(st.integers(start, size)))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(name=st.sampled_from(["matrix", "half", "brain", "byte"]), data=st.data())
def test_parts_are_what_slices_are(path: Path, name: str, data: st.DataObject) -> None:
    whole = TENSORS[name]
    rows, columns = part_of(data, whole.shape[0]), part_of(data, whole.shape[1])
    file = TensorFile(path)
    parts = [file.read(name, rows), file.read(name, columns=columns), file.read(name, rows, columns)]
    file.close()
    slices = [slice(part.start, part.stop) for part in (rows, columns)]
    expected = [whole[slices[0]], whole[:, slices[1]], whole[slices[0], slices[1]]]
    for part, same in zip(parts, expected, strict=True):
        assert part.shape == same.shape
        assert torch.equal(part.float(), same.float())


def test_only_the_part_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    num_read = []
    original = os.preadv

    def counting(*arguments: object) -> int:
        num_read.append(original(*arguments))
        return num_read[-1]

    monkeypatch.setattr(os, "preadv", counting)
    file = TensorFile(path)
    file.read("matrix", range(2, 5))
    assert num_read == [3 * 7 * 4]
    num_read.clear()
    file.read("matrix", columns=range(1, 4))
    assert num_read == [3 * 4] * 9
    file.close()


def test_a_read_may_come_in_pieces(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: original(fd, [buffers[0][:13]], offset))
    file = TensorFile(path)
    assert torch.equal(file.read("matrix"), TENSORS["matrix"])
    file.close()


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(1000)}, path)
    file = TensorFile(path)
    os.truncate(path, 100)
    with pytest.raises(ConfigurationError, match=r"cannot read .*model\.safetensors: it ends at byte 100"):
        file.read("weight")
    file.close()


def test_a_type_that_is_not_known(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(2, dtype=torch.uint16)}, path)
    file = TensorFile(path)
    with pytest.raises(ConfigurationError, match=r"'weight' in .* has type U16; allowed: F64, F32, F16, BF16"):
        file.read("weight")
    file.close()
