import gguf
import numpy as np
import pytest

from samq.allocation.target import OpenTarget, full_plan, stock_plan
from samq.allocation.types import legal_types, types_to_price, uniform_plan
from samq.errors import SamqError
from samq.gguf.audit import provenance_metadata
from samq.gguf.file import open_gguf, read_metadata, read_tensors
from samq.gguf.nearest import NearestRounding
from samq.llamacpp.quantize import planned_bytes, quantize
from samq.quantization.compensated_file import PlannedFile
from tests.conftest import write_tiny_gguf
from tests.samq.tiny_imatrix import write_tiny_imatrix

PROVENANCE = {"model": "tiny", "version": "1"}
TYPES = ["Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q8_0"]


@pytest.fixture(scope="module", params=[True, False], ids=["importance matrix", "no importance matrix"])
def weighted(request):
    return request.param


@pytest.fixture(scope="module", params=[256, 96], ids=["K types fit", "K types fall back"])
def target(request, weighted, toolchain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    source = write_tiny_gguf(folder / "tiny-f16.gguf", width=request.param, hidden=2 * request.param, blocks=11)
    return OpenTarget.open(source, toolchain, write_tiny_imatrix(folder / "imatrix.gguf", source) if weighted else None)


def mixed(target, shift):
    """A plan in which neighbouring tensors have different types, full precision among them."""
    legal = legal_types(target, types_to_price(target, TYPES))
    types = {}
    for index, (name, kinds) in enumerate(legal.items()):
        kinds = [*kinds, target.tensors[name].type]
        types[name] = kinds[(index + shift) % len(kinds)]
    return stock_plan(target, "Q5_K_S").model_copy(
        update={"types": types, "tensor_bytes": planned_bytes(target.tensors, types)}
    )


def write(target, plan, path):
    """The plan's file, from the last tensor to the first, the last rows of each first."""
    imatrix = target.imatrix.path if target.imatrix else None
    file = PlannedFile.create(path, target.full.path, plan, provenance_metadata(plan, PROVENANCE), imatrix)
    nearest = NearestRounding(target.full.path, imatrix)
    for name in reversed(nearest.names):
        middle = nearest.rows(name) // 2
        for rows in (slice(middle, None), slice(0, middle)):
            file.write(name, rows.start, nearest.blocks(name, file.types[name], rows))
    return path


def expect_the_file_of_llama_quantize(target, plan, folder):
    (folder / "quantized").mkdir()
    model = quantize(
        target.full.path, plan, folder / "quantized", target.toolchain, provenance=PROVENANCE, imatrix=target.imatrix
    )
    ours = write(target, plan, folder / "ours.gguf")
    assert ours.read_bytes() == (folder / "quantized" / model.file).read_bytes()
    return ours


@pytest.mark.parametrize("shift", range(3))
def test_a_file_is_the_one_that_llama_quantize_writes(target, weighted, tmp_path, shift):
    ours = expect_the_file_of_llama_quantize(target, mixed(target, shift), tmp_path)
    of_matrix = [key for key in read_metadata(ours) if key.startswith("quantize.imatrix.")]
    assert len(of_matrix) == (4 if weighted else 0)


def test_full_precision_is_the_source_as_llama_quantize_writes_it(target, tmp_path):
    expect_the_file_of_llama_quantize(target, full_plan(target), tmp_path)


def test_metadata_that_llama_quantize_sets_replace_those_of_the_source(toolchain, tmp_path):
    def tell(writer):
        writer.add_custom_alignment(32)
        writer.add_quantization_version(1)
        writer.add_string("samq.model", "an earlier one")
        writer.add_uint16("split.count", 0)
        writer.add_array("some.names", ["a", "ü"])
        writer.add_bool("some.truth", True)

    target = OpenTarget.open(write_tiny_gguf(tmp_path / "tiny.gguf", add_tokenizer=tell), toolchain)
    ours = expect_the_file_of_llama_quantize(target, uniform_plan(target, "Q8_0"), tmp_path)
    metadata = read_metadata(ours)
    assert metadata["samq.model"] == "tiny" and metadata["general.quantization_version"] == 2


def test_a_matrix_in_the_old_format_is_described_as_llama_quantize_does(toolchain, tmp_path):
    source = write_tiny_gguf(tmp_path / "tiny.gguf", blocks=1)
    random = np.random.default_rng(0)
    content = b""
    matrices = [tensor for tensor in read_tensors(source).values() if len(tensor.shape) == 2]
    for tensor in matrices:
        name = tensor.name.encode()
        head = np.array([len(name)], "<i4").tobytes() + name + np.array([7, tensor.row_length], "<i4").tobytes()
        content += head + random.random(tensor.row_length).astype("<f4").tobytes()
    path = tmp_path / "matrix.dat"
    dataset = b"wiki.train"
    tail = np.array([5, len(dataset)], "<i4").tobytes() + dataset
    path.write_bytes(np.array([len(matrices)], "<i4").tobytes() + content + tail)
    target = OpenTarget.open(source, toolchain, path)
    plan = uniform_plan(target, "Q4_K")
    model = quantize(source, plan, tmp_path, toolchain, provenance=PROVENANCE, imatrix=target.imatrix)
    # quantize gives every matrix the name imatrix.gguf
    path.rename(tmp_path / "imatrix.gguf")
    target = OpenTarget.open(source, toolchain, tmp_path / "imatrix.gguf")
    assert write(target, plan, tmp_path / "ours.gguf").read_bytes() == (tmp_path / model.file).read_bytes()


@pytest.mark.parametrize("alignment", [16, 256])
def test_an_alignment_that_llama_quantize_would_break_is_refused(toolchain, tmp_path, alignment):
    source = write_tiny_gguf(
        tmp_path / "tiny.gguf", add_tokenizer=lambda writer: writer.add_custom_alignment(alignment)
    )
    plan = uniform_plan(OpenTarget.open(source, toolchain), "Q8_0")
    with pytest.raises(
        SamqError, match=f"aligned to {alignment} bytes and llama-quantize writes 32 only; make the GGUF"
    ):
        PlannedFile.create(tmp_path / "out.gguf", source, plan, {})
    assert not (tmp_path / "out.gguf").exists()


def test_what_a_killed_process_wrote_stays(target, tmp_path):
    plan = mixed(target, 0)
    content = write(target, plan, tmp_path / "out.gguf").read_bytes()
    imatrix = target.imatrix.path if target.imatrix else None
    PlannedFile.create(tmp_path / "out.gguf", target.full.path, plan, provenance_metadata(plan, PROVENANCE), imatrix)
    assert (tmp_path / "out.gguf").read_bytes() == content


def test_a_copy_is_written_anew_where_it_is_asked_for(target, tmp_path):
    quantized = write(target, uniform_plan(target, "Q8_0"), tmp_path / "quantized.gguf")
    before = {tensor.name: np.array(tensor.data) for tensor in open_gguf(quantized).tensors}
    file, name = PlannedFile.copy(tmp_path / "copy.gguf", quantized), "blk.1.attn_k.weight"
    file.write(name, 3, np.zeros((2, before[name].shape[1]), np.uint8))
    for tensor in open_gguf(tmp_path / "copy.gguf").tensors:
        changed = np.flatnonzero((tensor.data != before[tensor.name]).reshape(len(tensor.data), -1).any(axis=1))
        assert changed.tolist() == ([3, 4] if tensor.name == name else [])


def test_a_file_that_cannot_be_written_is_an_error(target, tmp_path):
    nowhere = tmp_path / "nowhere" / "out.gguf"
    with pytest.raises(SamqError, match=r"cannot write .*out\.gguf: No such file or directory; choose a folder"):
        PlannedFile.create(nowhere, target.full.path, full_plan(target), {})
    with pytest.raises(SamqError, match=r"cannot write .*out\.gguf: No such file or directory; choose a folder"):
        PlannedFile.copy(nowhere, target.full.path)
    file = PlannedFile.create(tmp_path / "out.gguf", target.full.path, full_plan(target), {})
    with pytest.raises(ValueError, match=r"a row of output\.weight has"):
        file.write("output.weight", 0, np.zeros((1, 5), np.uint8))
    assert gguf.GGML_QUANT_VERSION == 2, "llama.cpp's GGML_QNT_VERSION"
