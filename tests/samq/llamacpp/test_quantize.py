import os
from contextlib import nullcontext

import numpy as np
import pytest

from samq.allocation.target import OpenTarget, full_plan, make_plan, stock_plan
from samq.errors import SamqError, ToolError
from samq.gguf.file import (
    HashedFile,
    file_sha256,
    open_gguf,
    read_metadata,
    read_tensors,
    read_weights,
)
from samq.gguf.formats import TYPES, fallback
from samq.gguf.imatrix import usable_entries
from samq.gguf.nearest import NearestRounding
from samq.llamacpp.convert import convert, link_or_copy
from samq.llamacpp.imatrix import measure_imatrix
from samq.llamacpp.quantize import check_imatrix, mixture_types, planned_bytes, quantizable_tensors, quantize
from samq.records import ModelSource
from tests.conftest import write_tiny_gguf
from tests.tiny_models import add_byte_tokenizer, byte_tokenizer

SMALL_TYPES = [name for name in TYPES if not name.startswith(("IQ1", "IQ2", "IQ3", "TQ"))]


def make(target, plan, folder, **arguments):
    folder.mkdir()
    return quantize(target.full.path, plan, folder, target.toolchain, provenance={"model": "tiny"}, **arguments)


@pytest.fixture(scope="module")
def target(tiny_gguf, toolchain):
    return OpenTarget.open(tiny_gguf, toolchain)


def test_quantizable_tensors_are_the_2d_weights(target):
    assert set(target.quantizable) == {name for name, tensor in target.tensors.items() if len(tensor.shape) == 2}


def test_factors_of_the_rotary_frequencies_stay_as_they_are(toolchain, tmp_path):
    target = OpenTarget.open(write_tiny_gguf(tmp_path / "in.gguf", rope_factors=True), toolchain)
    name = "rope_freqs.weight"
    assert name in target.tensors and name not in target.quantizable
    plan = stock_plan(target, "Q4_K_M")
    assert name not in plan.types
    model = make(target, plan, tmp_path / "out")
    assert model.types[name] == "F32"
    written = read_weights(tmp_path / "out" / model.file, name)
    assert (written == read_weights(target.full.path, name)).all()


def test_a_stock_plan_names_the_types_that_llama_quantize_chooses(target, tmp_path):
    plan = stock_plan(target, "q4_k_m")
    assert plan.types["output.weight"] == "Q6_K"
    assert plan.types["blk.0.attn_q.weight"] == "Q4_K"
    model = make(target, plan, tmp_path / "out")
    assert model.types.items() >= plan.types.items()
    tensors = read_tensors(tmp_path / "out" / model.file)
    assert sum(tensor.bytes for tensor in tensors.values()) == plan.tensor_bytes


def test_weights_published_in_mxfp4_are_kept_bit_for_bit_or_rounded_as_a_plan_says(toolchain, tmp_path):
    kept, rounded = "blk.0.ffn_up.weight", "blk.1.ffn_up.weight"
    source = ModelSource(
        name="m",
        weights_digest="w",
        tokenizer_digest="t",
        gguf=write_tiny_gguf(tmp_path / "in.gguf", spread=1.0, mxfp4=[kept, rounded]),
    )
    target = OpenTarget.open(convert(source, tmp_path, toolchain), toolchain)
    assert file_sha256(target.full.path) == file_sha256(source.gguf), "linked, not written in F16"
    assert {kept, rounded} <= target.quantizable.keys()
    types = stock_plan(target, "Q4_K_M").types | {kept: "MXFP4", rounded: "Q2_K"}
    plan = make_plan(target, "p", "budget", {}, types)
    quantized = make(target, plan, tmp_path / "out")
    written = tmp_path / "out" / quantized.file
    stored, nearest = {t.name: t for t in open_gguf(target.full.path).tensors}, NearestRounding(target.full.path)
    for tensor in open_gguf(written).tensors:
        assert (tensor.tensor_type.name == "MXFP4") == (tensor.name == kept)
        if tensor.name == kept:
            assert tensor.data.tobytes() == stored[kept].data.tobytes()
        blocks = nearest.blocks(tensor.name, tensor.tensor_type.name, slice(None))
        assert blocks.tobytes() == tensor.data.tobytes()
    before, after = (read_weights(path, rounded) for path in (target.full.path, written))
    assert 0.005 < np.square(after - before).mean() / np.square(before).mean() < 0.2


