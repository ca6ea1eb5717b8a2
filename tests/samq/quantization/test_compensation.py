import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from samq.allocation.target import OpenTarget, make_plan
from samq.allocation.types import uniform_plan
from samq.errors import SamqError
from samq.gguf.codes import GROUP, TYPES_WITH_CODES, CodeGrid, read_codes, read_grid, write_codes
from samq.gguf.file import open_gguf, read_weights
from samq.gguf.nearest import NearestRounding
from samq.quantization import gptq
from samq.quantization.compensated_file import PlannedFile
from samq.quantization.compensation import compensated_prices, expected_errors, write_compensated
from samq.quantization.gptq import Compensator, cholesky_upper_, invert_upper_
from samq.records import Price, PriceTable, TensorPrices
from samq.sensitivity.moments import Moments, Piece
from tests.conftest import write_stacked_gguf, write_tiny_gguf

DAMPING = 0.01


def random_gram(size, seed=0, correlation=0.9):
    """Of inputs that follow one another, some larger than others."""
    random = np.random.default_rng(seed)
    distance = np.abs(np.subtract.outer(np.arange(size), np.arange(size)))
    scale = random.uniform(0.5, 2, size)
    return correlation**distance * np.outer(scale, scale)


@pytest.fixture(scope="module")
def target(toolchain, tmp_path_factory):
    return OpenTarget.open(write_tiny_gguf(tmp_path_factory.mktemp("full") / "tiny.gguf"), toolchain)


@pytest.fixture(scope="module")
def pieces(target):
    """The moments of all inputs but the embedding's and one; queries, keys and values share one."""
    sharing = {}
    for name in target.quantizable:
        if name not in ("token_embd.weight", "blk.1.ffn_up.weight"):
            sharing.setdefault(name.replace("attn_k", "attn_q").replace("attn_v", "attn_q"), []).append(name)
    return [
        Piece(
            seed,
            [Moments(tuple(names), 10, torch.tensor(random_gram(target.quantizable[key].row_length, seed)).float())],
        )
        for seed, (key, names) in enumerate(sorted(sharing.items()))
    ]


def gram_of(pieces, name):
    return next((m.gram for piece in pieces for m in piece.moments if name in m.tensors), None)


def compensate(target, plans, pieces, folder, everything=True, devices=()):
    """Name -> (file, errors)."""
    folder.mkdir(exist_ok=True)
    files = {
        name: PlannedFile.create(folder / f"{name}.gguf", target.full.path, plan, {}) for name, plan in plans.items()
    }
    rounding = NearestRounding(target.full.path)
    errors = write_compensated(
        files, rounding, rounding, pieces, folder / "log", everything=everything, devices=devices
    )
    return {name: (file.path, errors[name].tensors) for name, file in files.items()}


def nearest_of(target, plan, path):
    file, rounding = PlannedFile.create(path, target.full.path, plan, {}), NearestRounding(target.full.path)
    for name in rounding.names:
        file.write(name, 0, rounding.blocks(name, file.types[name], slice(None)))
    return path


@pytest.fixture(scope="module", params=["Q2_K", "Q4_K", "IQ4_XS", "Q8_0"])
def rounded(request, target, pieces, tmp_path_factory):
    """(type, the GGUF with the nearest values, the compensated one, what was said about it)."""
    folder, plan = tmp_path_factory.mktemp("rounded"), uniform_plan(target, request.param)
    nearest = nearest_of(target, plan, folder / "nearest.gguf")
    return request.param, nearest, *compensate(target, {"it": plan}, pieces, folder)["it"]


def values_of(grid, codes):
    scale, offset = (np.repeat(part, GROUP, axis=1) for part in (grid.scale, grid.offset))
    return grid.levels[codes - grid.first] * scale + offset


def output_error(path, target, gram, name):
    change = read_weights(path, name).astype(float) - read_weights(target.full.path, name)
    return np.einsum("ij,jk,ik->i", change, gram.double().numpy(), change)


