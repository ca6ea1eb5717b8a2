"""The containers, as far as files can tell: no image is built here."""

import os
import re
import shutil
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import yaml
from prefect.settings import PREFECT_UI_STATIC_DIRECTORY, Settings, temporary_settings

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "deployments" / "docker"
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
DOCKERFILE = (FOLDER / "Dockerfile").read_text()
IGNORE = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
PROMETHEUS = yaml.safe_load((ROOT / "deployments" / "monitoring" / "prometheus.yaml").read_text())


def built():
    return {name: service["build"] for name, service in SERVICES.items() if "build" in service}


def mounts():
    """(service, source, target) of every volume."""
    return [(name, *one.split(":")[:2]) for name, service in SERVICES.items() for one in service["volumes"]]


def copied():
    """What the Dockerfile takes from the repository."""
    lines = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    return {source for line in lines for source in line.split()}


def sent(path):
    """Whether the builder is sent a file: the last pattern that matches it, or a folder that it is in, decides."""
    is_sent = True
    for line in IGNORE:
        pattern = re.escape(line.removeprefix("!")).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if any(re.fullmatch(pattern, str(part)) for part in (Path(path), *Path(path).parents)):
            is_sent = line.startswith("!")
    return is_sent


def test_the_dockerfile_copies_what_the_repository_has_and_the_builder_is_sent():
    assert copied()
    for source in copied():
        files = [path for path in [ROOT / source, *(ROOT / source).rglob("*")] if path.is_file()]
        assert files, source
        unsent = {path.name for path in files if not sent(path.relative_to(ROOT))}
        assert all(name.endswith(".pyc") for name in unsent), f"{unsent} of {source} is ignored"


def test_the_build_has_every_file_that_the_set_up_reads():
    named = re.findall(r"[\w./]*\b[\w-]+\.(?:sh|lock|toml)\b", (ROOT / "scripts" / "setup.sh").read_text())
    read = {name for name in named if (ROOT / name).is_file()}
    assert {"scripts/uv.sh", "requirements.lock", "pyproject.toml"} <= read <= copied()


@pytest.mark.parametrize("path", [".env", "deployments/docker/.env", "deployments/parameters/.env.local", "samq/.env"])
def test_a_file_of_secrets_reaches_neither_the_builder_nor_a_commit(path, tmp_path):
    assert not sent(path)
    shutil.copy(ROOT / ".gitignore", tmp_path)
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    assert subprocess.run(["git", "-C", tmp_path, "check-ignore", "--quiet", path]).returncode == 0


def test_no_image_holds_the_folder_whose_env_file_compose_reads():
    assert not sent(FOLDER.relative_to(ROOT) / "compose.yaml")
    assert not any(FOLDER.is_relative_to(ROOT / source) for source in copied())


def test_the_builder_is_sent_nothing_that_is_not_copied():
    sent = {line.removeprefix("!") for line in IGNORE if line.startswith("!")}
    assert sent <= {part for source in copied() for part in (source, source.split("/")[0])}


def test_every_image_that_is_built_is_a_stage_of_the_dockerfile():
    stages = set(re.findall(r"^FROM \S+ AS (\w+)$", DOCKERFILE, re.MULTILINE))
    assert {build["target"] for build in built().values()} <= stages
    for build in built().values():
        assert (FOLDER / build["context"]).resolve() == ROOT
        assert ROOT / build["dockerfile"] == FOLDER / "Dockerfile"


def test_images_of_others_are_pinned():
    images = [service["image"] for name, service in SERVICES.items() if name not in built()]
    images += re.findall(r"^FROM (\S+:\S+) AS", DOCKERFILE, re.MULTILINE)
    assert all(re.search(r":v?\d+", image) for image in images), images


def test_every_volume_is_declared_and_every_file_that_is_mounted_is_there():
    named = {source for _, source, _ in mounts() if not source.startswith(".")}
    assert named == set(COMPOSE["volumes"])
    files = [source for _, source, _ in mounts() if source.startswith(".")]
    assert files
    assert all((FOLDER / source).is_file() for source in files), files