@pytest.mark.parametrize("name", SMALL_TYPES)
@pytest.mark.parametrize("width", [256, 96])
def test_predicted_types_and_bytes_are_what_llama_quantize_writes(toolchain, tmp_path, name, width):
    target = OpenTarget.open(write_tiny_gguf(tmp_path / "in.gguf", width=width, hidden=2 * width), toolchain)
    types = {tensor.name: fallback(name, tensor.row_length) for tensor in target.quantizable.values()}
    plan = stock_plan(target, "Q4_K_M").model_copy(
        update={"types": types, "tensor_bytes": planned_bytes(target.tensors, types)}
    )
    make(target, plan, tmp_path / "out")  # its audit fails on any type or byte that differs


def test_types_that_rows_do_not_allow_are_replaced_visibly(toolchain, tmp_path):
    target = OpenTarget.open(write_tiny_gguf(tmp_path / "in.gguf", width=96, hidden=192), toolchain)
    _, substitutions = mixture_types(target.full.path, "Q4_K_M", toolchain)
    swap = substitutions["blk.0.attn_q.weight"]
    assert (swap.requested, swap.used, swap.reason) == ("Q4_K", "Q5_0", "rows of 96 are not a multiple of 256")


def test_the_same_plan_gives_the_same_bytes_and_carries_its_provenance(target, tmp_path):
    plan = stock_plan(target, "Q5_K_M")
    first, second = (make(target, plan, tmp_path / name) for name in ("one", "two"))
    assert first == second
    assert first.sha256 == file_sha256(tmp_path / "two" / second.file)
    metadata = read_metadata(tmp_path / "one" / first.file)
    assert metadata["samq.plan"] == plan.digest()
    assert metadata["samq.model"] == "tiny"


def test_a_plan_of_full_precision_changes_no_weight(target, tmp_path):
    make(target, full_plan(target), tmp_path / "out")
    for name in target.tensors:
        assert (read_weights(tmp_path / "out" / "model.gguf", name) == read_weights(target.full.path, name)).all()


def test_a_type_that_needs_an_importance_matrix_fails_with_the_programs_words(target, tmp_path):
    plan = stock_plan(target, "Q4_K_M")
    types = {**plan.types, "blk.0.ffn_up.weight": "IQ2_XXS"}
    plan = plan.model_copy(update={"types": types, "tensor_bytes": planned_bytes(target.tensors, types)})
    with pytest.raises(ToolError, match=r"llama-quantize failed with exit code 1: .*quantize\.log"):
        make(target, plan, tmp_path / "out")
    assert not (tmp_path / "out" / "model.gguf").exists()


def test_a_plan_takes_the_importance_matrix_that_it_was_made_with_and_no_other(target, tmp_path):
    own, other = HashedFile(tmp_path / "own.gguf", "0" * 64), HashedFile(tmp_path / "other.gguf", "1" * 64)
    plain = stock_plan(target, "Q4_K_M")
    weighted = plain.model_copy(update={"imatrix_sha256": own.sha256})
    check_imatrix(weighted, own)
    for plan, imatrix in ((weighted, None), (weighted, other), (plain, own)):
        with pytest.raises(SamqError, match=r"plan Q4_K_M was made with"):
            make(target, plan, tmp_path / f"{plan.digest()}-{imatrix and imatrix.path.stem}", imatrix=imatrix)


@pytest.mark.parametrize("tied", [False, True])
def test_an_importance_matrix_has_an_entry_for_an_output_tensor_of_its_own(toolchain, tmp_path, tied):
    gguf = write_tiny_gguf(
        tmp_path / "tiny.gguf",
        vocabulary=300,
        tied=tied,
        add_tokenizer=lambda writer: add_byte_tokenizer(writer, byte_tokenizer(), 300),
    )
    matrix = measure_imatrix(gguf, "the hat then the ant. " * 20, tmp_path, toolchain, context_tokens=32)
    # Rows of the embedding are looked up; of an output that is tied to it llama-imatrix keeps nothing.
    quantizable = quantizable_tensors(gguf, toolchain)
    assert usable_entries(matrix, quantizable) == quantizable.keys() - {"token_embd.weight"}
    assert ("output.weight" in usable_entries(matrix, quantizable)) == (not tied)
    values = {tensor.name: tensor.data for tensor in open_gguf(matrix).tensors if tensor.name.endswith(".in_sum2")}
    assert all(value.max() > 0 for value in values.values())


