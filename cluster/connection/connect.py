"""The Ray connection of a command: a private cluster on this machine, or an existing one, refused within seconds if it
cannot be used.

Where Ray waits, retries or aborts (a wrong token: 22 s; no Ray node on this machine: 60 s), one cheap authenticated
call to the cluster's control service (GCS) is made first and its answer turned into a sentence.
"""

import contextlib
import gc
import logging
import os
import socket
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ray

from espalier.cluster.connection import authentication
from espalier.cluster.connection import code_package as package
from espalier.cluster.connection.folders import own_folder
from espalier.cluster.connection.versions import check_nodes
from espalier.cluster.connection.watchdog import watched
from espalier.stages.errors import Refusal

NOTHING: Mapping[str, Path] = MappingProxyType({})
PROBE_SECONDS = 4.0  # for the TCP connection and again for the call: together under the ten seconds promised
LONGEST_TEMP = 16  # characters; Ray's socket paths add up to 90, and Linux allows 107
JOB_SETTINGS = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray for the entrypoint of a submitted job


@contextlib.contextmanager
def connect(
    address: str | None, *, cpus: int, object_store_bytes: int, gpus: int = 0, own: Mapping[str, Path] = NOTHING
) -> Iterator[None]:
    """Holds a Ray connection for the block: to `address`, else to RAY_ADDRESS, else to a new cluster on this machine.

    Ray sets RAY_ADDRESS inside a submitted job, so there the cluster that runs the job is used. "local" always means a
    new cluster. A connection that this process has already (a notebook's `ray.init`) is used as it is and left open.
    `cpus`, `gpus` and `object_store_bytes` shape a new cluster only; `own` is for another one: see `existing_cluster`.
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    if ray.is_initialized():
        here = ray.get_runtime_context().gcs_address
        if address is not None and (address == "local" or endpoint_of(address) != here):
            raise Refusal(f"--address {address}: this process is connected to Ray at {here}; ray.shutdown() first")
        yield
    elif address is None or address == "local":
        with local_cluster(cpus=cpus, object_store_bytes=object_store_bytes, gpus=gpus):
            yield
    else:
        with existing_cluster(address, own):
            yield


@contextlib.contextmanager
def local_cluster(*, cpus: int, object_store_bytes: int, gpus: int = 0) -> Iterator[None]:
    """Holds a new Ray cluster on this machine for the block: never another one, with a token of its own, no dashboard.

    Its files, the token's and the spilled objects' included, are in a private temporary directory that goes with it.
    """
    temporary = tempfile.gettempdir()
    with own_folder(Path(temporary if len(temporary) <= LONGEST_TEMP else "/tmp")) as home, watched(home):
        token_path = authentication.new_token_file(home)
        settings: dict[str, str | None] = {
            authentication.MODE: "token",
            authentication.TOKEN_PATH: str(token_path),
            authentication.TOKEN: None,
            "RAY_ADDRESS": None,
            JOB_SETTINGS: None,  # inside a Ray job: this cluster does not have that job's packages
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # Ray's 15 lets any other program starve the run that its user waits for
        }
        with authentication.ray_environment(settings):
            try:
                _start(cpus, gpus, object_store_bytes, home / "ray")
                yield
            finally:
                _disconnect()


def _start(cpus: int, gpus: int, object_store_bytes: int, directory: Path, attempts: int = 2) -> None:
    try:
        ray.init(
            address="local",
            num_cpus=cpus,
            num_gpus=gpus,
            object_store_memory=object_store_bytes,
            include_dashboard=False,
            _temp_dir=str(directory),
            **_quiet(),
        )
    except Exception as error:  # Ray raises no class of its own for it, after half a minute that cannot be set
        if "timed out during startup" not in str(error):
            raise
        _disconnect()
        if attempts > 1:  # by now what it reads is in the page cache
            return _start(cpus, gpus, object_store_bytes, directory, attempts - 1)
        raise Refusal(
            "Ray did not start within 30 s, twice: this machine is very busy; try again when it is less so"
        ) from error
    return None


@contextlib.contextmanager
def existing_cluster(address: str, own: Mapping[str, Path] = NOTHING) -> Iterator[None]:
    """Holds a connection to the cluster at `address` ("host:port" of its head, or "auto") for the block.

    Its workers run this process's own copy of the project, in its directory, beside the user's modules in `own` (file
    names there -> the files here): give them absolute paths. Raises Refusal
    within ten seconds when nothing listens there, what listens is no Ray cluster, the token is missing or wrong, or
    this machine is no node of the cluster; and for a node with other versions than here.
    """
    credentials = authentication.find_credentials()
    endpoint = endpoint_of(address)
    with authentication.ray_environment(credentials.environment):
        probe(endpoint, credentials)
        try:
            _attach(endpoint, own)
            check_nodes()
            yield
        finally:
            _disconnect()


def probe(endpoint: str, credentials: authentication.Credentials) -> None:
    """Returns if a Ray cluster answers at `endpoint`, takes the token and has a node here; raises Refusal otherwise."""
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated.gcs_service_pb2 import GetAllNodeInfoRequest  # type: ignore[attr-defined]
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

    what = f"the Ray cluster at {endpoint}"
    reachable(endpoint, what)
    channel = init_grpc_channel(endpoint)  # Ray's own: its TLS settings and the token are in it
    try:
        answer = NodeInfoGcsServiceStub(channel).GetAllNodeInfo(GetAllNodeInfoRequest(), timeout=PROBE_SECONDS)
    except grpc.RpcError as error:
        if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            raise credentials.refused_by(what) from error
        raise Refusal(
            f"{endpoint} is not the control service of a Ray cluster ({error.code().name.lower()}); "
            f"give host:port of the head node, port 6379 unless `ray start --port` said otherwise"
        ) from error
    finally:
        channel.close()
    alive = {entry.node_id.hex() for entry in answer.node_info_list if entry.state == 0}
    if not alive.intersection(_raylets_here()):
        raise Refusal(
            f"{what} has {len(alive)} nodes and this machine is none of them; `espalier submit --address "
            f"http://{endpoint.rpartition(':')[0]}:8265 -- …`, or join with `ray start --address={endpoint}`"
        )


def reachable(endpoint: str, what: str) -> None:
    """Returns if something listens at `endpoint` (host:port); raises Refusal, after PROBE_SECONDS at most, if not."""
    host, _, port = endpoint.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_SECONDS).close()
    except OSError as error:
        reason = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
        raise Refusal(f"{what} cannot be reached: {reason}; is it running, and is the address right?") from error


def endpoint_of(address: str) -> str:
    """`address` as host:port. Raises Refusal for "auto" without a cluster and for addresses of another kind."""
    from ray._private.services import canonicalize_bootstrap_address

    wanted = "give host:port of the head node, for example 10.0.0.1:6379"
    if address.startswith("ray://"):
        raise Refusal(f"--address {address}: Ray Client is not supported; {wanted}, or use `espalier submit`")
    if "://" in address:
        raise Refusal(f"--address {address}: that is a dashboard, which takes jobs (`espalier submit`); {wanted}")
    port = address.rpartition(":")[2]
    if address != "auto" and not (port.isdecimal() and 0 < int(port) < 65536):
        raise Refusal(f"--address {address}: no port, or none that can be; {wanted}")
    try:
        endpoint = canonicalize_bootstrap_address(address)
    except (ConnectionError, ValueError, OSError) as error:
        reason = "no Ray cluster runs on this machine" if address == "auto" else _first_line(error)
        raise Refusal(f"--address {address}: {reason}; {wanted}") from error
    if endpoint is None:  # RAY_ADDRESS=local, asked for by --address auto
        raise Refusal(f"--address {address}: RAY_ADDRESS names no cluster; {wanted}")
    return endpoint


def _attach(endpoint: str, own: Mapping[str, Path]) -> None:
    """Opens the connection, with the project shipped to the workers unless the job around this process brought it."""
    with contextlib.ExitStack() as stack:
        shipped = None
        if JOB_SETTINGS not in os.environ:
            shipped = {"working_dir": str(stack.enter_context(package.staged(demo_model=False, own=own)))}
        try:
            ray.init(address=endpoint, runtime_env=shipped, **_quiet())
        except (ConnectionError, RuntimeError, ValueError) as error:
            if "Version mismatch" in str(error):  # of Ray and Python: both sides are in it, a line each
                both = " ".join(str(error).split())
                raise Refusal(f"the Ray cluster at {endpoint} refuses: {both}; install the same on both") from error
            raise Refusal(f"the Ray cluster at {endpoint} answers but refuses: {_first_line(error)}") from error


def _disconnect() -> None:
    """Ends the connection. An object reference that is freed while Ray shuts down ends the process, with no word said.

    A lost shard leaves references in cycles (exceptions, their frames), for any thread's collection to free: so they
    are freed first, and there is no collection until Ray is done.
    """
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        ray.shutdown()
    finally:
        if collects:
            gc.enable()


def _quiet() -> dict[str, Any]:
    return {"namespace": f"espalier-{uuid.uuid4().hex[:12]}", "log_to_driver": False, "logging_level": logging.WARNING}


def _raylets_here() -> set[str]:
    """Ids (hex) of the Ray nodes that run on this machine; ray.init looks for them in the same way, for a minute."""
    from ray._private.services import find_node_ids

    return set(find_node_ids())


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
