"""Which stock architecture a net is: the one that every engine has code for already.

| norm | positions | query/key norm | MLP | architecture |
|---|---|---|---|---|
| RMSNorm | rotary | yes | SwiGLU, ReLU² | qwen3; ReLU² is ReLU gated by its own input: relu(h) h = relu(h)² |
| RMSNorm | rotary | no | SwiGLU | mistral, or llama where linear maps have a bias |
| RMSNorm | rotary | no | GELU, ReLU² | arcee |
| LayerNorm | rotary | no | GELU, ReLU² | starcoder2 |
| LayerNorm | rotary | no | SwiGLU | stablelm |
| LayerNorm | learned | no | GELU, ReLU² | gpt2 |

Mistral's is Llama's with a window: beyond `block_size` tokens it sees the last `block_size`, as our cache does. So do
qwen3 and starcoder2; the others see everything, also what lies further back than they were trained for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from lmlight.errors import UserError
from lmlight.models import Net, Transformer

WINDOWED = ("qwen3", "mistral", "starcoder2")


class UnsupportedArchitecture(NamedTuple):
    """Why a net has no stock architecture.

    Attributes:
        option: of `Transformer`.
        fits: the value of it that is nearer to one.
        why: which combination nobody has.
    """

    option: str
    fits: Any
    why: str


def stock(config: dict[str, Any]) -> str | UnsupportedArchitecture:
    """The architecture of a `Transformer` with these arguments, or what stands in the way."""
    norm, positions, mlp, qk_norm, bias = (config[k] for k in ("norm", "positions", "mlp", "qk_norm", "bias"))
    if positions == "learned":
        if norm != "layernorm":
            return UnsupportedArchitecture(
                "norm", "layernorm", "no stock architecture has learned positions with RMSNorm"
            )
        if qk_norm:
            return UnsupportedArchitecture(
                "qk_norm", False, "no stock architecture has learned positions with query/key norm"
            )
        if mlp == "swiglu":
            return UnsupportedArchitecture("mlp", "gelu", "no stock architecture has learned positions with SwiGLU")
        if config["n_kv_head"] not in (None, config["n_head"]):
            return UnsupportedArchitecture(
                "n_kv_head", None, "no stock architecture has learned positions with grouped heads"
            )
        return "gpt2"
    if norm == "layernorm":
        if qk_norm:
            return UnsupportedArchitecture(
                "qk_norm", False, "no stock architecture has LayerNorm with RMSNorm of queries and keys"
            )
        if mlp != "swiglu":
            return "starcoder2"
        return (
            UnsupportedArchitecture("bias", False, "no stock architecture has LayerNorm, SwiGLU and a bias")
            if bias
            else "stablelm"
        )
    if qk_norm:
        if mlp == "gelu":
            return UnsupportedArchitecture("mlp", "relu2", "no stock architecture has query/key norm with GELU")
        return (
            UnsupportedArchitecture("bias", False, "no stock architecture has query/key norm with a bias")
            if bias
            else "qwen3"
        )
    if mlp == "swiglu":
        return "llama" if bias else "mistral"
    return "arcee"


def architecture_of(net: Net) -> str:
    """The stock architecture of a net.

    Raises:
        UserError: it has none; the message says which option stands in the way, and what would fit.
    """
    if not isinstance(net, Transformer):
        raise UserError(f"a {type(net).__name__} has no stock architecture in other engines: export a Transformer")
    found = stock(net.config)
    if isinstance(found, UnsupportedArchitecture):
        value, fits = ("null" if v is None else str(v).lower() for v in (net.config[found.option], found.fits))
        raise UserError(
            f"{found.why}: this net has {found.option} {value}, and {fits} would fit; "
            f"train one with --model.net.{found.option} {fits}"
        )
    return found