@pytest.mark.parametrize("pre, add_eos, text", [("gpt-2", True, "the hat. " * 40), ("tekken", False, "a" * 60_000)])
def test_llama_imatrix_takes_models_that_end_texts_and_long_runs(toolchain, tmp_path, pre, add_eos, text):
    gguf = write_tiny_gguf(
        tmp_path / "tiny.gguf",
        vocabulary=300,
        width=32,
        hidden=32,
        blocks=1,
        add_tokenizer=lambda writer: add_byte_tokenizer(writer, byte_tokenizer(), 300, pre=pre, add_eos=add_eos),
    )
    matrix = measure_imatrix(gguf, text, tmp_path, toolchain, context_tokens=128)
    measured = {tensor.name.removesuffix(".in_sum2") for tensor in open_gguf(matrix).tensors}
    assert measured >= quantizable_tensors(gguf, toolchain).keys() - {"token_embd.weight"}
    with pytest.raises(SamqError, match=r"characters without a break") if pre == "tekken" else nullcontext():
        measure_imatrix(gguf, text * 20, tmp_path, toolchain, context_tokens=128)


def test_a_full_disk_is_found_before_the_work(target, tmp_path):
    plan = stock_plan(target, "Q4_K_M").model_copy(update={"tensor_bytes": 10**18})
    with pytest.raises(SamqError, match=r"bytes free and Q4_K_M needs 1,020,000,0"):
        make(target, plan, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_provenance_too_long_for_llama_cpp_is_refused(target, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(SamqError, match=r"provenance samq\.model is longer than 127 bytes"):
        quantize(
            target.full.path,
            stock_plan(target, "Q8_0"),
            tmp_path / "out",
            target.toolchain,
            provenance={"model": "x" * 128},
        )


def test_converting_a_full_precision_gguf_keeps_its_bytes_and_a_quantized_one_is_dequantized(target, tmp_path):
    def source(path):
        return ModelSource(name="tiny", weights_digest="w", tokenizer_digest="t", gguf=path)

    for name in ("same", "dequantized"):
        (tmp_path / name).mkdir()
    same = convert(source(target.full.path), tmp_path / "same", target.toolchain)
    assert file_sha256(same) == target.full.sha256
    make(target, stock_plan(target, "Q8_0"), tmp_path / "q8")
    back = convert(source(tmp_path / "q8" / "model.gguf"), tmp_path / "dequantized", target.toolchain)
    assert {tensor.type for tensor in read_tensors(back).values()} == {"F16", "F32"}
    assert set(quantizable_tensors(back, target.toolchain)) == set(target.quantizable)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder_is_one_sentence(target, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir(mode=0o500)
    with pytest.raises(SamqError):
        quantize(target.full.path, stock_plan(target, "Q8_0"), folder, target.toolchain, provenance={})


def test_a_linked_file_is_the_file_that_a_symbolic_link_leads_to(tmp_path):
    for folder in ("blobs", "snapshots", "store"):
        (tmp_path / folder).mkdir()
    (tmp_path / "blobs" / "0a1b").write_bytes(b"GGUF")
    (tmp_path / "snapshots" / "model.gguf").symlink_to("../blobs/0a1b")
    link = tmp_path / "store" / "elsewhere.gguf"
    link_or_copy(tmp_path / "snapshots" / "model.gguf", link)
    assert link.read_bytes() == b"GGUF" and not link.is_symlink()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.inf, r"output\.weight of odd has weights over 65504, which F16 cannot hold; set model\.precision to BF16"),
        (np.nan, r"output\.weight of odd holds NaN or infinity; get the model again"),
    ],
)
def test_a_model_that_is_not_finite_is_not_converted(toolchain, tmp_path, value, message):
    path = write_tiny_gguf(tmp_path / "odd.gguf")
    (output,) = [tensor for tensor in open_gguf(path).tensors if tensor.name == "output.weight"]
    content = bytearray(path.read_bytes())
    content[output.data_offset : output.data_offset + 2] = np.float16(value).tobytes()
    path.write_bytes(content)
    (tmp_path / "out").mkdir()
    source = ModelSource(name="odd", weights_digest="w", tokenizer_digest="t", gguf=path)
    with pytest.raises(SamqError, match=message):
        convert(source, tmp_path / "out", toolchain)
