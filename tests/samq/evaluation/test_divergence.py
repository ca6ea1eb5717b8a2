import gc
import re
import shutil
import tracemalloc

import numpy as np
import pandas as pd
import pytest
from scipy.special import log_softmax, softmax

from samq.errors import SamqError
from samq.evaluation.baseline import cut_chunks, open_baseline, scored_logits, write_baseline
from samq.evaluation.divergence import compare_logits, measure_divergence, summarize_divergence
from samq.evaluation.settings import EvaluationSettings
from samq.llamacpp.process import run
from samq.llamacpp.runtime import Model
from samq.llamacpp.toolchain import environment, program
from tests.conftest import write_tiny_gguf

SETTINGS = EvaluationSettings(context_tokens=128, chunks=6)


def test_divergence_is_the_sum_over_the_vocabulary():
    random = np.random.default_rng(0)
    base, cand = (random.normal(0, 3, (7, 50)).astype(np.float32) for _ in range(2))
    targets = random.integers(0, 50, 7)
    table = compare_logits(base, cand, targets)
    log_p, log_q = log_softmax(base.astype(np.float64), axis=1), log_softmax(cand.astype(np.float64), axis=1)
    rows = np.arange(7)
    np.testing.assert_allclose(table["kld"], (np.exp(log_p) * (log_p - log_q)).sum(axis=1), rtol=1e-12)
    np.testing.assert_allclose(table["nll"], -log_q[rows, targets], rtol=1e-12)
    np.testing.assert_allclose(table["nll_base"], -log_p[rows, targets], rtol=1e-12)
    delta = softmax(cand.astype(np.float64), axis=1) - softmax(base.astype(np.float64), axis=1)
    np.testing.assert_allclose(table["delta_p"], delta[rows, targets], atol=1e-12)
    assert table["same_top"].tolist() == (base.argmax(axis=1) == cand.argmax(axis=1)).tolist()


def test_equal_logits_diverge_by_nothing_and_a_shift_is_no_difference():
    logits = np.random.default_rng(0).normal(0, 30, (5, 40)).astype(np.float32)
    assert (compare_logits(logits, logits, np.zeros(5, int))["kld"] == 0).all()
    np.testing.assert_allclose(compare_logits(logits, logits + 64, np.zeros(5, int))["kld"], 0, atol=1e-5)


def test_the_statistics_are_those_of_their_names():
    random = np.random.default_rng(0)
    scored = pd.DataFrame(
        {
            "chunk": np.repeat([0, 1, 2, 3], 50),
            "kld": random.exponential(0.1, 200),
            "nll": random.exponential(2, 200),
            "nll_base": random.exponential(2, 200),
            "delta_p": random.normal(0, 0.1, 200),
            "same_top": random.random(200) < 0.9,
        }
    )
    metrics = summarize_divergence(scored)
    value = {name.removeprefix("fidelity/"): metric.value for name, metric in metrics.items()}
    assert value["mean_kld_nats"] == pytest.approx(scored["kld"].mean())
    assert value["kld_p99_nats"] == pytest.approx(np.quantile(scored["kld"], 0.99))
    assert value["perplexity"] == pytest.approx(np.exp(scored["nll"].mean()))
    assert value["perplexity_ratio"] == pytest.approx(np.exp((scored["nll"] - scored["nll_base"]).mean()))
    assert value["same_top_percent"] == pytest.approx(100 * scored["same_top"].mean())
    assert value["rms_delta_p_percent"] == pytest.approx(100 * np.sqrt((scored["delta_p"] ** 2).mean()))
    assert metrics["fidelity/mean_kld_nats"].n == 200
    assert metrics["fidelity/mean_kld_nats"].stderr >= scored["kld"].std(ddof=1) / np.sqrt(200) * (1 - 1e-12)


def test_tokens_that_share_their_chunks_luck_count_as_fewer():
    scored = pd.DataFrame({"chunk": np.repeat(np.arange(10), 20), "kld": np.repeat(np.linspace(0, 1, 10), 20)})
    scored = scored.assign(nll=1.0, nll_base=1.0, delta_p=0.0, same_top=True)
    expected = np.linspace(0, 1, 10).std(ddof=1) / np.sqrt(10)
    assert summarize_divergence(scored)["fidelity/mean_kld_nats"].stderr == pytest.approx(expected)


