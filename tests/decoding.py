"""What a decoder computes, compared with the network on each row alone."""

import torch

from lmlight.generation import Decoder


def assert_batched_equals_alone(net, lengths):
    """For a batch of prompts of these lengths and two more tokens each."""
    rows = [torch.randint(11, (length + 2,)) for length in lengths]
    decoder = Decoder(net, len(rows))
    got = [decoder.prefill([ids[:length].tolist() for ids, length in zip(rows, lengths)])]
    for step in range(2):
        got.append(decoder.step(torch.stack([ids[n + step : n + step + 1] for ids, n in zip(rows, lengths)])))
    for row, (ids, length) in enumerate(zip(rows, lengths)):
        alone = net(ids[None])[0, length - 1 :]
        torch.testing.assert_close(torch.stack([logits[row] for logits in got]), alone, rtol=0, atol=1e-10)
