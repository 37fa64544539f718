"""`python -m gateway`: wiring only."""

from __future__ import annotations

import sys

from easyspec.rpc.lifecycle import run_role
from gateway.service.config import GatewaySettings
from gateway.service.server import GatewayServer

if __name__ == "__main__":
    sys.exit(run_role("gateway", GatewaySettings, GatewayServer))
