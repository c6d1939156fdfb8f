"""Checks of a network before it is trained: does it satisfy the contract of `Net`?"""

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor

from lmlight.errors import UserError
from lmlight.models.base import Net
from lmlight.user_code import explained

VOCAB_SIZE, MAX_TOKENS = 32, 8  # sizes of the small network and its input


def check_net(make_net: Callable[[int, int], Net], block_size: int, check_causality: bool = True) -> None:
    """Make a network with a small vocabulary and check its methods on the CPU.

    Args:
        make_net: makes a network from (vocab_size, block_size).
        block_size: the longest context.
        check_causality: run the network; False only builds it on the meta device.

    Raises:
        UserError: it is not a `Net`, has no parameters, or a method raises an exception; its logits have the wrong shape,
            depend on later tokens, or differ from one call to the next or with its cache; its loss is not a scalar, or
            depends on weights that are not its parameters.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.device("cpu" if check_causality else "meta"))
        stack.enter_context(torch.no_grad())
        with explained("model.net cannot be created"):
            net = make_net(VOCAB_SIZE, block_size)
        if not isinstance(net, Net) or not hasattr(net, "training"):  # which nn.Module's constructor sets
            raise UserError(
                f"model.net must make an lmlight.models.Net, got {type(net).__name__}: derive the class from Net, and call "
                "super().__init__() in its constructor"
            )
        name = type(net).__name__
        if not any(parameter.requires_grad for parameter in net.parameters()):
            raise UserError(f"{name} has no parameters to train: assign its layers to attributes in __init__")
        if not check_causality:
            return
        for parameter in net.parameters():  # zero-initialized layers would hide what their outputs will depend on
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
        T = min(MAX_TOKENS, block_size)
        idx, other = torch.randint(VOCAB_SIZE, (2, 2, T))
        logits = _run(net, idx)
        if not _equal(logits, _run(net, idx)):
            raise UserError(
                f"{name} returns different logits when it is called again with the same ids: it must keep no state "
                "between calls and must use torch's global RNG; correct it, or pass --model.check_causality false"
            )
        _run(net, idx[:, :1])  # generation starts with short contexts
        for t in range(1, T):  # replace all tokens from position t on
            if not _equal(logits[:, :t], _run(net, torch.cat((idx[:, :t], other[:, t:]), 1))[:, :t]):
                raise UserError(
                    f"{name} is not causal: logits at positions before {t} changed with the tokens from position {t} "
                    "on; mask later positions, or pass --model.check_causality false"
                )
        with explained(f"{name}.flops_per_token failed"):
            int(net.flops_per_token())
        with torch.enable_grad(), explained(f"{name}.loss failed"):
            loss = net.loss(idx, other)
        check_loss(loss, f"{name}.loss")
        if not _leaves(loss) <= set(net.parameters()):
            raise UserError(
                f"{name} computes with weights that are not among its parameters, so they would be neither trained nor "
                "saved: assign layers to attributes, and use nn.ModuleList or nn.ParameterList in place of a list"
            )
        _check_cache(net.eval(), idx)  # without dropout, which would draw different numbers


def check_loss(loss: object, method: str) -> None:
    """Check the loss that a method returned.

    Raises:
        UserError: it is not a scalar tensor, or does not require a gradient.
    """
    if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad:
        found = f"a {type(loss).__name__}"
        if isinstance(loss, Tensor):
            found = f"shape {tuple(loss.shape)}" if loss.dim() else "one that is detached from the network"
        raise UserError(f"{method} must return a scalar tensor to call backward on, got {found}")


def _check_cache(net: Net, idx: Tensor) -> None:
    """Compare the logits with and without a cache, for two rows, the second of which is padded."""
    name, T = type(net).__name__, idx.size(1)
    pad = min(2, T - 1)
    with explained(f"{name}.make_cache failed"):
        cache = net.make_cache(2)
        if cache is None:
            return
        cache.set_padding([0, pad])
    starts = [0, *range(pad + 1, T)]  # the prompt, then single tokens
    with explained(f"{name}.forward(idx, cache=cache) failed"):
        steps = [net(idx[:, t:end], cache=cache)[:, -1:] for t, end in zip(starts, [*starts[1:], T])]
    logits = torch.cat(steps, 1)  # (2, T - pad, V)
    if not _equal(logits[0], _run(net, idx[:1])[0, pad:]):
        raise UserError(
            f"{name} returns different logits with its cache than without it, so it would generate different text: keep "
            "everything that forward needs from earlier tokens in the cache"
        )
    if not _equal(logits[1], _run(net, idx[1:, pad:])[0]):
        raise UserError(
            f"{name} returns different logits for a row whose prompt is shorter than another row's: ignore the first "
            "cache.padding[row] tokens of each row"
        )


def _run(net: Net, idx: Tensor) -> Tensor:
    torch.manual_seed(0)  # the same dropout in each call
    with explained(f"{type(net).__name__}.forward failed for ids of shape {tuple(idx.shape)}"):
        logits = net(idx)
    expected = (*idx.shape, VOCAB_SIZE)
    if not isinstance(logits, Tensor) or logits.shape != expected:
        found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise UserError(
            f"{type(net).__name__}.forward must return logits (batch, time, vocab_size): expected shape {expected} for ids "
            f"of shape {tuple(idx.shape)}, got {found}"
        )
    return logits


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True)  # training reports NaN


def _leaves(loss: Tensor) -> set[Tensor]:
    """The leaf tensors that a loss depends on, in which gradients accumulate."""
    nodes, found = {loss.grad_fn}, set[Tensor]()
    waiting = list(nodes)
    while waiting:
        if (node := waiting.pop()) is None:
            continue
        if hasattr(node, "variable"):
            found.add(node.variable)
        new = {function for function, _ in node.next_functions} - nodes
        nodes |= new
        waiting += new
    return found