def tensors_of(path):
    return {tensor.name: tensor for tensor in open_gguf(path).tensors}


def test_nothing_but_codes_changes(rounded):
    kind, nearest, compensated, _ = rounded
    start = min(tensor.data_offset for tensor in open_gguf(nearest).tensors)
    assert nearest.read_bytes()[:start] == compensated.read_bytes()[:start]
    for before, after in zip(open_gguf(nearest).tensors, open_gguf(compensated).tensors, strict=True):
        if before.tensor_type.name == kind:
            blocks = [np.array(tensor.data) for tensor in (before, after)]
            emptied = [write_codes(kind, data, np.zeros_like(read_codes(kind, data))) for data in blocks]
            assert (emptied[0] == emptied[1]).all()


def test_outputs_come_nearer_row_by_row_and_the_record_says_by_how_much(rounded, target, pieces):
    _, nearest, compensated, errors = rounded
    assert errors.keys() == {name for piece in pieces for moments in piece.moments for name in moments.tensors}
    for name, error in errors.items():
        before, after = (output_error(path, target, gram_of(pieces, name), name) for path in (nearest, compensated))
        assert (after <= before * (1 + 1e-4)).all()
        assert error.nearest == pytest.approx(before.sum(), rel=1e-3)
        assert error.compensated == pytest.approx(after.sum(), rel=1e-3)
        assert 0.1 < error.ratio < 0.75


def test_tensors_whose_input_was_not_measured_stay(rounded, pieces):
    _, nearest, compensated, _ = rounded
    for before, after in zip(open_gguf(nearest).tensors, open_gguf(compensated).tensors, strict=True):
        assert (gram_of(pieces, before.name) is not None) == bool((before.data != after.data).any())


def test_files_that_are_made_together_are_those_that_are_made_alone(target, pieces, tmp_path):
    small, large = uniform_plan(target, "Q3_K"), uniform_plan(target, "Q6_K")
    types = {name: (small if index % 2 else large).types[name] for index, name in enumerate(target.quantizable)}
    plans = {"small": small, "mixed": make_plan(target, "mixed", "budget", {}, types), "large": large}
    together = compensate(target, plans, pieces, tmp_path / "together")
    for name, plan in plans.items():
        alone, errors = compensate(target, {name: plan}, pieces, tmp_path / name)[name]
        assert together[name][0].read_bytes() == alone.read_bytes()
        assert together[name][1] == errors


def test_each_expert_is_compensated_by_its_own_inputs_and_counts_by_its_tokens(toolchain, tmp_path):
    target = OpenTarget.open(write_stacked_gguf(tmp_path / "full.gguf", GGMLQuantizationType.F16), toolchain)
    name, kind = "blk.0.ffn_gate_exps.weight", "Q4_K"
    grams = [torch.tensor(random_gram(256, seed)).float() for seed in range(2)]
    pooled = torch.tensor(random_gram(256, 9)).float()
    shares = {0: 0.75, 2: 0.25}
    moments = [
        Moments((name,), int(1e6 * share), gram, expert, pooled, share)
        for (expert, share), gram in zip(shares.items(), grams, strict=True)
    ]
    plan = uniform_plan(target, kind)
    path, errors = compensate(target, {"it": plan}, [Piece(0, [of_one]) for of_one in moments], tmp_path / "it")["it"]
    nearest = nearest_of(target, plan, tmp_path / "nearest.gguf")
    full, before, after = (read_weights(file, name).reshape(3, 40, 256) for file in (target.full.path, nearest, path))
    assert (before[1] == after[1]).all(), "the second has no input"
    expected = []
    for rounded in (before, after):
        change = (rounded - full).astype(float)
        parts = [
            of_one.share * np.einsum("ij,jk,ik->", change[of_one.expert], of_one.gram.double(), change[of_one.expert])
            for of_one in moments
        ]
        expected.append(sum(parts))
    assert errors.keys() == {name}
    assert errors[name].nearest == pytest.approx(expected[0], rel=1e-2)
    assert errors[name].compensated == pytest.approx(expected[1], rel=1e-2)
    assert errors[name].ratio < 0.75
    for of_one in moments:  # as the expert alone would be
        alone = Compensator(of_one.estimate)
        blocks = NearestRounding(target.full.path).blocks(
            name, kind, slice(40 * of_one.expert, 40 * of_one.expert + 40)
        )
        grid = read_grid(kind, blocks)
        (codes,) = alone.codes([(full[of_one.expert], grid)])
        values = values_of(grid, codes)
        assert np.isclose(values, after[of_one.expert], atol=1e-6).mean() > 0.98


