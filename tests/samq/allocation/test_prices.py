from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, dequantize
from gguf.quants import quantize as quantize_by_numpy

from samq.allocation.budget import Budget, BudgetPolicy, budget_plan
from samq.allocation.price_rows import SAMPLED_ROWS
from samq.allocation.prices import lengthened, plan_cost, predicted_cost, price_table, sequences_wanted
from samq.allocation.target import OpenTarget
from samq.allocation.types import legal_types, types_to_price, uniform_plan
from samq.errors import SamqError
from samq.gguf.file import HashedFile, read_tensors, read_weights
from samq.llamacpp.quantize import quantize
from samq.records import Metric, SensitivityMap, TensorSensitivity
from samq.sensitivity.fisher import Fisher
from tests.conftest import write_stacked_gguf, write_tiny_gguf
from tests.samq.tiny_imatrix import write_tiny_imatrix

Q8_0 = GGMLQuantizationType.Q8_0
TYPES = ("Q2_K", "IQ4_XS", "Q4_K", "Q6_K", "Q8_0")


@pytest.fixture(scope="module", params=[256, 96], ids=["K types fit", "K types fall back"])
def target(request, toolchain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    return OpenTarget.open(
        write_tiny_gguf(folder / "tiny.gguf", width=request.param, hidden=2 * request.param), toolchain
    )


@pytest.fixture(scope="module")
def rounded(target, tmp_path_factory):
    """Tensor -> type -> a file of llama-quantize with the tensor in that type, full precision included."""
    files = {name: {"F16": target.full.path} for name in target.quantizable}
    for name in types_to_price(target, TYPES):
        folder = tmp_path_factory.mktemp("uniform")
        model = quantize(target.full.path, uniform_plan(target, name), folder, target.toolchain, provenance={})
        for tensor in target.quantizable:
            files[tensor].setdefault(model.types[tensor], folder / model.file)
    return files


def price(target, sensitivity=None, fisher=None, types=TYPES, **arguments):
    legal = legal_types(target, types_to_price(target, types))
    return price_table(
        target,
        legal,
        sensitivity or sensitivity_of(target),
        fisher_of(target) if fisher is None else fisher,
        **arguments,
    )


def sensitivity_of(target):
    tensors = {
        name: TensorSensitivity(
            shape=tensor.shape, gradient_norm=1.0, gradient_norm_stderr=0.1, score=1.0, sequence_squares=(1.0, 2.0, 5.0)
        )
        for name, tensor in target.quantizable.items()
    }
    return SensitivityMap(
        model_digest="m", calibration_digest="c", labels="model", seed=0, sequence_tokens=(10, 20, 20), loss_nats=1.0,
        tied_embeddings=False, tensors=tensors,
    )  # fmt: skip


def fisher_of(target, seed=None):
    """Random, or that of weights which all matter alike."""
    random = np.random.default_rng(seed)
    fisher = {}
    for name, tensor in target.quantizable.items():
        rows, columns = ((random.random(n) if seed else np.ones(n)).astype(np.float32) for n in tensor.shape)
        fisher[name] = Fisher(rows, columns * (rows.mean() / columns.mean()))
    return fisher


def test_prices_are_half_the_fisher_times_the_squared_rounding_error_of_llama_quantize(target, rounded):
    fisher = fisher_of(target, seed=1)
    table = price(target, fisher=fisher)
    for name, files in rounded.items():
        assert table.tensors[name].types.keys() == files.keys()
        assert table.tensors[name].types["F16"].kl_nats == 0
        weights = np.outer(fisher[name].rows, fisher[name].columns) / fisher[name].rows.mean()
        for kind, path in files.items():
            change = read_weights(path, name).astype(float) - read_weights(target.full.path, name)
            assert table.tensors[name].types[kind].kl_nats == pytest.approx((weights * change**2).sum() / 2, rel=1e-5)


def test_a_types_change_of_length_is_the_part_of_its_errors_along_the_weights(target, rounded):
    table = price(target)
    along, squares = Counter(), Counter()
    for name, files in rounded.items():
        for kind in files.keys() - {"F16"}:
            weights = read_weights(target.full.path, name).astype(float)
            along[kind] += ((read_weights(files[kind], name) - weights) * weights).sum()
            squares[kind] += (weights**2).sum()
    assert table.length_changes == pytest.approx(
        {kind: along[kind] / squares[kind] for kind in squares}, rel=1e-4, abs=1e-6
    )


def test_a_type_that_lengthens_weights_is_named_where_a_plan_uses_it(tiny_gguf, toolchain):
    target, types = OpenTarget.open(tiny_gguf, toolchain), ("Q2_K", "IQ3_S", "Q4_K")
    table = price(target, types=types)
    assert table.length_changes["Q2_K"] < -0.01 < table.length_changes["Q4_K"] < 0.01 < table.length_changes["IQ3_S"]
    assert {name: lengthened(table, uniform_plan(target, name)) for name in types} == {
        "Q2_K": {},
        "IQ3_S": {"IQ3_S": table.length_changes["IQ3_S"]},
        "Q4_K": {},
    }


def test_the_threads_and_the_size_of_parts_change_nothing_but_roundings(target, monkeypatch):
    one, again = price(target), price(target)
    assert one == again
    monkeypatch.setattr("samq.allocation.price_rows._PART_WEIGHTS", 2000)
    for name, tensor in price(target).tensors.items():
        for kind, cost in tensor.types.items():
            assert cost.kl_nats == pytest.approx(one.tensors[name].types[kind].kl_nats, rel=1e-5)


@pytest.mark.slow
def test_a_sample_of_rows_gives_nearly_the_price_of_all(tmp_path, toolchain, monkeypatch):
    target = OpenTarget.open(
        write_tiny_gguf(tmp_path / "tiny.gguf", width=256, hidden=4096, vocabulary=8192), toolchain
    )
    fisher, sensitivity = fisher_of(target, seed=1), sensitivity_of(target)
    exact = price(target, sensitivity, fisher)
    monkeypatch.setattr("samq.allocation.price_rows.LARGEST_WITHOUT_SAMPLE", 2**19)
    monkeypatch.setattr("samq.allocation.price_rows.SAMPLED_WEIGHTS", 2**16)
    sampled, differ = price(target, sensitivity, fisher), set()
    assert sampled.length_changes == pytest.approx(exact.length_changes, rel=0.05, abs=1e-4)
    for name, tensor in exact.tensors.items():
        for kind, cost in tensor.types.items():
            estimate = sampled.tensors[name].types[kind]
            assert estimate.bytes == cost.bytes
            assert estimate.kl_nats == pytest.approx(cost.kl_nats, rel=0.01)
            if estimate.kl_nats != cost.kl_nats:
                differ.add(name)
    large = {name for name, tensor in target.quantizable.items() if tensor.weights > 2**19}
    assert differ == {name for name in large if target.quantizable[name].shape[0] > SAMPLED_ROWS}
    assert set() < differ < large


def test_stacked_experts_are_priced_each_by_its_own_columns(tmp_path, monkeypatch):
    random = np.random.default_rng(2)
    name, weights = "blk.0.ffn_up_exps.weight", random.standard_normal((3, 10, 64)).astype(np.float16)
    writer = GGUFWriter(tmp_path / "full.gguf", "llama")
    writer.add_tensor(name, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    products = random.random((3, 10, 1)) * random.random((3, 1, 64))
    fisher = Fisher(products.mean(axis=-1).astype(np.float32), products.mean(axis=-2).astype(np.float32))
    target = SimpleNamespace(
        quantizable=read_tensors(tmp_path / "full.gguf"), full=HashedFile(tmp_path / "full.gguf", ""), imatrix=None
    )
    # several parts an expert, the last of them shorter
    monkeypatch.setattr("samq.allocation.price_rows._PART_WEIGHTS", 4 * 64)
    table = price_table(target, {name: ["Q8_0"]}, sensitivity_of(target), {name: fisher})
    rounded = dequantize(quantize_by_numpy(weights.astype(np.float32), Q8_0), Q8_0)
    change = rounded - weights.astype(float)
    assert table.tensors[name].types["Q8_0"].kl_nats == pytest.approx((products * change**2).sum() / 2, rel=1e-5)
    assert table.length_changes["Q8_0"] == pytest.approx((change * weights).sum() / (weights**2).sum(), abs=1e-7)


def test_experts_that_saw_few_tokens_are_counted(toolchain, tmp_path):
    name, other = "blk.0.ffn_gate_exps.weight", "blk.0.ffn_down_exps.weight"
    full = write_stacked_gguf(tmp_path / "full.gguf", GGMLQuantizationType.F16)

    def few(sums, counts):
        counts[:, 0] = 64, 63, 2

    def many(sums, counts):
        counts[:] = 1000

    imatrix = write_tiny_imatrix(tmp_path / "imatrix.gguf", full, changed={name: few, other: many})
    target = OpenTarget.open(full, toolchain, imatrix)
    fisher = {
        tensor: Fisher(np.ones(info.shape[:-1], np.float32), np.ones((*info.shape[:-2], info.row_length), np.float32))
        for tensor, info in target.quantizable.items()
    }
    assert price(target, fisher=fisher).scarce_experts == {name: {1: 63, 2: 2}}
    rows = fisher[other].rows.copy()
    rows[0] = 0
    fisher[other] = Fisher(rows, fisher[other].columns)
    assert price(target, fisher=fisher).scarce_experts == {name: {1: 63, 2: 2}}, "the gate has a gradient"
    rows = fisher[name].rows.copy()
    rows[0] = 0
    fisher[name] = Fisher(rows, fisher[name].columns)
    assert price(target, fisher=fisher).scarce_experts == {name: {0: 0, 1: 63, 2: 2}, other: {0: 0}}
    without = OpenTarget.open(full, toolchain)
    assert price(without, fisher=fisher).scarce_experts == {name: {0: 0}, other: {0: 0}}


def test_a_plan_costs_the_sum_of_its_prices(target):
    table = price(target)
    kinds = {
        name: max(prices.types, key=lambda kind, p=prices: p.types[kind].kl_nats)
        for name, prices in table.tensors.items()
    }
    cost = plan_cost(table, kinds)
    assert cost.value == pytest.approx(sum(table.tensors[name].types[kind].kl_nats for name, kind in kinds.items()))
    # Sequences of 20, 40 and 40 % of the tokens bring 1/8, 2/8 and 5/8 of the cost.
    residuals = np.array([1 / 8 - 0.2, 2 / 8 - 0.4, 5 / 8 - 0.4])
    assert cost.stderr == pytest.approx(cost.value * np.sqrt(3 / 2 * (residuals**2).sum()))
    assert cost.n == 3
    with pytest.raises(SamqError, match=r"no price for .* in IQ1_S"):
        plan_cost(table, kinds | {"output.weight": "IQ1_S"})


def test_fisher_of_another_shape_is_an_error(target):
    fisher = {name: Fisher(np.ones(1, np.float32), np.ones(1, np.float32)) for name in target.quantizable}
    with pytest.raises(SamqError, match=r"is of \(1, 1\) weights, not .*; calibrate the model of this GGUF"):
        price(target, fisher=fisher)
    with pytest.raises(
        SamqError,
        match=r"100 % of the GGUF's weights cannot be told .*; give the sensitivities that `samq calibrate` measured",
    ):
        price(target, fisher={})


def test_a_tensor_that_was_not_measured_is_safe_and_seems_to_cost_nothing(target):
    name = "blk.0.ffn_up.weight"
    sensitivity, fisher = sensitivity_of(target), fisher_of(target)
    others = {other: tensor for other, tensor in sensitivity.tensors.items() if other != name}
    table = price(
        target,
        sensitivity.model_copy(update={"tensors": others}),
        {other: tensor for other, tensor in fisher.items() if other != name},
    )
    assert {kind: price.kl_nats for kind, price in table.tensors[name].types.items()} == {"F16": 0.0, "Q8_0": 0.0}
    least = sum(min(price.bytes for price in prices.types.values()) for prices in table.tensors.values())
    fixed = sum(tensor.bytes for other, tensor in target.tensors.items() if other not in target.quantizable)
    plan = budget_plan(target, table, Budget("5bpw", int(1.1 * (least + fixed))), BudgetPolicy())
    assert plan.types[name] == "Q8_0" and plan.predicted_kl_nats > 0
    assert predicted_cost(table, plan) == plan_cost(table, plan.types)
    assert predicted_cost(table, plan.model_copy(update={"types": {**plan.types, name: "Q4_K"}})) is None


def test_the_type_of_tensors_that_were_not_measured_can_be_chosen(target):
    name, sensitivity, fisher = "blk.0.ffn_up.weight", sensitivity_of(target), fisher_of(target)
    others = {other: tensor for other, tensor in sensitivity.tensors.items() if other != name}
    table = price(
        target,
        sensitivity.model_copy(update={"tensors": others}),
        fisher,
        unmeasured="Q5_0",
    )
    assert table.tensors[name].types.keys() == {"F16", "Q5_0"}


def test_a_plan_with_a_type_that_is_not_priced_has_no_prediction(target):
    table = price(target)
    plan = uniform_plan(target, "Q8_0")
    assert predicted_cost(table, plan) == plan_cost(table, plan.types)
    assert predicted_cost(table, uniform_plan(target, "Q5_1")) is None


def test_more_sequences_are_wanted_until_the_least_known_cost_is_known():
    precise, noisy = Metric(value=1.0, stderr=0.05, n=20), Metric(value=2.0, stderr=0.4, n=20)
    enough = {"precision": 0.1, "measured": 20, "available": 1000}
    assert sequences_wanted([precise], **enough) == 20
    # twice the error takes four times as many, and a tenth
    assert sequences_wanted([precise, noisy], **enough) == 88
    assert sequences_wanted([Metric(value=0.0, stderr=0.0, n=20)], **enough) == 20
    assert sequences_wanted([], **enough) == 20


@pytest.mark.parametrize(
    ("error", "available", "count"),
    [(0.4, 50, 50), (0.4, 22, 22), (0.4, 21, 20), (0.4, 20, 20), (0.2001, 1000, 23), (0.19, 1000, 20)],
)
def test_sequences_come_two_at_least_at_a_time_and_no_more_than_there_are(error, available, count):
    cost = Metric(value=2.0, stderr=error, n=20)
    assert sequences_wanted([cost], precision=0.1, measured=20, available=available) == count
    assert sequences_wanted([Metric(value=2.0, stderr=0.2001, n=2)], precision=0.1, measured=2, available=99) == 4
