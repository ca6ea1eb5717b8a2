import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from samq.gguf.codes import GROUP, TYPES_WITH_CODES, read_codes, read_grid, write_codes
from samq.gguf.ggml import to_float
from samq.gguf.nearest import NearestRounding
from tests.conftest import write_tiny_gguf

NAME, ROW_LENGTH = "blk.1.ffn_down.weight", 512


@pytest.fixture(scope="module", params=sorted(TYPES_WITH_CODES))
def quantized(request, tmp_path_factory):
    """(type, blocks) of a tensor as llama-quantize writes it."""
    full = write_tiny_gguf(tmp_path_factory.mktemp("codes") / "tiny.gguf")
    return request.param, NearestRounding(full).blocks(NAME, request.param, slice(None))


def test_codes_put_back_give_the_same_blocks(quantized):
    kind, blocks = quantized
    codes = read_codes(kind, blocks)
    assert codes.shape == (len(blocks), ROW_LENGTH)
    assert len(np.unique(codes)) > 3
    assert (write_codes(kind, blocks, codes) == blocks).all()


def test_a_weight_is_the_level_of_its_code_on_the_blocks_grid(quantized):
    kind, blocks = quantized
    grid, codes = read_grid(kind, blocks), read_codes(kind, blocks)
    assert codes.min() >= grid.first
    scale, offset = (np.repeat(part, GROUP, axis=1) for part in (grid.scale, grid.offset))
    values = scale * grid.levels[codes - grid.first] + offset
    expected = gguf.dequantize(blocks, GGMLQuantizationType[kind])
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-6)
    assert (np.diff(grid.levels) > 0).all()


def test_another_code_changes_its_own_weight_alone(quantized):
    kind, blocks = quantized
    grid, codes = read_grid(kind, blocks), read_codes(kind, blocks)
    for column in (0, 1, 15, 16, 31, 32, 100, 255, 256, ROW_LENGTH - 1):
        changed = codes.copy()
        changed[:, column] = np.where(codes[:, column] == grid.first, grid.first + 1, codes[:, column] - 1)
        values = to_float(GGMLQuantizationType[kind], write_codes(kind, blocks, changed), ROW_LENGTH)
        others = np.arange(ROW_LENGTH) != column
        before = to_float(GGMLQuantizationType[kind], blocks, ROW_LENGTH)
        assert (values[:, others] == before[:, others]).all()
        level = grid.levels[changed[:, column] - grid.first]
        expected = grid.scale[:, column // GROUP] * level + grid.offset[:, column // GROUP]
        np.testing.assert_allclose(values[:, column], expected, rtol=1e-4, atol=1e-6)
