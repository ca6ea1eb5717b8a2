import pytest

from tests.samq.evaluation.lm_eval.hf_pair import Pair


@pytest.fixture(scope="module", params=[None, "<bos>"], ids=["without-bos", "with-bos"])
def pair(request, tmp_path_factory):
    pair = Pair(tmp_path_factory.mktemp("pair"), request.param)
    yield pair
    pair.ours.model.close()
