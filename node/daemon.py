"""Read this file first: every service of the node, in the order in which it starts."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Final

import trio

from aivillage import __version__
from aivillage.ledger.ledger import open_ledger
from aivillage.node import identity
from aivillage.node.buyer import Buyer
from aivillage.node.config import Origin, Settings, link_limits, worker_settings
from aivillage.node.control import Control, open_control
from aivillage.node.desk import Desk
from aivillage.node.discovery import Discovery
from aivillage.node.events import Events
from aivillage.node.gossip import Gossiper
from aivillage.node.herald import Herald
from aivillage.node.jobs import open_jobs
from aivillage.node.links import open_links
from aivillage.node.market import Market
from aivillage.node.monitor import Monitor
from aivillage.node.paths import Paths
from aivillage.node.pricelist import PriceList
from aivillage.node.pursuit import Trade
from aivillage.node.seller import Seller
from aivillage.node.switch import Switch
from aivillage.node.transport.libp2p import open_libp2p
from aivillage.node.villagers import Membership, Villagers
from aivillage.node.workers import open_workers
from aivillage.protocols.messages import VERSION_MAJOR, VERSION_MINOR, Hello
