import pytest

from samq.allocation.target import OpenTarget, stock_plan
from samq.errors import SamqError, ToolError
from samq.gguf.audit import audit, require_space
from samq.llamacpp.quantize import quantize


def test_the_audit_finds_a_drifted_type_and_another_plans_file(tiny_gguf, toolchain, tmp_path):
    plan = stock_plan(OpenTarget.open(tiny_gguf, toolchain), "Q4_K_M")
    quantize(tiny_gguf, plan, tmp_path, toolchain, provenance={})
    gguf = tmp_path / "model.gguf"
    drifted = plan.model_copy(update={"types": {**plan.types, "blk.1.attn_k.weight": "Q6_K"}})
    with pytest.raises(
        ToolError, match=r"1 tensors of model\.gguf drifted .*blk\.1\.attn_k\.weight first: Q4_K instead of Q6_K"
    ):
        audit(gguf, drifted)
    with pytest.raises(ToolError, match="tensor bytes and plan"):
        audit(gguf, plan.model_copy(update={"tensor_bytes": 1}))
    with pytest.raises(ToolError, match="was made from plan"):
        audit(gguf, plan.model_copy(update={"name": "other"}))
    with pytest.raises(ToolError, match="lacks 1 tensors"):
        audit(gguf, plan.model_copy(update={"types": {**plan.types, "blk.9.attn_k.weight": "Q6_K"}}))


def test_a_disk_that_is_too_full_is_refused_before_the_work(tiny_gguf, toolchain, tmp_path):
    plan = stock_plan(OpenTarget.open(tiny_gguf, toolchain), "Q4_K_M")
    with pytest.raises(SamqError, match=r"bytes free and Q4_K_M needs 10,000,000,000,000,000; free some"):
        require_space(tmp_path, plan.name, 10**16)