def test_chunks_are_whole_and_start_with_bos():
    assert cut_chunks(np.arange(1, 36), 16, bos=None)[:, 0].tolist() == [1, 17]
    assert cut_chunks(np.arange(1, 36), 16, bos=99).tolist()[1] == [99, *range(18, 33)]
    with pytest.raises(SamqError, match="15 held-out tokens do not fill a chunk of 16; give more"):
        cut_chunks(np.arange(15), 16, bos=None)


@pytest.fixture(scope="module")
def baseline(tmp_path_factory, smollm2_f16, heldout_text):
    """(chunks, folder of the F16 model's logits on them)"""
    folder = tmp_path_factory.mktemp("baseline")
    with Model(smollm2_f16) as model:
        tokens = model.tokenize(heldout_text.read_text(), add_special=model.adds_bos)
        chunks = cut_chunks(tokens, SETTINGS.context_tokens, model.bos if model.adds_bos else None)[: SETTINGS.chunks]
        write_baseline(model, "0" * 64, chunks, SETTINGS, folder)
    return chunks, folder


def divergence(gguf, baseline):
    chunks, folder = baseline
    with Model(gguf) as model:
        return measure_divergence(model, chunks, folder, SETTINGS)


@pytest.mark.e2e
def test_full_precision_is_itself(smollm2_f16, baseline):
    metrics, scored = divergence(smollm2_f16, baseline)
    assert abs(metrics["fidelity/mean_kld_nats"].value) <= 1e-6
    assert scored["kld"].abs().max() <= 1e-6
    assert metrics["fidelity/same_top_percent"].value == 100
    assert metrics["fidelity/perplexity_ratio"].value == pytest.approx(1, abs=1e-9)
    assert len(scored) == SETTINGS.chunks * SETTINGS.scored_per_chunk


@pytest.mark.e2e
def test_full_precision_is_not_computed_a_second_time_unless_its_cache_is_another(smollm2_f16, baseline, decode_fails):
    (computed, scored), (chunks, folder) = divergence(smollm2_f16, baseline), baseline
    quantized_cache = SETTINGS.model_copy(update={"kv_type": "Q8_0"})
    steps = []
    with Model(smollm2_f16) as model:
        other, _ = measure_divergence(model, chunks, folder, quantized_cache, sha256="0" * 64)
        decode_fails(1)
        metrics, taken = measure_divergence(
            model, chunks, folder, SETTINGS, lambda *step: steps.append(step), sha256="0" * 64
        )
    assert other["fidelity/mean_kld_nats"].value > 1e-6
    pd.testing.assert_frame_equal(taken, scored, atol=1e-6)
    assert metrics.keys() == computed.keys() and metrics["fidelity/mean_kld_nats"].value == 0
    assert steps == [(done + 1, len(chunks)) for done in range(len(chunks))]


@pytest.mark.e2e
def test_the_figures_are_those_of_llama_perplexity(
    tmp_path, toolchain, smollm2_f16, smollm2_q4_k_m, heldout_text, baseline
):
    metrics, _ = divergence(smollm2_q4_k_m, baseline)

    def perplexity(gguf, *arguments):
        tokens = str(SETTINGS.context_tokens)  # -b: one chunk a batch, as here, or the arithmetic rounds differently
        common = ["-f", heldout_text, "-c", tokens, "-b", tokens, "--chunks", str(SETTINGS.chunks)]
        command = [program(toolchain, "llama-perplexity"), "-m", gguf, *common, *arguments]
        run(command, log=tmp_path / "perplexity.log", timeout_s=300, env=environment(toolchain))
        return (tmp_path / "perplexity.log").read_text()

    logits = tmp_path / "logits"
    perplexity(smollm2_f16, "--kl-divergence-base", logits)
    theirs = perplexity(smollm2_q4_k_m, "--kl-divergence-base", logits, "--kl-divergence")

    def figure(pattern):
        return float(re.search(pattern + r"\s*:\s*([-\d.]+)", theirs)[1])

    klds = as_llama_perplexity(smollm2_q4_k_m, baseline)
    median, p90, p99, p999 = np.quantile(klds, [0.5, 0.9, 0.99, 0.999])
    for pattern, ours in {
        "Mean    KLD": klds.mean(),
        "Median  KLD": median,
        r"90\.0%   KLD": p90,
        r"99\.0%   KLD": p99,
        r"99\.9%   KLD": p999,
    }.items():
        assert ours == pytest.approx(figure(pattern), rel=5e-3), pattern
    assert metrics["fidelity/mean_kld_nats"].value == pytest.approx(klds.mean(), rel=0.03)
    # The rest knows no limit; theirs is of a baseline of 16-bit log-probabilities, printed with six digits.
    for name, pattern, tolerance in (
        ("perplexity", r"Mean PPL\(Q\)\s*", {"rel": 2e-4}),
        ("perplexity_ratio", r"Mean PPL\(Q\)/PPL\(base\)\s*", {"rel": 2e-4}),
        ("rms_delta_p_percent", r"RMS Δp\s*", {"abs": 2e-2}),
        ("same_top_percent", r"Same top p", {"abs": 0.2}),
    ):
        assert metrics[f"fidelity/{name}"].value == pytest.approx(figure(pattern), **tolerance), name


