import itertools
import math

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from samq.allocation.prediction_check import RoundedPlan, check_prediction
from samq.errors import SamqError
from samq.gguf.file import read_tensors, read_weights
from samq.gguf.formats import fits
from samq.records import Metric, Plan
from samq.sensitivity.batches import batches
from samq.sensitivity.layout import GgufLayout, Weight, weights_of
from samq.sensitivity.loss import Labelling
from samq.sensitivity.measure import Origin, measure_sensitivity
from samq.sensitivity.views import View, rotary_row_order
from tests.tiny_models import names_of, random_tokens, tiny_gpt2, tiny_llama, tiny_mixtral

MODELS = {
    "untied llama": (tiny_llama, "llama"),
    "tied llama": (lambda: tiny_llama(tied=True), "llama"),
    "mixtral": (tiny_mixtral, "llama"),
    "gpt2": (tiny_gpt2, "gpt2"),
}
PREDICTED = Metric(value=0.5, stderr=0.1, n=7)


def write_gguf(path, tensors, types):
    """Name -> float32 values, in the types given, or F16; rounded by the gguf package."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, values in tensors.items():
        kind = GGMLQuantizationType[types.get(name, "F16")]
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def plan_of(types):
    return Plan(
        name="mixed", policy="uniform", parameters={}, types=types, tensor_bytes=1, weights=1, gguf_sha256="0" * 64
    )


def quantized(model, folder, kinds, architecture="llama"):
    """The arguments of `check` for a plan that gives tensors `kinds` in turn, where their rows allow it."""
    config = model.config
    heads = {"attn_q.weight": config.num_attention_heads, "attn_k.weight": getattr(config, "num_key_value_heads", 0)}
    weights = [
        Weight(weight.name, weight.parameter, View(rows=rotary_row_order(weight.shape[0], heads[kind])))
        if (kind := weight.name.split(".", 2)[-1]) in heads
        else weight
        for weight in weights_of(model, names_of(model, architecture))
    ]
    tensors = {weight.name: weight.view(weight.parameter.detach()).numpy() for weight in weights}
    types = {
        name: kind if fits(kind, values.shape[-1]) else "F16"
        for (name, values), kind in zip(tensors.items(), itertools.cycle(kinds))
    }
    return dict(
        plan=plan_of(types),
        predicted=PREDICTED,
        weights=weights,
        original=write_gguf(folder / "original.gguf", tensors, {}),
        rounded=write_gguf(folder / "rounded.gguf", tensors, types),
    )


def check(model, tokens, *, plan, predicted, weights, original, rounded, **arguments):
    rounded_plan, layout = RoundedPlan(plan, predicted, original, rounded), GgufLayout(weights)
    return check_prediction(model, tokens, rounded_plan, layout, **arguments)


def changes(arguments):
    """Name -> rounding error."""
    original, rounded = arguments["original"], arguments["rounded"]
    return {
        name: torch.from_numpy(read_weights(rounded, name).astype(float) - read_weights(original, name))
        for name in arguments["plan"].types
    }


def costs_by_autograd(model, tokens, arguments, seed=0):
    """(figure, sequence): additive, by tensor and joint cost, the plain way."""
    weights, change = arguments["weights"], changes(arguments)
    costs = []
    for number, (ids, _, _) in enumerate(batches(tokens, 1)):
        logits = model(input_ids=ids).logits[0, :-1]
        sums = torch.softmax(logits.detach(), dim=-1).cumsum(-1, dtype=torch.float64)
        stream = np.random.default_rng(np.random.SeedSequence((seed, number), spawn_key=(1,)))
        labels = torch.searchsorted(sums, torch.from_numpy(stream.random(len(sums)))[:, None])[:, 0]
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        products = [weight.view(weight.parameter.grad) * change[weight.name] for weight in weights]
        dots = torch.stack([product.sum() for product in products])
        squares = sum((product**2).sum() for product in products)
        costs.append([squares / 2, (dots**2).sum() / 2, dots.sum() ** 2 / 2])
    return np.array(costs).T


@pytest.mark.parametrize(
    ("kind", "batch_size"), [*((kind, 1) for kind in MODELS), ("untied llama", 4), ("tied llama", 4)]
)
def test_the_figures_are_those_of_autograd(kind, batch_size, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "samq.sensitivity.weight_gradients.BAND_WEIGHTS", 200
    )  # several bands even for these small weights
    make, architecture = MODELS[kind]
    model, tokens = make(), random_tokens(lengths=(12, 5, 9, 2, 12, 7))
    arguments = quantized(model, tmp_path, ["Q4_0", "F16", "Q8_0"], architecture)
    figures = check(model, tokens, **arguments, batch_size=batch_size)
    expected = costs_by_autograd(model, tokens, arguments).sum(axis=1) / figures.tokens
    assert figures.additive.value == pytest.approx(expected[0], rel=1e-4)
    assert figures.by_tensor.value == pytest.approx(expected[1], rel=1e-4)
    assert figures.joint.value == pytest.approx(expected[2], rel=1e-4)
    assert min(expected) > 0 and len(set(expected)) == 3


def test_the_check_says_what_it_was_made_on(tmp_path):
    model, tokens = tiny_llama(), random_tokens()
    arguments = quantized(model, tmp_path, ["Q4_0"])
    seen = []
    figures = check(model, tokens, **arguments, batch_size=2, progress=lambda *done: seen.append(done))
    assert (figures.plan, figures.plan_digest) == ("mixed", arguments["plan"].digest())
    assert (figures.samples, figures.tokens, figures.predicted) == (5, 35, PREDICTED)
    assert figures.additive.n == figures.by_tensor.n == figures.joint.n == 5
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_standard_errors_of_sequences_of_one_length_are_those_of_a_mean(tmp_path):
    model, tokens = tiny_llama(), random_tokens(lengths=(9,) * 6)
    arguments = quantized(model, tmp_path, ["Q4_0"])
    figures = check(model, tokens, **arguments)
    costs = costs_by_autograd(model, tokens, arguments) / 8
    errors = costs.std(axis=1, ddof=1) / math.sqrt(6)
    assert [figures.additive.stderr, figures.by_tensor.stderr, figures.joint.stderr] == pytest.approx(errors, rel=1e-3)


def test_two_checks_are_identical_and_another_seed_draws_other_labels(tmp_path):
    model, tokens = tiny_llama(), random_tokens()
    arguments = quantized(model, tmp_path, ["Q4_0"])
    one, two, other = (check(model, tokens, **arguments, seed=seed) for seed in (0, 0, 1))
    assert one == two
    assert other.additive.value != pytest.approx(one.additive.value, rel=1e-3)


def test_labels_are_not_the_calibrations(tmp_path):
    model, tokens = tiny_llama(), random_tokens()
    arguments = quantized(model, tmp_path, ["Q4_0"])
    _, fisher = measure_sensitivity(
        model,
        tokens,
        GgufLayout(arguments["weights"]),
        Origin("model", "text"),
        labelling=Labelling("model"),
    )
    calibrated = sum(
        (fisher[name].rows[:, None] * fisher[name].profile() * change.numpy() ** 2).sum() / 2
        for name, change in changes(arguments).items()
    )
    figures = check(model, tokens, **arguments)
    assert figures.additive.value != pytest.approx(calibrated, rel=1e-3)


def test_a_plan_that_changes_nothing_costs_nothing(tmp_path):
    model = tiny_llama()
    figures = check(model, random_tokens(), **quantized(model, tmp_path, ["F16"]))
    assert figures.additive == figures.by_tensor == figures.joint == Metric(value=0, stderr=0, n=5)


def test_the_joint_form_is_the_divergence_of_a_small_change(tmp_path):
    model, tokens = tiny_llama(), random_tokens(lengths=(24,) * 400)
    arguments = quantized(model, tmp_path, ["Q8_0"])
    figures = check(model, tokens, **arguments, batch_size=50)
    ids = torch.from_numpy(tokens.ids.astype(np.int64))
    change = changes(arguments)
    with torch.no_grad():
        before = torch.log_softmax(model(input_ids=ids).logits[:, :-1].double(), dim=-1)
        for weight in arguments["weights"]:
            rows = slice(None) if weight.view.rows is None else weight.view.rows
            weight.parameter[rows] += change[weight.name]
        after = torch.log_softmax(model(input_ids=ids).logits[:, :-1].double(), dim=-1)
    measured = (before.exp() * (before - after)).sum(-1).mean().item()
    assert figures.joint.stderr < 0.1 * measured
    assert figures.joint.value == pytest.approx(measured, abs=3 * figures.joint.stderr)
    assert 0.75 < measured / figures.by_tensor.value < 1.33
    assert 0.75 < measured / figures.additive.value < 1.33


def test_one_sequence_is_too_few(tmp_path):
    model = tiny_llama()
    with pytest.raises(SamqError, match="at least 2 sequences, not 1"):
        check(model, random_tokens(lengths=(5,)), **quantized(model, tmp_path, ["Q8_0"]))


@pytest.mark.parametrize("which", ["original", "rounded"])
def test_a_gguf_of_another_model_is_named(which, tmp_path):
    model = tiny_llama()
    arguments = quantized(model, tmp_path, ["Q8_0"])
    tensors = {name: read_weights(arguments[which], name) for name in read_tensors(arguments[which])}
    types = arguments["plan"].types if which == "rounded" else {}
    output = tensors.pop("output.weight")
    arguments[which] = write_gguf(tmp_path / "tied.gguf", tensors, types)
    with pytest.raises(SamqError, match=r"output\.weight is \(64, 32\) in torch, but .*tied\.gguf has no such tensor"):
        check(model, random_tokens(), **arguments)
    arguments[which] = write_gguf(tmp_path / "small.gguf", tensors | {"output.weight": output[:48]}, types)
    with pytest.raises(SamqError, match=r"output\.weight is \(64, 32\) in torch, but .*small\.gguf has \(48, 32\)"):
        check(model, random_tokens(), **arguments)


def test_a_gguf_of_another_plan_is_named(tmp_path):
    model = tiny_llama()
    arguments = quantized(model, tmp_path, ["Q8_0"])
    types = arguments["plan"].types
    with pytest.raises(SamqError, match=r"output\.weight is Q8_0 in .*rounded\.gguf and Q4_0 in plan mixed"):
        check(model, random_tokens(), **arguments | {"plan": plan_of(types | {"output.weight": "Q4_0"})})
    with pytest.raises(SamqError, match=r"plan mixed names blk\.2\.ffn_up\.weight, which the model in torch lacks"):
        check(model, random_tokens(), **arguments | {"plan": plan_of({"blk.2.ffn_up.weight": "Q8_0"})})


def test_a_damaged_gguf_is_named(tmp_path):
    model = tiny_llama()
    arguments = quantized(model, tmp_path, ["Q8_0"])
    tensors = {name: read_weights(arguments["original"], name) for name in arguments["plan"].types}
    tensors["blk.0.ffn_up.weight"][3] = math.nan
    with np.errstate(invalid="ignore"):
        arguments["rounded"] = write_gguf(tmp_path / "damaged.gguf", tensors, arguments["plan"].types)
    with pytest.raises(SamqError, match=r"blk\.0\.ffn_up\.weight in .*damaged\.gguf holds NaN or Inf"):
        check(model, random_tokens(), **arguments)


def test_a_damaged_model_is_named_with_the_sequence(tmp_path):
    model = tiny_llama()
    arguments = quantized(model, tmp_path, ["Q8_0"])
    with torch.no_grad():
        model.lm_head.weight[3, 4] = math.nan
    with pytest.raises(SamqError, match=r"loss of check sequence 0 is nan: output\.weight holds NaN or Inf"):
        check(model, random_tokens(), **arguments)
