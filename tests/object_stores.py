"""Contents of Ray's object store on each node; needs grpcio."""

from typing import Any


def object_stores(ray: Any) -> list[tuple[int, int]]:
    """Objects in the store of each node that is alive, and their bytes."""
    from ray._private.internal_api import node_stats

    nodes = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeID"])
    places = [(node["NodeManagerAddress"], node["NodeManagerPort"]) for node in nodes]
    stores = [node_stats(*place, include_memory_info=False).store_stats for place in places]
    return [(store.num_local_objects, store.object_store_bytes_used) for store in stores]
