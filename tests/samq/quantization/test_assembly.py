import pytest

from samq.allocation.ladder import Ladder, make_rung, rung_names, uniform_plan
from samq.allocation.target import OpenTarget, full_plan, stock_plan
from samq.errors import SamqError
from samq.gguf.file import file_sha256, read_metadata
from samq.llamacpp.programs import planned_bytes, quantize
from samq.quantization.assembly import assemble
from tests.conftest import write_tiny_gguf
from tests.samq.tiny_imatrix import write_tiny_imatrix

PROVENANCE = {"model": "tiny", "version": "1"}


def make_ladder(target, folder, types):
    rungs = {}
    for name in rung_names(target.quantizable.values(), types, imatrix=target.imatrix is not None):
        (folder / name).mkdir(parents=True)
        model = make_rung(target, name, folder / name, provenance={"model": "tiny"})
        rungs[name] = folder / name / model.file
    return Ladder(target.full.path, rungs)


@pytest.fixture(scope="module", params=[True, False], ids=["importance matrix", "no importance matrix"])
def weighted(request):
    return request.param


@pytest.fixture(scope="module", params=[256, 96], ids=["K types fit", "K types fall back"])
def target(request, weighted, toolchain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    gguf = write_tiny_gguf(folder / "tiny-f16.gguf", width=request.param, hidden=2 * request.param)
    return OpenTarget.open(gguf, toolchain, write_tiny_imatrix(folder / "imatrix.gguf", gguf) if weighted else None)


@pytest.fixture(scope="module")
def ladder(target, tmp_path_factory):
    return make_ladder(target, tmp_path_factory.mktemp("ladder"), ["Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q8_0"])


def mixed(target, ladder, shift):
    """A plan in which neighbouring tensors have different types, full precision among them."""
    sources = ladder.sources()
    types = {}
    for index, name in enumerate(target.quantizable):
        kinds = list(sources[name])
        types[name] = kinds[(index + shift) % len(kinds)]
    return stock_plan(target, "Q5_K_S").model_copy(
        update={"types": types, "tensor_bytes": planned_bytes(target.tensors, types)}
    )


def make_both(target, ladder, plan, folder):
    """The plan's file, assembled and by llama-quantize."""
    for name in ("assembled", "quantized"):
        (folder / name).mkdir()
    assembled = assemble(ladder, plan, folder / "assembled", provenance=PROVENANCE)
    quantized = quantize(
        target.full.path, plan, folder / "quantized", target.toolchain, provenance=PROVENANCE, imatrix=target.imatrix
    )
    assert assembled == quantized
    return [folder / name / assembled.file for name in ("assembled", "quantized")]


@pytest.mark.parametrize("shift", range(3))
def test_an_assembled_file_is_the_one_llama_quantize_writes(target, weighted, ladder, tmp_path, shift):
    assembled, quantized = make_both(target, ladder, mixed(target, ladder, shift), tmp_path)
    assert file_sha256(assembled) == file_sha256(quantized)
    of_matrix = [key for key in read_metadata(assembled) if key.startswith("quantize.imatrix.")]
    assert len(of_matrix) == (4 if weighted else 0)


def test_full_precision_is_assembled_from_the_source(target, ladder, tmp_path):
    make_both(target, ladder, full_plan(target), tmp_path)


def test_a_type_that_no_rung_has_is_an_error(target, ladder, tmp_path):
    plan = full_plan(target)
    name = next(iter(plan.types))
    with pytest.raises(SamqError, match=f"{name} .* wants Q6_K; add that rung"):
        assemble(ladder, plan.model_copy(update={"types": plan.types | {name: "Q6_K"}}), tmp_path, provenance={})


def test_a_rung_cut_short_leaves_no_model(target, ladder, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(ladder.rungs["Q8_0"].read_bytes()[:-4096])
    (tmp_path / "out").mkdir()
    with pytest.raises(SamqError, match="shorter than its header says"):
        assemble(Ladder(ladder.gguf, {"Q8_0": cut}), uniform_plan(target, "Q8_0"), tmp_path / "out", provenance={})
    assert not (tmp_path / "out" / "model.gguf").exists()


def test_an_alignment_that_says_what_it_is_anyway_is_kept(toolchain, tmp_path):
    source = write_tiny_gguf(tmp_path / "tiny.gguf", add_tokenizer=lambda writer: writer.add_custom_alignment(32))
    target = OpenTarget.open(source, toolchain)
    make_both(target, make_ladder(target, tmp_path / "ladder", ["Q8_0"]), uniform_plan(target, "Q8_0"), tmp_path)


@pytest.mark.parametrize("alignment", [16, 256])
def test_an_alignment_that_llama_quantize_would_break_is_refused(toolchain, tmp_path, alignment):
    source = write_tiny_gguf(
        tmp_path / "tiny.gguf", add_tokenizer=lambda writer: writer.add_custom_alignment(alignment)
    )
    with pytest.raises(
        SamqError, match=f"aligned to {alignment} bytes and llama-quantize writes 32 only; make the GGUF"
    ):
        make_ladder(OpenTarget.open(source, toolchain), tmp_path / "ladder", ["Q8_0"])


def test_two_assemblies_are_one_file(target, ladder, tmp_path):
    plan = mixed(target, ladder, 1)
    files = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        model = assemble(ladder, plan, tmp_path / name, provenance=PROVENANCE)
        files.append(file_sha256(tmp_path / name / model.file))
        assert files[-1] == model.sha256
    assert len(set(files)) == 1
