"""Push the policy's weights into a vLLM server: told over HTTP, sent over NCCL.

The trainer is rank 0 of a group with the workers of the server. Written against the NCCL weight-transfer engine of
vLLM 0.26. Tensors are packed into buckets, so that a model of many small tensors takes few broadcasts.
"""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from mmpost.core.errors import MmpostError
from mmpost.models.policy import Policy
from mmpost.rollout.vllm_http import START, Client, NotServed
from mmpost.rollout.vllm_wire import import_vllm
from mmpost.rollout.weights import announce, named_weights

BUCKET_BYTES = 256 * 2**20
# Buckets under way at once.
BUCKETS = 2


class WeightChannel:
    """A group of this process and the workers of one server."""

    def __init__(self, client: Client, port: int) -> None:
        """Open the group.

        Args:
            client: The server.
            port: Free port of this machine, where the group meets.

        Raises:
            MmpostError: MMP-E010 when vLLM is not installed here, MMP-E062 or MMP-E063 when the server cannot join.
        """
        self.client = client
        self._nccl = import_vllm("vllm.distributed.weight_transfer.nccl_engine")
        meeting = {
            "master_address": own_address(client.url),
            "master_port": port,
            "world_size": 1 + int(self._ask("/get_world_size")["world_size"]),
        }
        # Both sides wait for each other, so the server has to be told from another thread.
        with ThreadPoolExecutor(1) as pool:
            told = pool.submit(self._ask, "/init_weight_transfer_engine", {"init_info": {**meeting, "rank_offset": 1}})
            self._group = self._nccl.NCCLWeightTransferEngine.trainer_init(meeting)
            told.result()

    def push(self, policy: Policy, version: int, dtype: torch.dtype | None) -> None:
        """Send all weights.

        Args:
            policy: The module that trains.
            version: What the server shall call these weights.
            dtype: What floating-point weights are cast to before they are sent.
        """
        names, kinds, shapes = zip(*announce(policy, dtype), strict=True)
        packing = {"packed": True, "packed_buffer_size_bytes": BUCKET_BYTES, "packed_num_buffers": BUCKETS}
        update = {
            "names": list(names),
            "dtype_names": [str(kind).removeprefix("torch.") for kind in kinds],
            "shapes": list(shapes),
            **packing,
        }
        self._ask("/start_weight_update", {})
        with ThreadPoolExecutor(1) as pool:
            told = pool.submit(self._ask, "/update_weights", {"update_info": update})
            self._nccl.NCCLWeightTransferEngine.trainer_send_weights(
                iterator=named_weights(policy, dtype),
                trainer_args=self._nccl.NCCLTrainerSendWeightsArgs(group=self._group, **packing),
            )
            told.result()
        # Servers that keep no version ignore it.
        self._ask("/finish_weight_update", {"weight_version": str(version)})
        self._ask("/reset_prefix_cache", {})

    def close(self) -> None:
        """Leave the group; the server would else wait at its socket."""
        store: Any = getattr(self._group, "group", None)
        if store is not None:
            store.store = store.socket = None
        self._group = None

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        # Never repeated: weights flow while the server answers.
        try:
            return self.client.get(path) if body is None else self.client.post(path, body, again=False)
        except NotServed as error:
            raise MmpostError(
                "MMP-E062", f"the vLLM server at {self.client.url} does not serve {path}.", f"{START}."
            ) from error


def own_address(url: str) -> str:
    """Address of this machine as a server at ``url`` sees it."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Connecting a datagram socket sends nothing; it only picks the interface.
        probe.connect((host, int(port)))
        return str(probe.getsockname()[0])