@pytest.mark.parametrize("devices", [2, 5])
def test_devices_that_share_the_inputs_write_the_same(target, pieces, tmp_path, devices):
    plan = uniform_plan(target, "Q3_K")
    together = [Piece(0, [moments for piece in pieces for moments in piece.moments])]
    one = compensate(target, {"it": plan}, together, tmp_path / "one")["it"]
    cpus = [torch.device("cpu")] * devices
    several = compensate(target, {"it": plan}, together, tmp_path / "several", devices=cpus)["it"]
    assert several[0].read_bytes() == one[0].read_bytes() and several[1] == one[1] != {}
    lines = [sorted((tmp_path / name / "log").read_text().splitlines()) for name in ("one", "several")]
    assert lines[0] == lines[1] and len(lines[0]) == len(one[1])


def test_a_process_that_goes_on_gives_the_same_file_and_errors(target, pieces, tmp_path):
    plan = uniform_plan(target, "Q4_K")
    whole = compensate(target, {"it": plan}, pieces, tmp_path / "whole")["it"]

    def cut():
        yield from pieces[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compensate(target, {"it": plan}, cut(), tmp_path / "killed")
    with open(tmp_path / "killed" / "log", "a") as log:
        log.write('["blk.0.attn_q.weight", "Q4_')  # the process was killed while it wrote
    path, errors = compensate(target, {"it": plan}, pieces[2:], tmp_path / "killed")["it"]
    assert path.read_bytes() == whole[0].read_bytes() and errors == whole[1]


def test_a_file_of_another_program_keeps_its_scales(target, pieces, tmp_path):
    nearest = nearest_of(target, uniform_plan(target, "Q5_K"), tmp_path / "nearest.gguf")
    file = PlannedFile.copy(tmp_path / "copy.gguf", nearest)
    full = NearestRounding(target.full.path)
    write_compensated({"": file}, full, NearestRounding(nearest), pieces, tmp_path / "log", everything=False)
    (path, _) = compensate(target, {"it": uniform_plan(target, "Q5_K")}, pieces, tmp_path / "whole")["it"]
    assert file.path.read_bytes() == path.read_bytes()


def test_full_precision_stays(target, pieces, tmp_path):
    file = PlannedFile.copy(tmp_path / "copy.gguf", target.full.path)
    full = NearestRounding(target.full.path)
    log = tmp_path / "log"
    errors = write_compensated({"": file}, full, NearestRounding(target.full.path), pieces, log, everything=False)
    assert errors[""].tensors == {}
    assert file.path.read_bytes() == target.full.path.read_bytes()


def test_slabs_of_rows_do_not_matter(target, pieces, rounded, tmp_path, monkeypatch):
    kind, _, compensated, _ = rounded
    monkeypatch.setattr("samq.quantization.slabs._SLAB_WEIGHTS", 10_000)
    monkeypatch.setattr("samq.quantization.compensation._WEIGHTS_AT_A_TIME", 25_000)
    path, _ = compensate(target, {"it": uniform_plan(target, kind)}, pieces, tmp_path)["it"]
    for one, other in zip(open_gguf(compensated).tensors, open_gguf(path).tensors, strict=True):
        assert (one.data != other.data).mean() < 0.02  # a product over other rows may round to the other side of a tie


def test_a_matrix_is_factored_block_by_block_as_it_is_at_once(monkeypatch):
    monkeypatch.setattr(gptq, "_BLOCK", 64)
    gram = torch.tensor(random_gram(200))
    factor = cholesky_upper_(gram.clone())
    torch.testing.assert_close(factor @ factor.t(), gram)
    assert not factor.tril(-1).any()
    expected = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    torch.testing.assert_close(invert_upper_(factor), expected, rtol=1e-8, atol=1e-10)


def test_codes_are_those_of_rounding_column_by_column_with_the_rest_free():
    """Against the plain way: after each column the best values of those to come, by least squares."""
    random, size = np.random.default_rng(3), 160  # more than a band
    gram, weights = random_gram(size), random.normal(0, 1, (6, size)).astype(np.float32)
    grid = CodeGrid(
        random.uniform(0.2, 0.4, (6, size // GROUP)).astype(np.float32),
        random.uniform(-1.2, -0.8, (6, size // GROUP)).astype(np.float32),
        np.arange(8, dtype=np.float32),
        2,
    )
    damped = gram + DAMPING * gram.diagonal().mean() * np.eye(size)
    order = np.argsort(-damped.diagonal(), kind="stable")
    error, expected = np.zeros(weights.shape), np.zeros(weights.shape, int)
    for count, column in enumerate(order):
        fixed, rest = order[:count], order[count:]
        shift = -error[:, fixed] @ damped[np.ix_(fixed, rest)] @ np.linalg.inv(damped[np.ix_(rest, rest)])
        value = weights[:, column] + shift[:, 0]
        levels = grid.scale[:, [column // GROUP]] * grid.levels + grid.offset[:, [column // GROUP]]
        expected[:, column] = np.abs(levels - value[:, None]).argmin(1)
        error[:, column] = levels[np.arange(len(levels)), expected[:, column]] - weights[:, column]
    (codes,) = Compensator(torch.tensor(gram, dtype=torch.float32)).codes([(weights, grid)])
    assert (codes == expected + grid.first).mean() > 0.99
    assert codes.min() >= 2 and codes.max() <= 9


def test_tensors_of_several_types_are_rounded_together_as_each_alone():
    random, size = np.random.default_rng(4), 208
    compensator = Compensator(torch.tensor(random_gram(size), dtype=torch.float32))
    uneven = np.array([-127, -104, -83, -49, -10, 1, 13, 38, 89, 113], np.float32)
    parts = []
    for rows, levels, first in ((5, np.arange(4), 0), (3, uneven, 0), (7, np.arange(1, 256), 1), (2, np.arange(4), 0)):
        weights = random.normal(0, 1, (rows, size)).astype(np.float32)
        step = np.full((rows, size // GROUP), 6 / (levels[-1] - levels[0]), np.float32)
        offset = (-3 - step * levels[0]).astype(np.float32)
        parts.append((weights, CodeGrid(step, offset, levels.astype(np.float32), first)))
    together = compensator.codes(parts)
    for (weights, grid), codes in zip(parts, together, strict=True):
        (alone,) = compensator.codes([(weights, grid)])
        assert codes.shape == weights.shape and (codes == alone).mean() > 0.99
        error = values_of(grid, codes) - weights
        assert len(np.unique(codes)) > 2 and np.abs(error).mean() < np.diff(grid.levels).max() * grid.scale.max()


def prices_of(target):
    kinds = {kind: Price(bytes=10, kl_nats=0.5) for kind in ("F16", "Q4_K", "IQ3_S")}
    return PriceTable(
        gguf_sha256="g", map_digest="m", imatrix_sha256=None, sequence_tokens=(3, 4),
        tensors={name: TensorPrices(types=kinds, shares=(0.4, 0.6)) for name in target.quantizable},
    )  # fmt: skip


def test_prices_fall_by_what_the_inputs_tell_of_each_other(target, pieces):
    errors = {name: expected_errors(m) for piece in pieces for m in piece.moments for name in m.tensors}
    shares = {name: left / whole for name, (whole, left) in errors.items()}
    table = compensated_prices(prices_of(target), shares)
    assert table.rounding == "compensated"
    for name, tensor in table.tensors.items():
        share = 1.0
        if (gram := gram_of(pieces, name)) is not None:
            damped = gram.double().numpy()
            damped = damped + DAMPING * damped.diagonal().mean() * np.eye(len(damped))
            order = np.argsort(-damped.diagonal(), kind="stable")
            # What is left of each input's variance once those after it are known: Cholesky's diagonal, from the last on.
            left = np.linalg.cholesky(damped[np.ix_(order[::-1], order[::-1])]).diagonal()[::-1] ** 2
            column, rest = order[7], order[8:]
            coefficients = np.linalg.solve(damped[np.ix_(rest, rest)], damped[rest, column])
            assert left[7] == pytest.approx(damped[column, column] - damped[column, rest] @ coefficients)
            share = left.sum() / damped.trace()
            assert share < 0.5
        assert tensor.types["Q4_K"].kl_nats == pytest.approx(0.5 * share, rel=1e-3)
        assert tensor.types["IQ3_S"].kl_nats == 0.5 and "IQ3_S" not in TYPES_WITH_CODES
        assert tensor.shares == (0.4, 0.6)


def test_a_matrix_that_cannot_be_inverted_is_an_error(target, tmp_path):
    moments = Moments(("output.weight",), 1, torch.diag(torch.linspace(-1, 2, 256)))
    message = r"the Gram matrix of output\.weight cannot be inverted .*; measure it on more text"
    with pytest.raises(SamqError, match=message):
        expected_errors(moments)
    with pytest.raises(SamqError, match=message):
        compensate(target, {"it": uniform_plan(target, "Q4_K")}, [Piece(0, [moments])], tmp_path)


def test_weights_that_are_held_exactly_stay(target, pieces, toolchain, tmp_path):
    """As when the full-precision file was itself made from a quantized one."""
    plan = uniform_plan(target, "Q8_0")
    nearest = nearest_of(target, plan, tmp_path / "nearest.gguf")
    full = tmp_path / "full.gguf"
    full.write_bytes(target.full.path.read_bytes())
    exact_names = [name for piece in pieces for moments in piece.moments for name in moments.tensors]
    with open(full, "r+b") as file:
        for tensor in open_gguf(target.full.path).tensors:
            if tensor.name in exact_names:
                file.seek(tensor.data_offset)
                file.write(read_weights(nearest, tensor.name).astype(np.float16).tobytes())
    exact = OpenTarget.open(full, toolchain)
    path, errors = compensate(exact, {"it": plan}, pieces, tmp_path / "out")["it"]
    assert errors == {}
    for name, tensor in tensors_of(nearest_of(exact, plan, tmp_path / "again.gguf")).items():
        assert (tensors_of(path)[name].data == tensor.data).all()


def test_the_squares_of_an_experts_inputs_compensate_nothing(target, tmp_path):
    piece = Piece(0, [Moments(("blk.0.ffn_up.weight",), 3, torch.ones(256), expert=1)])
    plan = uniform_plan(target, "Q4_K")
    path, errors = compensate(target, {"it": plan}, [piece], tmp_path)["it"]
    assert errors == {}
    assert path.read_bytes() == nearest_of(target, plan, tmp_path / "nearest.gguf").read_bytes()


def test_matrices_are_gone_before_those_of_the_next_block_come(target, pieces, tmp_path):
    gone = []
    compensate(target, {"it": uniform_plan(target, "Q4_K")}, forgotten(pieces, gone), tmp_path)
    assert gone == [True] * len(pieces)


def forgotten(pieces, gone):
    """Copies of the pieces; notes of each whether nobody has its matrices any more when the next is asked for."""

    def copy(piece, references):
        moments = [replace(of_input, gram=of_input.gram.clone()) for of_input in piece.moments]
        references += [weakref.ref(of_input.gram) for of_input in moments]
        return Piece(piece.part, moments)

    for piece in pieces:
        references = []
        yield copy(piece, references)
        gone.append(bool(references) and not any(reference() is not None for reference in references))
