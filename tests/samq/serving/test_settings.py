from pathlib import Path

import pytest
import yaml

from samq.errors import SamqError
from samq.serving.settings import ServingSettings, is_loopback, load_settings


@pytest.mark.parametrize(
    "host, loopback",
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("gpu.example", False),
    ],
)
def test_which_addresses_are_this_machine(host, loopback):
    assert is_loopback(host) == loopback


def test_other_machines_need_a_key_or_a_word_that_they_do_not():
    with pytest.raises(SamqError, match=r"other machines can reach host 0\.0\.0\.0: set SAMQ_API_KEY"):
        load_settings(None, host="0.0.0.0")
    assert load_settings(None, host="0.0.0.0", api_key="secret").host == "0.0.0.0"
    assert load_settings(None, host="0.0.0.0", allow_without_key=True).api_key is None


def test_what_is_given_goes_before_the_file(tmp_path):
    file = tmp_path / "serving.yaml"
    file.write_text("port: 9000\nkv_type: Q8_0\n")
    settings = load_settings(file, port=9001, host=None)
    assert (settings.port, settings.kv_type, settings.host) == (9001, "Q8_0", "127.0.0.1")


@pytest.mark.parametrize(
    "text, reason",
    [
        ("prot: 1", r"prot: Extra inputs are not permitted"),
        ("kv_type: Q9_0", r"kv_type: Input should be"),
        ("speculation: {kind: draft}", r"speculation: kind draft and draft_model go together"),
        ("{engine: llama-cpp-python, slots: 2}", r"llama-cpp-python has no slots above 1"),
        ("{engine: llama-cpp-python, speculation: {kind: ngram}}", r"llama-cpp-python has no speculation"),
        ("api_keys: {ana: ''}", r"a key of api_keys is empty"),
        ("shadow: {prompts: -1}", r"shadow\.prompts: "),
        ("- 1", "does not hold settings"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path, text, reason):
    file = tmp_path / "serving.yaml"
    file.write_text(text)
    with pytest.raises(SamqError, match=reason):
        load_settings(file)


def test_the_key_is_not_shown():
    assert "secret" not in repr(ServingSettings(api_key="secret", api_keys={"ana": "secret"}))


def test_the_annotated_file_shows_every_setting_at_its_default():
    file = Path(__file__).parents[3] / "deployments" / "serving.yaml"
    assert load_settings(file) == ServingSettings()
    assert yaml.safe_load(file.read_text()).keys() == ServingSettings.model_fields.keys() - {"api_key"}
