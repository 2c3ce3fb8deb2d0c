"""A Ray cluster of this machine's own, for as long as its stdin is open.

`python ray_cluster.py CPUS` prints its address. Ray's own `stop` would end every Ray of this
machine; this ends its own.
"""

import sys

from ray.cluster_utils import Cluster

if __name__ == "__main__":
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": int(sys.argv[1]), "include_dashboard": False},
    )
    try:
        print(f"address {cluster.address}", flush=True)
        sys.stdin.read()
    finally:
        cluster.shutdown()
