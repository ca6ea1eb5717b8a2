"""Names of the files that artifacts hold: stages write them, and whatever comes after finds them by these names."""

GGUF_NAME = "model.gguf"  # full precision, or a candidate
QUANTIZED_NAME = "quantized-model.json"  # the QuantizedModel record beside a candidate
MMPROJ_NAME = "mmproj.gguf"  # the vision or audio part, as llama.cpp calls it
IMATRIX_NAME = "imatrix.gguf"
TOKENS_NAME = "tokens.npz"  # calibration sequences
CALIBRATION_SET_NAME = "calibration-set.json"
HELDOUT_NAME = "heldout.npz"  # held-out token ids
MAP_NAME = "sensitivity-map.json"
FISHER_NAME = "fisher.safetensors"
SHARES_NAME = "compensation-shares.json"  # of the output errors, that compensated rounding leaves
PRICES_NAME = "prices.json"
PLAN_NAME = "plan.json"
COMPENSATION_NAME = "compensation.json"
CHECK_NAME = "prediction-check.json"
AGREEMENT_NAME = "agreement.json"  # of torch and llama.cpp on the full-precision model
EVALUATION_NAME = "evaluation.json"
DIVERGENCE_NAME = "divergence.parquet"  # a row for each scored token
ANSWERS_NAME = "json.parquet"  # a row for each JSON prompt
ITEMS_NAME = "benchmarks.parquet"  # a row for each benchmark item and metric