def test_the_server_finds_ggufs_where_the_worker_made_them_and_cannot_change_them():
    assert "samq:/data" in SERVICES["worker"]["volumes"]
    assert "samq:/data:ro" in SERVICES["server"]["volumes"]
    assert "SAMQ_HOME=/data" in DOCKERFILE


def start_worker(folder, prefect):
    """The worker's program, with a module `prefect` in the place of the real one."""
    command = SERVICES["worker"]["command"]
    assert command[0] == "python"
    assert f"deployments/docker/{command[1]}" in copied()
    (folder / "prefect.py").write_text(prefect)
    environment = {
        "PYTHONPATH": f"{folder}:{ROOT}",
        "SAMQ_HOME": str(folder),
        "PREFECT_API_URL": "http://prefect:4200/api",
    }
    return subprocess.Popen([sys.executable, FOLDER / command[1]], cwd=folder, env=os.environ | environment)


@pytest.mark.parametrize(("fails", "status"), [("work-pool", 1), ("deploy", 1), ("worker", 7)])
def test_the_workers_container_ends_when_the_worker_does_or_cannot_be_started(fails, status, tmp_path):
    note = "import sys; print(*sys.argv[1:], file=open('calls', 'a'));"
    container = start_worker(tmp_path, f"{note} sys.exit(7 * ({fails!r} in sys.argv))")
    assert container.wait() == status
    assert fails in (tmp_path / "calls").read_text().splitlines()[-1].split()


def test_a_run_may_say_that_it_was_ended_before_the_workers_container_stops(tmp_path):
    """Prefect's worker, here as there, kills its runs when it is asked to end."""
    run = "trap 'sleep 0.3; touch ended; exit' TERM; touch running; while :; do sleep 0.1; done"
    container = start_worker(
        tmp_path,
        f"""
import signal, subprocess, sys
if "worker" in sys.argv:
    run = subprocess.Popen(["sh", "-c", {run!r}])
    signal.signal(signal.SIGTERM, lambda *_: (run.kill(), sys.exit()))
    run.wait()
""",
    )
    while not (tmp_path / "running").exists():
        assert container.poll() is None
        time.sleep(0.05)
    container.terminate()
    assert container.wait() == 0
    assert (tmp_path / "ended").exists()


def test_prefect_knows_every_setting_that_a_service_is_given(monkeypatch):
    given = {
        name: value
        for service in SERVICES.values()
        for name, value in service.get("environment", {}).items()
        if name.startswith("PREFECT_")
    }
    assert "PREFECT_SERVER_UI_STATIC_DIRECTORY" in given
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert given.keys() <= Settings().to_environment_variables(exclude_unset=True).keys()


def test_prefects_page_is_made_in_a_volume_that_the_images_user_may_write(tmp_path):
    from prefect.server.api.server import create_ui_app  # takes 3 s

    service = SERVICES["prefect"]
    folder = Path(service["environment"]["PREFECT_SERVER_UI_STATIC_DIRECTORY"])
    assert folder.is_relative_to(service["volumes"][0].split(":")[1])
    with temporary_settings({PREFECT_UI_STATIC_DIRECTORY: str(tmp_path / "ui")}):
        create_ui_app(ephemeral=False)
    assert (tmp_path / "ui" / "v2" / "index.html").exists()


def test_only_the_server_which_asks_for_a_key_is_reachable_from_other_machines():
    open_ports = [
        name for name, service in SERVICES.items() for port in service.get("ports", []) if port.count(":") < 2
    ]
    assert open_ports == ["server"]
    assert SERVICES["server"]["environment"]["SAMQ_API_KEY"].startswith("${SAMQ_API_KEY:?")
    assert all(
        port.startswith("127.0.0.1:")
        for name in SERVICES
        if name != "server"
        for port in SERVICES[name].get("ports", [])
    )


def test_no_password_is_written_down():
    secrets = re.findall(r"\$\{(\w*(?:KEY|PASSWORD)\w*)(.*?)\}", (FOLDER / "compose.yaml").read_text())
    assert {name for name, _ in secrets} == {"SAMQ_API_KEY", "POSTGRES_PASSWORD", "GRAFANA_PASSWORD"}
    assert all(rest.startswith(":?") for _, rest in secrets), "each must be given"


