"""Train one model with whoever else runs this, on this machine or others:

    mycel up                                     # somewhere; then, in another terminal:
    mycel ticket                                 # one string to paste
    python examples/diloco.py mycel1...          # twice or more; later ones come in, and any may be killed

Each draws data of its own; after every 20 steps all have the same weights, to the bit.
"""

from __future__ import annotations

import argparse
import hashlib

import torch

import mycel


def batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Points, and what is to be learned of them."""
    x = torch.rand(64, 2, generator=generator) * 4 - 2
    return x, torch.sin(2 * x[:, :1]) * torch.cos(2 * x[:, 1:])


def main() -> None:
    """Join, train, and say how it goes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("ticket", help="of `mycel ticket`")
    parser.add_argument("--least", type=int, default=2, help="peers without which it waits")
    parser.add_argument("--outer", type=int, default=50, help="outer steps, in all")
    parser.add_argument("--preset", default="lan", help="local, lan or wan, as for `mycel up`")
    parser.add_argument("--save", default="", help="write a checkpoint there at the end")
    parser.add_argument("--resume", default=None, help="begin with a checkpoint")
    options = parser.parse_args()
    model = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    own = torch.Generator()
    own.seed()
    joined = mycel.join(options.ticket, preset=options.preset)
    with joined as swarm, swarm.group("example", least=options.least, quorum="any") as peers:
        diloco = mycel.DiLoCo(model, peers, mycel.BorderOptions(every=20), resume=options.resume)
        while diloco.outer_steps < options.outer:
            x, y = batch(own)
            loss = torch.nn.functional.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step := diloco.step():
                print(
                    f"outer step {step.number}: {step.contributors} peers, loss {loss.item():.4f}", flush=True
                )
        diloco.finish()
        peers.barrier()  # nobody leaves while another still asks for the end
        if options.save:
            diloco.save(options.save)
    print("weights", hashlib.sha256(diloco.weights.tobytes()).hexdigest()[:16])


if __name__ == "__main__":
    main()
