import os
import socket
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from samq.errors import SamqError
from samq.gguf.file import (
    file_sha256,
    gguf_names,
    open_gguf,
    read_metadata,
    read_rows,
    read_tensors,
    read_weights,
)
from samq.serving.source import content_sha256
from tests.conftest import write_tiny_gguf


def test_tensors_have_torch_shapes(tiny_gguf):
    tensor = read_tensors(tiny_gguf)["blk.0.ffn_down.weight"]
    assert (tensor.shape, tensor.type, tensor.bytes) == ((256, 512), "F16", 2 * 256 * 512)
    assert (tensor.row_length, tensor.weights) == (512, 256 * 512)


def test_weights_come_back_as_written(tiny_gguf):
    weights = read_weights(tiny_gguf, "blk.1.attn_k.weight")
    assert (weights.shape, weights.dtype) == ((128, 256), np.float32)
    assert 0.015 < weights.std() < 0.025
    with pytest.raises(SamqError, match="has no tensor nothing"):
        read_weights(tiny_gguf, "nothing")


def test_hugging_face_names_become_gguf_names(tiny_gguf):
    name = gguf_names(read_metadata(tiny_gguf))
    assert name("model.layers.1.mlp.down_proj.weight") == "blk.1.ffn_down.weight"
    assert name("model.embed_tokens.weight") == "token_embd.weight"
    assert name("lm_head.weight") == "output.weight"
    assert name("model.layers.2.mlp.down_proj.weight") is None


def test_nemotron_h_has_two_names_for_its_layers():
    name = gguf_names({"general.architecture": "nemotron_h", "nemotron_h.block_count": 2})
    for stem in ("model", "backbone"):
        assert name(f"{stem}.layers.1.mixer.in_proj.weight") == "blk.1.ssm_in.weight"
        assert name(f"{stem}.layers.1.norm.weight") == "blk.1.attn_norm.weight"
    assert name("model.layers.2.mixer.in_proj.weight") is None


@pytest.mark.parametrize("size", [0, 10, 5000, -1])
def test_a_damaged_file_is_one_sentence(tiny_gguf, tmp_path, size):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny_gguf.read_bytes()[:size])
    with pytest.raises(SamqError, match=r"cut\.gguf is not a whole GGUF file"):
        read_tensors(cut)


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(SamqError, match="there is no GGUF file at"):
        read_tensors(tmp_path / "nothing.gguf")


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q4_0"])
def test_rows_dequantized_by_llama_cpp_are_those_of_the_gguf_package(kind, tmp_path):
    values = np.random.default_rng(0).normal(size=(3, 8, 64)).astype(np.float32)
    path = tmp_path / "stacked.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    raw = gguf.GGMLQuantizationType[kind]
    writer.add_tensor("w", gguf.quantize(values, raw), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tensor,) = open_gguf(path).tensors
    expected = read_weights(path, "w").reshape(24, 64)
    for rows in (slice(None), slice(5, 11), np.array([23, 0, 7])):
        values_read = read_rows(tensor, rows)
        assert values_read.dtype == np.float32
        np.testing.assert_allclose(values_read, expected[rows], rtol=1e-6)


def test_a_name_that_is_not_utf_8_is_shown_as_far_as_it_can_be(tmp_path):
    path = write_tiny_gguf(tmp_path / "name.gguf", add_tokenizer=lambda writer: writer.add_name("Café model"))
    path.write_bytes(path.read_bytes().replace("Café model".encode(), b"Caf\xe9 model!"))
    assert read_metadata(path)["general.name"] == "Caf\ufffd model!"


def test_a_type_that_only_a_fork_has_is_named(tmp_path):
    path, name = write_tiny_gguf(tmp_path / "fork.gguf"), b"blk.0.attn_q.weight"
    content = bytearray(path.read_bytes())
    entry = struct.pack("<Q", len(name)) + name
    struct.pack_into("<I", content, content.index(entry) + len(entry) + 4 + 2 * 8, 139)
    path.write_bytes(content)
    message = r"cannot read .*fork\.gguf: blk\.0\.attn_q\.weight has type 139, which the pinned gguf package does not"
    with pytest.raises(SamqError, match=message):
        read_tensors(path)


def special_files(folder):
    """Kind -> a path that is no regular file; reading some of them never ends."""
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(folder / "socket"))
    return {
        "device": Path("/dev/zero"),
        "pipe": folder / "pipe",
        "socket": folder / "socket",
        "folder": folder,
    }


def test_what_is_no_regular_file_is_not_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the address of a socket is short
    kinds = [*special_files(Path()).items(), ("device", tmp_path / "link"), ("device", Path("/dev/null"))]
    for kind, path in kinds:
        for read in (file_sha256, open_gguf, content_sha256):
            with pytest.raises(SamqError, match=f"{path} is a {kind}, not a regular file; name a file"):
                read(path)


def test_a_path_that_cannot_be_is_one_sentence():
    for path in (Path("/" + "x" * 5000), Path("a\0b")):
        for read, words in {file_sha256: "cannot read", open_gguf: "there is no GGUF file at"}.items():
            with pytest.raises(SamqError, match=f"{words} .*(too long|null byte).*; check the path"):
                read(path)


def test_an_empty_file_is_not_a_whole_gguf(tmp_path):
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(SamqError, match=r"empty\.gguf is not a whole GGUF file \(cannot mmap an empty file\)"):
        open_gguf(tmp_path / "empty.gguf")