def test_a_service_that_others_wait_for_says_when_it_is_healthy():
    awaited = {other for service in SERVICES.values() for other in service.get("depends_on", {})}
    assert awaited <= {name for name, service in SERVICES.items() if "healthcheck" in service}


def test_services_name_each_other_by_the_ports_they_listen_at():
    (target,) = PROMETHEUS["scrape_configs"][0]["static_configs"][0]["targets"]
    sources = yaml.safe_load((ROOT / "deployments/monitoring/grafana/datasources.yaml").read_text())["datasources"]
    urls = [f"http://{target}", *(source["url"] for source in sources)]
    urls += [
        url for service in SERVICES.values() for url in map(str, service.get("environment", {}).values())
        if re.match(r"http://(?!127)", url)
    ]  # fmt: skip
    assert len(urls) == 5
    for name, port in (re.match(r"http://(\w+):(\d+)", url).groups() for url in urls):
        assert any(one.endswith(f":{port}") for one in SERVICES[name]["ports"]), f"{name} does not listen at {port}"


def test_mlflow_lets_the_other_services_and_a_browser_here_in():
    from mlflow.server.security_utils import is_allowed_host_header  # takes 3 s

    (option,) = [one for one in SERVICES["mlflow"]["command"] if one.startswith("--allowed-hosts=")]
    allowed = option.removeprefix("--allowed-hosts=").split(",")
    for host in ("mlflow:5000", "127.0.0.1:5000", "localhost:5000"):
        assert is_allowed_host_header(allowed, host)
    assert not is_allowed_host_header(allowed, "elsewhere.example:5000")


@cache
def compose_command():
    """`docker compose`, or `docker-compose`, and whether that is version 1; None without both."""
    plugin = ("docker", "compose")
    if shutil.which("docker") and not subprocess.run([*plugin, "version"], capture_output=True).returncode:
        return plugin, False
    if shutil.which("docker-compose") is None:
        return None
    answer = subprocess.run(["docker-compose", "version", "--short"], capture_output=True, text=True, check=True)
    return ("docker-compose",), answer.stdout.startswith("1.")


def compose_reads(text, secrets=("SAMQ_API_KEY", "POSTGRES_PASSWORD", "GRAFANA_PASSWORD")):
    """What compose says of a file; it needs no daemon for that."""
    if compose_command() is None:
        pytest.skip("NOT TESTED: compose.yaml, as docker compose is missing (Debian: the package docker-compose)")
    command, is_old = compose_command()
    if is_old:
        text = text.replace("\nname: samq\n", "\n")  # a key that version 1, which is Debian's, does not know
    command = [*command, "--file", "-", "--project-directory", str(FOLDER), "config", "--quiet"]
    environment = {"PATH": os.environ["PATH"], **dict.fromkeys(secrets, "secret")}
    return subprocess.run(command, input=text, env=environment, capture_output=True, text=True, check=False)


def test_docker_compose_accepts_the_file():
    done = compose_reads((FOLDER / "compose.yaml").read_text())
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("right", "wrong", "complaint"),
    [
        ("    restart: unless-stopped\n", "    restarts: unless-stopped\n", "restarts"),
        ("condition: service_healthy", "condition: healthy", "depends_on"),
        ("depends_on: {postgres:", "depends_on: {database:", "database"),
        ("  grafana:\n", "", "grafana"),  # declared last, as a volume
    ],
)
def test_docker_compose_notices_a_fault(right, wrong, complaint):
    before, separator, after = (FOLDER / "compose.yaml").read_text().rpartition(right)
    assert separator
    done = compose_reads(before + wrong + after)
    assert done.returncode
    assert complaint in done.stderr


def test_docker_compose_starts_nothing_without_the_secrets():
    done = compose_reads((FOLDER / "compose.yaml").read_text(), secrets=())
    assert done.returncode
    assert "set one" in done.stderr
