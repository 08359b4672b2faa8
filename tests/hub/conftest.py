"""The Hub's own fixtures."""

from tests.hub.fixture import client, hub, hub_without_xet, lfs_client, running_hub, xet_client

__all__ = ["client", "hub", "hub_without_xet", "lfs_client", "running_hub", "xet_client"]
