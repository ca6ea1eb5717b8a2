"""What the re-quantization flow refuses before it does anything."""

import pytest
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import _validate_model_name

from flows.parameters import (
    CalibrationParameters,
    CandidateParameters,
    ModelParameters,
    TrackingParameters,
    load_parameters,
)
from samq.errors import SamqError

CONFIG = """
name: x
model: {source: m}
calibration: {dataset: {name: humaneval, samples: SAMPLES}}
heldout: {name: humaneval, start: 100}
"""


@pytest.mark.parametrize("samples", [7, 8, 9])  # of which 8 are kept apart for the check
def test_samples_that_leave_too_few_to_calibrate_on_are_one_sentence(tmp_path, samples):
    path = tmp_path / "parameters.yaml"
    path.write_text(CONFIG.replace("SAMPLES", str(samples)))
    with pytest.raises(
        SamqError, match=rf"{samples} calibration sequences, 8 of them .*; raise samples or lower check_"
    ):
        load_parameters(path)
    path.write_text(CONFIG.replace("SAMPLES", "10"))
    assert load_parameters(path).calibration.sequences_left(10) == 2


def test_sequences_that_only_the_tokens_tell_are_counted_then():
    dataset = {"name": "book.txt", "samples": 1}
    calibration = CalibrationParameters(dataset=dataset, packing=True, check_sequences=2)
    assert calibration.sequences_left(4) == 2
    with pytest.raises(SamqError, match="3 calibration sequences, 2 of them kept apart by check_sequences"):
        calibration.sequences_left(3)
    assert CalibrationParameters(dataset=dataset, packing=True, check_sequences=0).sequences_left(2) == 2


def test_budgets_that_are_not_given_are_the_sizes_of_the_stock_mixtures():
    sizes = ("size-of:Q3_K_M", "size-of:Q4_K_S", "size-of:Q4_K_M", "size-of:Q5_K_M")
    assert CandidateParameters().budgets == sizes
    few = CandidateParameters(stock=("q4_k_m", "Q6_K"))
    assert few.budgets == ("size-of:Q4_K_M", "size-of:Q6_K")
    assert CandidateParameters.model_validate(few.model_dump(mode="json", exclude_defaults=True)) == few
    assert CandidateParameters(stock=()).budgets == CandidateParameters(budgets=()).budgets == ()
    assert CandidateParameters(budgets=("4.5bpw",)).budgets == ("4.5bpw",)


@pytest.mark.parametrize("name", ["", " ", ".", "..", "..a", "org/model", "a:b"])
def test_a_registered_models_name_that_mlflow_refuses_is_refused_first(name):
    with pytest.raises(MlflowException):
        _validate_model_name(name)
    with pytest.raises(ValueError, match="cannot name a registered model; give a name without / :"):
        TrackingParameters(registered_model=name)


def test_a_registered_model_may_have_an_ordinary_name_and_no_quotation_mark():
    assert TrackingParameters(registered_model="SmolLM2-135M 4.5bpw").registered_model == "SmolLM2-135M 4.5bpw"
    assert TrackingParameters().registered_model is None
    with pytest.raises(ValueError, match="cannot name a registered model"):
        TrackingParameters(registered_model="the team's")


def test_a_memory_limit_is_a_size():
    assert ModelParameters(source="model", memory_limit="20GiB").memory_limit_bytes == 20 * 2**30
    assert ModelParameters(source="model").memory_limit_bytes is None
    for wrong in ("4.5bpw", "lots", "0", ""):
        with pytest.raises(ValueError, match=f"'{wrong}' is not a size; give a number of bytes, or one such as 20GiB"):
            ModelParameters(source="model", memory_limit=wrong)
