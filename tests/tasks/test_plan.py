"""What the planning stage says of the plans that it makes."""

import pytest

from samq.allocation.budget import BudgetPolicy, why_doubted
from samq.files import GGUF_NAME, PRICES_NAME
from samq.gguf.file import file_sha256
from samq.gguf.formats import tensor_bytes
from samq.llamacpp.quantize import quantizable_tensors
from samq.records import Price, PriceTable, TensorPrices
from samq.store import Store
from samq.workspace import Workspace
from tasks.plan import load_plan, plan_budget
from tasks.price import load_prices
from tasks.target import Target
from tests.conftest import write_tiny_gguf


@pytest.mark.parametrize(("nats", "longer", "doubted"), [(0.1, 0.0, False), (1.0, 0.0, True), (0.1, 0.02, True)])
def test_a_plan_whose_prediction_fails_is_doubted_in_the_log_when_it_is_made_and_not_again(
    tmp_path, toolchain, caplog, nats, longer, doubted
):
    store = Store(tmp_path / "store")
    with store.publish("convert", "k") as folder:
        gguf = write_tiny_gguf(folder / GGUF_NAME)
        tensors = quantizable_tensors(gguf, toolchain)
        digest = file_sha256(gguf)
    with store.publish("price", "k") as folder:
        PriceTable(
            gguf_sha256=digest,
            map_digest="map",
            imatrix_sha256=None,
            sequence_tokens=(10, 10),
            tensors={
                name: TensorPrices(
                    types={"Q4_K": Price(bytes=tensor_bytes("Q4_K", tensor.shape), kl_nats=nats / len(tensors))},
                    shares=(0.5, 0.5),
                )
                for name, tensor in tensors.items()
            },
            length_changes={"Q4_K": longer},
        ).save(folder / PRICES_NAME)
    full, prices = store.find("convert", "k"), store.find("price", "k")
    at, target = Workspace(store.root, toolchain), Target(full, imatrix=None)
    plans = [plan_budget(at, target, prices, "5bpw", BudgetPolicy()) for _ in range(2)]
    assert plans[0] == plans[1]
    warnings = [record.getMessage() for record in caplog.records if record.name == "samq.plan"]
    assert warnings == ([f"samq-5bpw: {why_doubted(load_plan(plans[0]), load_prices(prices))}"] if doubted else [])
