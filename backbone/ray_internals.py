"""Every interface of Ray that this project uses without its being public, and what a process may ask Ray safely.

`ray.get_runtime_context` and its like start a Ray where there is none; what is asked here doesn't.
"""

from __future__ import annotations

import socket
import time
from typing import Any

import ray
from ray._private import state
from ray.experimental import internal_kv
from ray.runtime_context import get_runtime_context

KV = b"wandb_run"  # our keys in the key-value store of Ray's GCS
_claimed: dict[str, str] = {}  # by runs of this process, also in an earlier Ray
_left: object = None  # the Ray of the process that this one is a fork of


def which_ray() -> object:
    """The Ray that this process is in, None if it is in none. A fork is not in the Ray of its parent.

    To be asked before a call of an actor: where Ray is not running any more, the call would start another one.
    """
    worker = ray._private.worker
    return worker._global_node if worker.global_worker.connected and worker._global_node is not _left else None


def leave() -> None:
    """This process is a fork."""
    global _left
    _left = which_ray() or _left


def ray_answers() -> bool:
    """Whether something listens at the address of the cluster's GCS. Who asks one that is gone waits for ever."""
    try:
        host, _, port = get_runtime_context().gcs_address.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
    except ConnectionRefusedError:
        return False
    except OSError:
        pass  # it is slow
    except Exception:  # Ray has left this process
        return False
    return True


def in_driver() -> bool:
    return get_runtime_context().worker.mode != ray.WORKER_MODE


def actor_kind() -> str:
    """The class of the actor in this process, "actor" while that is being constructed; nothing if there is none."""
    context = get_runtime_context()
    if not context.get_actor_id():
        return ""
    instance = context.worker.actors.get(context.worker.actor_id)
    return type(instance).__name__ if instance is not None else "actor"


def current_attempt() -> int:
    return get_runtime_context().worker.core_worker.get_current_task_attempt_number()


def restarts(actor: ray.actor.ActorHandle) -> int:
    """How often an actor has been restarted."""
    return state.actors(actor._actor_id.hex()).get("NumRestarts", 0)


def command(job: str) -> str:
    """The command line of a job's driver."""
    return next((found.get("Entrypoint", "") for found in state.jobs() if found["JobID"] == job), "")


def has_ended(job: str) -> bool:
    """Whether Ray knows within two seconds that a job has ended."""
    deadline = time.monotonic() + 2
    while ray_answers() and time.monotonic() < deadline:
        if any(found["JobID"] == job and found["IsDead"] for found in state.jobs()):
            return True
        time.sleep(0.1)
    return False


# The key-value store of the GCS. It can be asked anywhere: in callbacks of Ray's, and on the loop of an async actor.


def put(key: bytes, value: bytes, overwrite: bool = True) -> bool:
    """Whether the key was there before."""
    return bool(internal_kv._internal_kv_put(key, value, overwrite=overwrite, namespace=KV))


def get(key: bytes) -> Any:
    """None where there is no such key."""
    return internal_kv._internal_kv_get(key, namespace=KV)


def delete(key: bytes) -> None:
    internal_kv._internal_kv_del(key, namespace=KV)


def keys(prefix: bytes) -> list[bytes]:
    return internal_kv._internal_kv_list(prefix, namespace=KV)


def claim(what: str, nonce: str) -> bool:
    """Whether the run of this nonce is the first of its process and Ray job that claims something.

    It has it until `release`.
    """
    if what in _claimed or put(_claim(what), nonce.encode(), overwrite=False):
        return False
    _claimed[what] = nonce
    return True


def release(what: str, nonce: str) -> None:
    """Another run may have it, if this one had."""
    if _claimed.get(what) == nonce:
        del _claimed[what]
        delete(_claim(what))


def _claim(what: str) -> bytes:
    return f"claim/{get_runtime_context().get_job_id()}/{what}".encode()
