"""What calibration does before its own bar shows anything."""

from samq.llamacpp.toolchain import find_toolchain
from samq.sensitivity.checkpoint import describe_source
from samq.store import Store
from samq.workspace import Workspace
from tasks.model import TorchModel
from tests.tiny_models import save_folder, tiny_llama, write_llama_gguf


def test_loading_a_model_and_comparing_it_with_its_gguf_are_seen_on_the_terminal(tmp_path, terminal):
    model, store = tiny_llama(), Store(tmp_path / "store")
    with store.publish("convert", "k") as folder:
        write_llama_gguf(model, folder / "model.gguf")
    source = describe_source(save_folder(model, tmp_path / "tiny"))
    at = Workspace(store.root, find_toolchain(), "cpu")
    _, layout = TorchModel(source, store.find("convert", "k")).load_with_layout(at)
    parameters, weights = len(list(model.parameters())), len(layout.weights)
    assert sum(weight.view.rows is not None for weight in layout.weights) == 4 and weights < parameters
    load, compare = (
        [line for line in terminal.getvalue().splitlines() if what in line]
        for what in ("load tiny", "compare tiny with its GGUF")
    )
    assert f"{parameters}/{parameters}" in load[-1]
    assert f"{weights}/{weights}" in compare[-1]