def as_llama_perplexity(gguf, baseline):
    """KLD of each token without what the baseline gives less than e^-16: perplexity.cpp leaves that out."""
    chunks, folder = baseline
    with Model(gguf) as model:
        expected = open_baseline(folder, chunks, SETTINGS, model.vocab_size)
        klds = []
        for base, logits in zip(expected, scored_logits(model, chunks, SETTINGS, "F16"), strict=True):
            log_p, log_q = log_softmax(base.astype(float), axis=1), log_softmax(logits.astype(float), axis=1)
            klds.append(np.where(log_p > -16, np.exp(log_p) * (log_p - log_q), 0).sum(axis=1))
    return np.concatenate(klds)


@pytest.mark.e2e
def test_a_baseline_of_other_tokens_or_cut_short_is_refused(baseline, smollm2_f16, tmp_path):
    chunks, folder = baseline
    vocabulary = 49152
    with pytest.raises(SamqError, match="is of other held-out tokens or positions; compute it again"):
        open_baseline(folder, chunks[::-1], SETTINGS, vocabulary)
    with pytest.raises(SamqError, match="tokens in its vocabulary, the candidate 64"):
        open_baseline(folder, chunks, SETTINGS, 64)
    copy = shutil.copytree(folder, tmp_path / "copy")
    with (copy / "logits.npy").open("r+b") as file:
        file.truncate(100_000)
    with pytest.raises(SamqError, match=r"cannot read .*logits\.npy .*; compute the baseline again"):
        open_baseline(copy, chunks, SETTINGS, vocabulary)
    with (
        Model(smollm2_f16) as model,
        pytest.raises(SamqError, match="held-out token 60000 is outside the 49152 tokens"),
    ):
        write_baseline(model, "0" * 64, np.full_like(chunks, 60_000), SETTINGS, tmp_path)
    assert not list(tmp_path.glob("*logits*"))


def traced(work):
    """The most bytes of Python's and numpy's memory that some work holds at a time."""
    gc.collect()
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.slow
def test_memory_for_logits_does_not_grow_with_the_number_of_chunks(tmp_path):
    """All logits of the largest run are 16 times those of a chunk; what is held is less than two chunks' more."""
    vocabulary, settings = 20_000, EvaluationSettings(context_tokens=32, chunks=None, threads=1)
    gguf = write_tiny_gguf(
        tmp_path / "wide.gguf", vocabulary=vocabulary, add_tokenizer=lambda writer: writer.add_tokenizer_model("none")
    )
    chunk_bytes = settings.scored_per_chunk * vocabulary * 4
    chunks = np.random.default_rng(0).integers(0, vocabulary, (16, 32)).astype(np.int32)
    writing, comparing = {}, {}
    with Model(gguf) as model:
        for count in (2, 16):
            folder = tmp_path / str(count)
            folder.mkdir()
            part = chunks[:count]
            writing[count] = traced(lambda: write_baseline(model, "0" * 64, part, settings, folder))  # noqa: B023
            comparing[count] = traced(lambda: measure_divergence(model, part, folder, settings))  # noqa: B023
            assert (folder / "logits.npy").stat().st_size == pytest.approx(count * chunk_bytes, rel=1e-3)
    assert chunk_bytes > 1e6
    assert writing[16] < writing[2] + chunk_bytes < 3 * chunk_bytes
    assert comparing[16] < comparing[2] + chunk_bytes
