"""Mixture of experts: which experts a token goes to, the way there and back, and the experts' own products.

    routing = route(x, kernel, top_k=2)                     # router in float32; two losses
    rows = dispatch(x, routing, experts)                    # tokens by expert, on the devices that have them
    h = jax.nn.silu(product(rows, gate)) * product(rows, up)
    y = combine(product(h, down), routing)                  # weighted by the router, where x was

On one device that is all there is. Where `jzero.shard` splits examples over a mesh axis `expert` and rules put a dim of the
weights on it, `dispatch` and `combine` are the all-to-alls over that axis. `swiglu` is the four lines above.
"""

from jzero.moe.experts import Rows as Rows
from jzero.moe.experts import capacity_of as capacity_of
from jzero.moe.experts import combine as combine
from jzero.moe.experts import dispatch as dispatch
from jzero.moe.experts import product as product
from jzero.moe.experts import swiglu as swiglu
from jzero.moe.place import Place as Place
from jzero.moe.routing import Routing as Routing
from jzero.moe.routing import route as route
