"""Which verifiers and drafters serve which model name, as set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

NO_DRAFTER = "off"


def check_addresses(addresses: str) -> str:
    """The list of addresses as it stands; ValueError if one of them is empty."""
    if not all(part.strip() for part in addresses.split(",")):
        raise ValueError("an address is empty")
    return addresses


def split_addresses(addresses: str) -> tuple[str, ...]:
    """The addresses of a list separated by commas, each once; a gRPC target that is such a list itself is one."""
    if addresses.startswith(("ipv4:", "ipv6:")):
        return (addresses,)
    return tuple(dict.fromkeys(part.strip() for part in addresses.split(",")))


Addresses: TypeAlias = Annotated[str, Field(min_length=1), AfterValidator(check_addresses)]


class FurtherModel(BaseModel):
    """A base model beside the first one. What is unset is as for the first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    verifier_address: Addresses = Field(description="As --verifier-address; no default.")
    tokenizer: Path | None = Field(default=None, description="As --tokenizer. Unset: the same.")
    drafter_address: Addresses | None = Field(
        default=None, description="As --drafter-address. Unset: the same; off: plain decoding."
    )
    chat_template: Path | None = Field(default=None, description="As --chat-template. Unset: the checkpoint's own.")


@dataclass(frozen=True)
class ModelRoute:
    """One model: its name ("" is what its verifiers call it), its verifiers and its drafters. `chat_template` is a file
    that stands in for the checkpoint's own template."""

    name: str
    tokenizer: Path
    verifier_addresses: tuple[str, ...]
    drafter_addresses: tuple[str, ...]
    chat_template: Path | None = None
