"""The master's clients of instances' control ports, one per incarnation, over shared channels."""

from __future__ import annotations

import asyncio

from xllm_py.base.errors import XllmError
from xllm_py.base.tasks import TaskFamily
from xllm_py.cluster.instance_info import Card
from xllm_py.control.channels import Channels
from xllm_py.control.client import InstanceClient
from xllm_py.core.request import Submission
from xllm_py.master.submitter import Submitter


class Peers:
    """Opened once by the daemon."""

    def __init__(
        self,
        *,
        cluster_key: bytes,
        sender: str,
        timeout_s: float,
        channels: Channels,
        tasks: TaskFamily,
    ) -> None:
        self._cluster_key = cluster_key
        self._sender = sender
        self._timeout_s = timeout_s
        self._channels = channels
        self._tasks = tasks
        self._clients: dict[str, InstanceClient] = {}
        self._submitters: dict[str, Submitter] = {}

    def of(self, card: Card) -> InstanceClient:
        """The client of one life of an instance; a later life refuses its calls."""
        client = self._clients.get(card.incarnation_id)
        if client is None:
            client = self._clients[card.incarnation_id] = InstanceClient(
                card.rpc_address,
                cluster_key=self._cluster_key,
                sender=self._sender,
                timeout_s=self._timeout_s,
                addressee=card.incarnation_id,
                channels=self._channels,
            )
        return client

    def submit(self, card: Card, submission: Submission) -> asyncio.Future[XllmError | None]:
        """Hand a request to one life of an instance; see Submitter.submit."""
        submitter = self._submitters.get(card.incarnation_id)
        if submitter is None:
            submitter = self._submitters[card.incarnation_id] = Submitter(
                self.of(card), self._tasks
            )
        return submitter.submit(submission)

    async def forget(self, card: Card) -> None:
        """An incarnation is gone; its channel goes unless another one lives at the address."""
        self._submitters.pop(card.incarnation_id, None)
        if self._clients.pop(card.incarnation_id, None) is None:
            return
        if all(client.address != card.rpc_address for client in self._clients.values()):
            await self._channels.drop(card.rpc_address)

    async def close(self) -> None:
        """Close every channel."""
        await self._channels.close()
