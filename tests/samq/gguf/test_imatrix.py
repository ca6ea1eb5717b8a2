import logging
import struct
from dataclasses import replace

import gguf
import numpy as np
import pytest

from samq.allocation.target import OpenTarget, stock_plan
from samq.errors import SamqError
from samq.gguf.file import HashedFile, file_sha256, read_tensors
from samq.gguf.imatrix import usable_entries
from samq.llamacpp.quantize import quantize
from tests.samq.tiny_imatrix import write_tiny_imatrix

EXPERTS, DENSE, EMBEDDING = "blk.0.ffn_up_exps.weight", "blk.0.attn_q.weight", "token_embd.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Four stacked experts, a matrix and an embedding."""
    path = tmp_path_factory.mktemp("imatrix") / "experts.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, shape in ((EXPERTS, (4, 8, 64)), (DENSE, (16, 64)), (EMBEDDING, (16, 64))):
        writer.add_tensor(name, np.ones(shape, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tensors(source):
    return read_tensors(source)


def setting(value, *where):
    def change(sums, counts):
        sums[where] = value

    return change


def write_dat(path, entries):
    """The format of an older llama-imatrix."""
    content = struct.pack("<i", len(entries))
    for name, values in entries.items():
        content += struct.pack(f"<i{len(name)}sii{len(values)}f", len(name), name.encode(), 1, len(values), *values)
    path.write_bytes(content)
    return path


def test_an_importance_matrix_names_its_tensors_in_either_format(source, tensors, tmp_path):
    names = tensors.keys() - {EMBEDDING}
    assert usable_entries(write_tiny_imatrix(tmp_path / "im.gguf", source, without=[EMBEDDING]), tensors) == names
    old = write_dat(tmp_path / "im.dat", {EXPERTS: [0.5] * 256, DENSE: [0.5] * 64, "blk.7.other.weight": [0.0]})
    assert usable_entries(old, tensors) == names


@pytest.mark.parametrize("content", [b"", b"\x05\0\0\0none", struct.pack("<ii1sii4x", 1, 1, b"a", 1, 64)])
def test_a_damaged_or_missing_file_is_one_sentence(tensors, tmp_path, content):
    damaged = tmp_path / "im.dat"
    with pytest.raises(SamqError, match=r"cannot read the importance matrix .*im\.dat \(No such file"):
        usable_entries(damaged, tensors)
    damaged.write_bytes(content)
    with pytest.raises(SamqError, match=r"cannot read the importance matrix .*im\.dat"):
        usable_entries(damaged, tensors)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (DENSE, setting(0), rf"for {DENSE} all values are zero, so that llama-quantize would write zeros; measure"),
        (EXPERTS, setting(0, 2), f"for {EXPERTS} all values of expert 2 are zero"),
        (EXPERTS, setting(0, slice(1, 3)), f"for {EXPERTS} all values of experts 1, 2 are zero"),
        (DENSE, setting(np.nan, 0, 5), f"for {DENSE} it holds NaN or infinity"),
        (DENSE, setting(np.inf, 0, 5), f"for {DENSE} it holds NaN or infinity"),
        (DENSE, setting(-1e-3, 0, 5), f"for {DENSE} it holds negative numbers"),
        (DENSE, lambda sums, counts: sums[:, :48], f"for {DENSE} it has 48 values and the tensor has rows of 64"),
        (EXPERTS, lambda sums, counts: sums[:1], "it has 64 values and the tensor has 4 experts with rows of 64"),
    ],
)
def test_an_entry_that_llama_quantize_would_misuse_is_refused(source, tensors, tmp_path, name, change, message):
    matrix = write_tiny_imatrix(tmp_path / "im.gguf", source, changed={name: change})
    with pytest.raises(SamqError, match=message):
        usable_entries(matrix, tensors)
    others = {other: tensor for other, tensor in tensors.items() if other != name}
    assert usable_entries(matrix, others) == others.keys()


def test_several_entries_at_fault_are_counted(source, tensors, tmp_path):
    matrix = write_tiny_imatrix(tmp_path / "im.gguf", source, changed={name: setting(0) for name in (DENSE, EMBEDDING)})
    with pytest.raises(SamqError, match=f"for {DENSE} and 1 more all values are zero"):
        usable_entries(matrix, tensors)


def test_the_zeros_of_a_dat_are_refused(tensors, tmp_path):
    old = write_dat(tmp_path / "im.dat", {EXPERTS: [0.5] * 192 + [0.0] * 64, DENSE: [0.5] * 64})
    with pytest.raises(SamqError, match=f"for {EXPERTS} all values of expert 3 are zero"):
        usable_entries(old, tensors)


def test_experts_that_saw_no_token_are_named_and_used(source, tensors, tmp_path, caplog):
    def unseen(sums, counts):
        sums[[0, 3]] = counts[[0, 3]] = 0

    matrix = write_tiny_imatrix(tmp_path / "im.gguf", source, changed={EXPERTS: unseen})
    with caplog.at_level(logging.WARNING):
        assert usable_entries(matrix, tensors) == tensors.keys()
    (line,) = caplog.messages
    assert line.startswith(f"im.gguf: 1 tensors have experts that saw no token, such as {EXPERTS} (experts 0, 3)")


def test_an_entry_of_the_embedding_with_another_length_is_ignored_as_llama_quantize_does(source, tensors, tmp_path):
    matrix = write_tiny_imatrix(tmp_path / "im.gguf", source, changed={EMBEDDING: lambda sums, counts: sums[:, :32]})
    assert usable_entries(matrix, tensors) == tensors.keys() - {EMBEDDING}


def test_an_importance_matrix_of_another_model_is_refused(source, tensors, tmp_path):
    matrix = write_tiny_imatrix(tmp_path / "im.gguf", source)
    others = {tensor.name: replace(tensor, name=f"blk.9.{tensor.name}") for tensor in tensors.values()}
    with pytest.raises(SamqError, match="has no entry for any tensor of this model"):
        usable_entries(matrix, others)
    assert usable_entries(matrix, {}) == frozenset()


def test_neither_a_plan_nor_a_gguf_is_made_with_zeros(tiny_gguf, toolchain, tmp_path):
    good, zeros = (
        write_tiny_imatrix(tmp_path / f"{name}.gguf", tiny_gguf, changed=changed)
        for name, changed in (("good", {}), ("zeros", {"blk.1.attn_q.weight": setting(0)}))
    )
    with pytest.raises(SamqError, match=r"zeros\.gguf cannot be used: for blk\.1\.attn_q\.weight all values are zero"):
        OpenTarget.open(tiny_gguf, toolchain, zeros)
    planned = stock_plan(OpenTarget.open(tiny_gguf, toolchain, good), "Q4_K_M")
    plan = planned.model_copy(update={"imatrix_sha256": file_sha256(zeros)})
    (tmp_path / "out").mkdir()
    with pytest.raises(SamqError, match=r"zeros\.gguf cannot be used"):
        quantize(tiny_gguf, plan, tmp_path / "out", toolchain, provenance={}, imatrix=HashedFile.of(zeros))
    assert list((tmp_path / "out").iterdir()) == []
