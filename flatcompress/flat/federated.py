"""Training apart: clients with data of their own take flat steps and average with their neighbours, in one process.

Equation and algorithm numbers of the papers are not given here: their full texts were not at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flatcompress.errors import UserError, unknown
from flatcompress.registry import Registry

Closures = Sequence[Callable[..., Any]]


def ring(clients: int) -> Tensor:
    """Who talks to whom: each with the next and the one before; [clients, clients] bool."""
    near = torch.eye(clients, dtype=torch.bool)
    return near.roll(1, 1) | near.roll(-1, 1)


def full(clients: int) -> Tensor:
    """Each with every other."""
    return ~torch.eye(clients, dtype=torch.bool)


def exponential(clients: int) -> Tensor:
    """Each with those 1, 2, 4, 8 ... places away, on either side."""
    near = torch.eye(clients, dtype=torch.bool)
    found = torch.zeros_like(near)
    for power in range(max(1, math.ceil(math.log2(max(2, clients))))):
        found |= near.roll(2**power, 1) | near.roll(-(2**power), 1)
    return found


TOPOLOGIES = {"ring": ring, "full": full, "exponential": exponential}


def gossip_matrix(linked: Tensor) -> Tensor:
    """W of `TOPOLOGIES`' links: w_ij = 1 / (1 + max(d_i, d_j)) for neighbours, the rest on the diagonal; float64.

    Metropolis weights: symmetric, rows and columns sum to 1, as arXiv 2302.04083 wants of W. The sum of
    what clients hold stays what it was.

    >>> gossip_matrix(ring(4))[0]
    tensor([0.3333, 0.3333, 0.0000, 0.3333], dtype=torch.float64)
    """
    links = linked & ~torch.eye(len(linked), dtype=torch.bool)
    if not torch.equal(links, links.T):
        raise UserError("clients that are linked talk in both directions: the links must be symmetric.")
    degree = links.sum(1).double()
    weights = torch.where(links, 1 / (1 + torch.maximum(degree[:, None], degree[None])), 0.0)
    return weights + torch.diag(1 - weights.sum(1))


def spectral_gap(matrix: Tensor) -> float:
    """1 - lambda, lambda the second largest absolute eigenvalue of W: 1 mixes at once, 0 never."""
    sizes = torch.linalg.eigvalsh(matrix.double()).abs().sort(descending=True).values
    return 1 - float(sizes[1]) if len(sizes) > 1 else 1.0


@torch.no_grad()
def gossip(models: Sequence[nn.Module], matrix: Tensor, steps: int = 1) -> None:
    """x_i <- sum_l w_il x_l, ``steps`` times: weights and running statistics of every client (2302.04083).

    A client that hears nobody keeps its bits.
    """
    mixing = torch.linalg.matrix_power(matrix.double(), steps)
    for tensors in zip(*(_averaged(model) for model in models)):
        before = torch.stack([t.detach().double() for t in tensors])
        for i, tensor in enumerate(tensors):
            row = mixing[i]
            if float(row[i]) != 1.0:
                tensor.copy_(torch.tensordot(row, before, 1))


def _averaged(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from (buffer for buffer in model.buffers() if buffer.is_floating_point())


@dataclass
class Federation:
    """Clients that train apart: ``models[i]`` with ``optimizers[i]``, any of `flatcompress.flat.create`'s.

    ``matrix``: W, [clients, clients]; ``gossip_steps``: averages with the neighbours after each round (Q).
    """

    models: Sequence[nn.Module]
    optimizers: Sequence[Any]
    matrix: Tensor
    gossip_steps: int = 1

    def __post_init__(self) -> None:
        n = len(self.models)
        if not n or len(self.optimizers) != n or self.matrix.shape != (n, n):
            raise UserError(
                f"{n} models, {len(self.optimizers)} optimizers and a matrix {tuple(self.matrix.shape)}: each client "
                "has one of each, and a row and a column."
            )
        ones = torch.ones(n, dtype=torch.float64)
        if not all(torch.allclose(m.double().sum(1), ones) for m in (self.matrix, self.matrix.T)):
            raise UserError("the rows and columns of the gossip matrix must sum to 1.")
        if self.gossip_steps < 0:
            raise UserError(f"gossip_steps is at least 0, found {self.gossip_steps}.")

    def round(self, closures: Sequence[Closures]) -> float:
        """One round: client i takes a step for each closure of ``closures[i]``, then all gossip; the mean loss.

        UserError where there is not a list of closures for every client.
        """
        if len(closures) != len(self.models):
            raise UserError(f"{len(closures)} lists of closures for {len(self.models)} clients.")
        losses = [float(opt.step(c)) for opt, own in zip(self.optimizers, closures) for c in own]
        gossip(self.models, self.matrix, self.gossip_steps)
        return sum(losses) / max(1, len(losses))

    @property
    def disagreement(self) -> float:
        """Mean squared distance of the clients' weights from their average."""
        with torch.no_grad():
            stacks = [torch.stack(same) for same in zip(*(m.parameters() for m in self.models))]
            spread = sum(float((stack - stack.mean(0)).square().sum()) for stack in stacks)
        return spread / len(self.models)


def dfedsam(
    models: Sequence[nn.Module], optimizers: Sequence[Any], topology: str = "ring", gossip_steps: int = 1
) -> Federation:
    """DFedSAM (arXiv 2302.04083): local SAM steps, then z_i <- sum_l w_il z_l over neighbours, Q times.

    ``optimizers``: one `flatcompress.flat.create("sam", ...)` a client; with "none" it is DFedAvg. ``gossip_steps``: Q;
    more than 1 is DFedSAM-MGS. One client alone is plain training, bit for bit. UserError for an unknown topology.
    """
    if topology not in TOPOLOGIES:
        raise unknown("topology", topology, TOPOLOGIES)
    return Federation(models, optimizers, gossip_matrix(TOPOLOGIES[topology](len(models))), gossip_steps)


def dfedsam_mgs(
    models: Sequence[nn.Module], optimizers: Sequence[Any], topology: str = "ring", gossip_steps: int = 4
) -> Federation:
    """DFedSAM-MGS: `dfedsam` with several averages after each round (arXiv 2302.04083, with Q = 4)."""
    return dfedsam(models, optimizers, topology, gossip_steps)


FEDERATIONS = Registry("federation")
FEDERATIONS.add("dfedsam", dfedsam, "SAM on clients' own data, averaged with their neighbours", "2302.04083")
FEDERATIONS.add("dfedsam-mgs", dfedsam_mgs, "as dfedsam, averaged several times a round", "2302.04083")
