import struct

import gguf
import pytest
from gguf import GGUFValueType

from samq.errors import SamqError
from samq.gguf.file import open_gguf, read_metadata, read_tensors
from samq.gguf.header import LazyReader, pack_string, padded, read_header
from tests.conftest import write_tiny_gguf

TOKENS = ["a", "é", "", "一二", "x" * 300]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    def add_arrays(writer):
        writer.add_token_list(TOKENS)
        writer.add_token_types([1, 2, 3, 4, 5])
        writer.add_token_scores([0.5, -1.25, 0.0, 1e30, 7.0])
        writer.add_array("tests.flags", [True, False])
        writer.add_key_value("tests.large", [2**40, -1], GGUFValueType.ARRAY, GGUFValueType.INT64)
        writer.add_array("tests.nested", [[1, 2], [3]])
        writer.add_name("a name after the arrays")

    return write_tiny_gguf(tmp_path_factory.mktemp("header") / "arrays.gguf", add_tokenizer=add_arrays)


def test_the_lazy_reader_gives_what_ggufs_own_reader_gives(path):
    lazy, eager = LazyReader(path), gguf.GGUFReader(path)
    assert list(lazy.fields) == list(eager.fields)
    for name, field in lazy.fields.items():
        other = eager.fields[name]
        assert (field.contents(), field.types, field.offset) == (other.contents(), other.types, other.offset), name
        if len(other.data) > 1:
            assert field.contents(1) == other.contents(1) and field.contents(slice(1, 3)) == other.contents(slice(1, 3))
        for one, two in zip(field.data, other.data, strict=True):  # how transformers takes the values
            assert list(field.parts[one]) == list(other.parts[two]), name
        assert field.parts[0] == other.parts[0]
    assert lazy.fields["tokenizer.ggml.tokens"].contents() == TOKENS
    for one, two in zip(lazy.tensors, eager.tensors, strict=True):
        assert (one.name, one.tensor_type, one.data_offset) == (two.name, two.tensor_type, two.data_offset)
        assert one.data.shape == two.data.shape and (one.data == two.data).all()


def test_tensors_and_metadata_are_read_without_parsing_an_array(path):
    read_tensors(path)
    assert read_metadata(path)["general.name"] == "a name after the arrays"
    arrays = [
        open_gguf(path).fields[name] for name in ("tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tests.large")
    ]
    assert [vars(field) for field in arrays] == [{}, {}, {}]
    assert arrays[2].contents() == [2**40, -1]


def test_an_empty_array_is_a_list_without_values(tmp_path):
    path = tmp_path / "empty.gguf"
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 2)
    head += pack_string("empty") + struct.pack("<IIQ", GGUFValueType.ARRAY, GGUFValueType.STRING, 0)
    head += pack_string("after") + struct.pack("<II", GGUFValueType.UINT32, 7)
    path.write_bytes(head + bytes(padded(len(head)) - len(head)))
    lazy, eager = LazyReader(path), gguf.GGUFReader(path)
    for reader in (lazy, eager):
        assert [reader.fields[name].contents() for name in ("empty", "after")] == [[], 7]
    assert lazy.fields["empty"].types == eager.fields["empty"].types


def test_a_header_holds_every_value_as_its_bytes(path):
    def add_others(writer):
        writer.add_token_list([*TOKENS[:-1], "another"])
        writer.add_token_types([1, 2, 3, 4, 5])

    header = read_header(write_tiny_gguf(path.with_name("others.gguf"), add_tokenizer=add_others))
    content = path.with_name("others.gguf").read_bytes()
    assert all(pack_string(key) + value in content for key, value in header.values.items())
    for other in (None, read_header(write_tiny_gguf(path.with_name("plain.gguf"), blocks=1)).values):
        assert read_header(path.with_name("others.gguf"), other) == header
    values = b"".join(pack_string(token) for token in [*TOKENS[:-1], "another"])
    assert header.values["tokenizer.ggml.tokens"] == struct.pack("<IIQ", 9, 8, 5) + values
    for name, tensor in read_tensors(path.with_name("others.gguf")).items():
        assert (header.tensors[name].shape, header.tensors[name].type) == (tensor.shape, tensor.type)
    offsets = {tensor.name: tensor.data_offset for tensor in open_gguf(path.with_name("others.gguf")).tensors}
    assert {name: entry.offset for name, entry in header.tensors.items()} == offsets


@pytest.mark.parametrize("size", [0, 3, 30, 300])
def test_a_damaged_header_is_one_sentence(path, size):
    cut = path.with_name("cut.gguf")
    cut.write_bytes(path.read_bytes()[:size])
    with pytest.raises(SamqError, match=r"cut\.gguf is not a whole GGUF file \(.*\); copy or convert it again"):
        read_header(cut)
