"""The base models of a gateway, by the names that requests use."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

from easyspec.errors import ConfigurationError, UnavailableError, UnknownModelError
from easyspec.speculation.messages import ModelInfo
from gateway.generation.generator import Generator
from gateway.peers.peer import PeerState
from gateway.peers.replica_set import ReplicaSet, first_done


class ServedModels:
    """One Generator per base model, in the order of the settings; the first one is for requests that name none.

    Models share drafters, keys and limits by key. Nothing else: each has its own places, and its own estimate of what
    speculation brings, so that a model whose verifiers are lost or slow takes nothing from another.
    """

    def __init__(self, generators: Sequence[Generator]) -> None:
        self._generators = tuple(generators)

    def __iter__(self) -> Iterator[Generator]:
        return iter(self._generators)

    @property
    def first(self) -> Generator:
        return self._generators[0]

    @property
    def infos(self) -> list[ModelInfo]:
        """The models whose verifiers have answered, by the names that requests use."""
        return [info for generator in self if (info := generator.model_info) is not None]

    @property
    def num_running(self) -> int:
        return sum(generator.num_running for generator in self)

    @property
    def peers(self) -> list[tuple[str, ReplicaSet[Any]]]:
        """Every set of replicas, with its role; drafters that models share are there once."""
        found: dict[int, tuple[str, ReplicaSet[Any]]] = {}
        for generator in self:
            found[id(generator.verifier_peer)] = ("verifier", generator.verifier_peer)
            if generator.drafter_peer is not None:
                found[id(generator.drafter_peer)] = ("drafter", generator.drafter_peer)
        return sorted(found.values(), key=lambda peer: peer[0], reverse=True)  # verifiers first

    def of(self, name: str) -> Generator:
        """The model that a request names, "" being the first; raises UnknownModelError, and UnavailableError while
        it may be one whose name is not known yet."""
        if not name:
            return self.first
        names = [generator.name for generator in self]
        if name in names:
            return self._generators[names.index(name)]
        if None in names:
            raise UnavailableError("a verifier has not answered yet, so that the name of its model is not known")
        raise UnknownModelError(name, ", ".join(filter(None, names)))

    async def wait_for_answer(self) -> None:
        """Return when the verifier of one model has answered, and every other service was asked once.

        Raises ConfigurationError if a verifier that answered has another vocabulary, and if two models have one name.
        """
        await first_done(*(generator.verifier_peer.wait_for_answer() for generator in self))
        await asyncio.gather(*(peer.probe() for _, peer in self.peers if peer.state is PeerState.UNREACHABLE))
        for generator in self:
            for role, peer in (("verifier", generator.verifier_peer), ("drafter", generator.drafter_peer)):
                if peer is not None and peer.state is PeerState.REFUSED:
                    whose = f" of {generator.name}" if len(self._generators) > 1 and generator.name else ""
                    misfit = next(replica.peer.misfit for replica in peer.replicas if replica.peer.misfit)
                    raise ConfigurationError(f"the {role}{whose} has another tokenizer: {misfit}")
            generator.note_padding()
        names = [generator.name for generator in self if generator.name is not None]
        for name in names:
            if names.count(name) > 1:
                raise ConfigurationError(f"further_models: the first model is called {name!r} too")

    async def watch(self) -> None:
        """Keep the state of all verifiers and drafters true until cancelled."""
        await asyncio.gather(*(peer.watch() for _, peer in self.peers))
