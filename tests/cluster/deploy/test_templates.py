"""The templates for Kubernetes, `ray up`, SkyPilot, Docker: their fields, what they refer to, the commands in them."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from typer.main import get_command

from espalier.pipeline.cli.flags import with_all_options
from espalier.pipeline.cli.main import app

ROOT = Path(__file__).resolve().parents[3]
DEPLOY = ROOT / "cluster" / "deploy"
RAYJOBS = ["rayjob-cpu.yaml", "rayjob-gpu.yaml"]
CONSTRAINTS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
# Names of fields, as KubeRay's and SkyPilot's own schemas have them; the core's as in Kubernetes' reference.
RAY_JOB = {
    *(
        "activeDeadlineSeconds",
        "backoffLimit",
        "clusterSelector",
        "deletionStrategy",
        "entrypoint",
        "entrypointNumCpus",
    ),
    *("entrypointNumGpus", "entrypointResources", "jobId", "managedBy", "metadata", "preRunningDeadlineSeconds"),
    *("rayClusterSpec", "runtimeEnvYAML", "shutdownAfterJobFinishes", "submissionMode", "submitterConfig"),
    *("submitterPodTemplate", "suspend", "ttlSecondsAfterFinished"),
}
RAY_CLUSTER = {
    *("authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions", "headGroupSpec"),
    *("headServiceAnnotations", "managedBy", "networkPolicy", "rayVersion", "suspend", "tlsOptions", "upgradeStrategy"),
    "workerGroupSpecs",
}
HEAD = {"enableIngress", "headService", "labels", "rayStartParams", "resources", "serviceType", "template"}
WORKERS = {
    *("groupName", "idleTimeoutSeconds", "labels", "maxReplicas", "minReplicas", "numOfHosts", "rayStartParams"),
    *("replicas", "resources", "scaleStrategy", "suspend", "template"),
}
CONTAINER = {"name", "image", "command", "args", "env", "envFrom", "ports", "resources", "volumeMounts", "lifecycle"}
TASK = {
    *("name", "workdir", "num_nodes", "resources", "file_mounts", "service", "setup", "run", "envs", "secrets"),
    *("config", "volumes", "pool", "event_callback", "managed_secrets", "volume_mounts", "api_server_access"),
}
RESOURCES = {
    *("infra", "accelerators", "accelerator_args", "cpus", "memory", "instance_type", "use_spot", "disk_size"),
    *("disk_tier", "network_tier", "image_id", "ports", "labels", "autostop", "any_of", "ordered", "job_recovery"),
}


def template(name: str) -> dict[str, Any]:
    content = yaml.safe_load((DEPLOY / name).read_text())
    assert isinstance(content, dict)
    return content


def pods(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    yield cluster["headGroupSpec"]["template"]["spec"]
    yield from (group["template"]["spec"] for group in cluster["workerGroupSpecs"])


def understood(arguments: list[str]) -> None:
    """Fails for a command line that `espalier` does not understand."""
    name, *rest = arguments
    with_all_options(get_command(app).commands[name]).make_context(name, rest)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", RAYJOBS)
def test_a_rayjob_has_fields_that_kuberay_has(name: str) -> None:
    job = template(name)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob") and set(job) == {
        *("apiVersion", "kind", "metadata", "spec")
    }
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", job["metadata"]["name"])
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    assert set(spec) <= RAY_JOB and set(cluster) <= RAY_CLUSTER and set(cluster["headGroupSpec"]) <= HEAD
    for group in cluster["workerGroupSpecs"]:
        assert {"groupName", "minReplicas", "maxReplicas", "template"} <= set(group) <= WORKERS
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    parameters = [
        cluster["headGroupSpec"]["rayStartParams"],
        *(g["rayStartParams"] for g in cluster["workerGroupSpecs"]),
    ]
    assert all(isinstance(value, str) for given in parameters for value in given.values()), "KubeRay takes strings"
    assert spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"] >= 0


@pytest.mark.parametrize("name", RAYJOBS)
def test_a_rayjobs_pods_have_one_image_the_shared_storage_and_what_they_mount(name: str) -> None:
    images = set()
    for pod in pods(template(name)):
        (container,) = pod["containers"]
        assert set(container) <= CONTAINER and container["resources"]["requests"] == container["resources"]["limits"]
        images.add(container["image"])
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert set(mounts) == set(volumes) and mounts["data"] == "/data" and mounts["shared-memory"] == "/dev/shm"
        assert volumes["data"]["persistentVolumeClaim"] == {"claimName": "espalier-data"}
    assert len(images) == 1
    workers = [pod["containers"][0]["resources"]["limits"] for pod in pods(template(name))][1:]
    assert all(("nvidia.com/gpu" in limits) is ("gpu" in name) for limits in workers)


@pytest.mark.parametrize("name", RAYJOBS)
def test_a_rayjobs_object_stores_fit_in_the_memory_that_is_mounted_for_them(name: str) -> None:
    cluster = template(name)["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
        limit = volumes["shared-memory"]["emptyDir"]["sizeLimit"]
        assert limit.endswith("Gi")
        assert 1.1 * int(group["rayStartParams"]["object-store-memory"]) < int(limit.removesuffix("Gi")) << 30


@pytest.mark.parametrize("name", RAYJOBS)
def test_a_rayjob_asks_for_a_token_runs_the_ray_of_the_constraints_and_a_command_that_there_is(name: str) -> None:
    spec = template(name)["spec"]
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert spec["rayClusterSpec"]["rayVersion"] == CONSTRAINTS["ray"]
    python, module, *command = shlex.split(spec["entrypoint"])
    assert (python, module, command[0]) == ("python", "-m", "espalier")
    understood(command[1:])
    mounted = {mount["mountPath"] for pod in pods(template(name)) for mount in pod["containers"][0]["volumeMounts"]}
    paths = [word for word in command if word.startswith("/")]
    assert paths and all(any(path.startswith(place) for place in mounted) for path in paths)


def test_the_ray_up_file_is_one_that_ray_takes_and_gives_every_node_the_token() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    given = template("ray-up.yaml")
    config = prepare_config(given)  # what `ray up` does before it reaches for a machine: defaults, then the schema
    validate_config(config)
    assert config["max_workers"] == len(given["provider"]["worker_ips"])
    assert given["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    starts = [*given["head_start_ray_commands"], *given["worker_start_ray_commands"]]
    starts = [line for line in starts if "ray start" in line]
    assert len(starts) == 2 and all(line.startswith("RAY_AUTH_MODE=token ray start ") for line in starts)
    assert any(option.startswith("--volume /data:/data") for option in given["docker"]["run_options"])
    offered = subprocess.run(
        [Path(sys.executable).with_name("ray"), "start", "--help"], capture_output=True, text=True
    ).stdout
    assert all(flag in offered for line in starts for flag in re.findall(r"--[a-z-]+", line))


def test_the_skypilot_task_has_fields_that_skypilot_has_and_runs_what_is_in_the_checkout(tmp_path: Path) -> None:
    task = template("skypilot.yaml")
    assert set(task) <= TASK and set(task["resources"]) <= RESOURCES and task["num_nodes"] == 2
    assert task["volumes"] == {"/data": "espalier-data"} and task["secrets"] == {"RAY_AUTH_TOKEN": None}
    for part in ("setup", "run"):
        (tmp_path / part).write_text(task[part])
        assert subprocess.run(["bash", "-n", str(tmp_path / part)], capture_output=True, text=True).stderr == ""
    assert "--constraint constraints.txt" in task["setup"] and (ROOT / task["workdir"] / "constraints.txt").exists()
    (line,) = re.findall(r"^bash (\S+) .*\\\n(.*)$", task["run"], re.MULTILINE)
    assert (ROOT / line[0]).exists()
    understood(shlex.split(line[1]))


def test_the_image_copies_what_there_is_and_installs_the_versions_of_the_constraints() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    copied = {source for name, *arguments in lines if name == "COPY" for source in arguments[:-1]}
    needed = {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "espalier", "pipeline", "cluster", "stages"}
    assert copied == needed and all((ROOT / source).exists() for source in copied)
    assert "==" not in text and "pip install --no-cache-dir --constraint constraints.txt ." in text
    (python,) = re.findall(r"^FROM python:(\d+\.\d+)-", text, re.MULTILINE)
    wanted = re.search(r'requires-python = "(.*)"', (ROOT / "pyproject.toml").read_text())
    assert wanted and python in SpecifierSet(wanted[1])
    assert ["USER", "ray"] in lines and "RAY_AUTH_MODE=token" in text


def test_every_template_has_its_section_and_says_what_is_to_be_changed() -> None:
    document = (DEPLOY / "README.md").read_text()
    for file in DEPLOY.iterdir():
        if file.name != "README.md":
            assert f"`cluster/deploy/{file.name}`" in document, file.name
    for name in (*RAYJOBS, "ray-up.yaml", "skypilot.yaml"):
        assert "# To be changed:" in (DEPLOY / name).read_text(), name
