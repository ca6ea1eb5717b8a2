from collections import Counter

import numpy as np
import pytest

from samq.data.tokens import TokenBatch
from samq.sensitivity.blocks import PROBE_TOKENS, Blocks
from samq.sensitivity.checkpoint import describe_source
from samq.sensitivity.hf_model import load_model
from samq.sensitivity.hidden_states import Writer
from samq.sensitivity.layout import GgufLayout, weights_of
from samq.sensitivity.loss import Labelling
from samq.sensitivity.measure import Origin, measure_sensitivity
from samq.sensitivity.memory import Memory
from tests.architectures.models import write_model
from tests.tiny_models import names_of, random_tokens, tiny_llama, tiny_mixtral

MODELS = {
    "Llama": lambda: tiny_llama(num_hidden_layers=5),
    "tied Llama": lambda: tiny_llama(tied=True, num_hidden_layers=3),
    "Mixtral": tiny_mixtral,
}


def measure(model, tokens, folder, weights=None):
    weights = weights or weights_of(model, names_of(model))
    layout, origin, memory = GgufLayout(weights), Origin("model", "text"), Memory(folder=folder)
    return measure_sensitivity(model, tokens, layout, origin, labelling=Labelling("model"), batch_size=2, memory=memory)


def require_identical(one, other):
    assert one[0] == other[0]
    for name, fisher in other[1].items():
        for part in ("rows", "columns"):
            assert np.array_equal(getattr(one[1][name], part), getattr(fisher, part)), name


class Killed(BaseException):
    """In place of a signal, which would end the test as well."""


@pytest.fixture
def killing(monkeypatch):
    """Give a number of the parts of a model that run before the next of them is the last; counts them by their work."""
    run, logits = Blocks.run, Blocks.logits
    left, worked = [0], Counter()

    def tell(work):
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        worked[work] += 1

    def run_block(blocks, number, hidden, call):
        output = run(blocks, number, hidden, call)
        if hidden.shape[1] > PROBE_TOKENS:
            tell((number, "backward" if output.requires_grad else "forward"))
        return output

    def run_logits(blocks, *arguments):
        tell("turn")
        return logits(blocks, *arguments)

    monkeypatch.setattr(Blocks, "run", run_block)
    monkeypatch.setattr(Blocks, "logits", run_logits)
    monkeypatch.setattr("samq.sensitivity.blocks._require_equal_logits", lambda *_: None)

    def after(parts):
        left[0] = parts
        return worked

    return after


@pytest.mark.parametrize("name", MODELS)
def test_a_pass_that_is_killed_anywhere_goes_on_at_its_block_and_gives_the_same(name, killing, by_blocks, tmp_path):
    model, tokens = MODELS[name](), random_tokens()
    batches = 3 if name != "Mixtral" else 5
    killing(-1)
    whole = measure(model, tokens, tmp_path / "undisturbed")
    assert not (tmp_path / "undisturbed").exists()
    worked = killing(-1)
    parts = sum(worked.values())
    for after in range(1, parts, 3):
        folder = tmp_path / f"killed-{after}"
        worked.clear()
        killing(after)
        with pytest.raises(Killed):
            measure(model, tokens, folder)
        killing(-1)
        require_identical(measure(model, tokens, folder), whole)
        again = {work: count for work, count in worked.items() if work != "turn" and count > batches}
        assert len(again) <= 1 and all(count < 2 * batches for count in again.values()), "but for the killed block"
        assert not folder.exists()


def test_a_pass_that_is_killed_again_and_again_ends(killing, by_blocks, tmp_path):
    model, tokens, folder = tiny_llama(num_hidden_layers=4), random_tokens(), tmp_path / "killed"
    killing(-1)
    whole = measure(model, tokens, tmp_path / "undisturbed")
    for kills in range(1, 40):
        killing(8)  # a block takes 3, the turn 5, and 1 tells how the model comes apart
        try:
            measured = measure(model, tokens, folder)
        except Killed:
            continue
        require_identical(measured, whole)
        assert kills > 3
        return
    raise AssertionError("never ended")


def test_with_a_slow_disk_a_pass_goes_on_at_an_earlier_block_and_gives_the_same(
    killing, by_blocks, tmp_path, monkeypatch
):
    model, tokens = tiny_llama(num_hidden_layers=5), random_tokens()
    killing(-1)
    whole = measure(model, tokens, tmp_path / "undisturbed")
    checks = []
    # in turn full, so that the slopes before a block are not kept, and not full
    monkeypatch.setattr(Writer, "is_full", lambda _: checks.append(0) or len(checks) % 2 == 1)
    monkeypatch.setattr(Writer, "wait_for_room", lambda _: None)
    for after in range(22, 35, 2):  # on the way back
        folder = tmp_path / f"killed-{after}"
        killing(after)
        with pytest.raises(Killed):
            measure(model, tokens, folder)
        killing(-1)
        require_identical(measure(model, tokens, folder), whole)
        assert not folder.exists()
    assert len(checks) > 20


@pytest.mark.parametrize("name, architecture", [("Mamba", "mamba"), ("Qwen2.5, tied", "qwen2"), ("Llama", "llama")])
def test_a_model_on_disk_goes_on_too(name, architecture, killing, tmp_path):
    source = describe_source(write_model(name, tmp_path / "model"))
    tokens = TokenBatch.of([np.arange(length) * 7 % 200 for length in (24, 17, 24)])
    folder = tmp_path / "killed"
    killing(-1)

    def run(place):
        model, _ = load_model(source, device="cpu", memory_limit=1)
        return measure(model, tokens, place, weights_of(model, names_of(model, architecture)))

    whole = run(tmp_path / "undisturbed")
    for after in (2, 5, 7):  # in the first forward pass, at the turn, on the way back
        killing(after)
        with pytest.raises(Killed):
            run(folder)
    killing(-1)
    require_identical(run(folder), whole)


def test_a_pass_of_the_whole_model_goes_on_at_its_batch(tmp_path, monkeypatch):
    monkeypatch.setattr("samq.sensitivity.backpropagation.SAVE_EVERY_S", 0)
    model, tokens, folder = tiny_llama(tied=True), random_tokens(), tmp_path / "killed"
    whole = measure(model, tokens, tmp_path / "undisturbed")
    forward, left = model.forward, [0]

    def kill(*arguments, **more):
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        return forward(*arguments, **more)

    monkeypatch.setattr(model, "forward", kill)
    left[0] = 4  # the first shows how weights are used; then batch 1, 2 and half of 3
    with pytest.raises(Killed):
        measure(model, tokens, folder)
    left[0] = 3  # the same, and batch 3 alone
    require_identical(measure(model, tokens, folder), whole)
    assert left[0] == 1 and not folder.exists()
