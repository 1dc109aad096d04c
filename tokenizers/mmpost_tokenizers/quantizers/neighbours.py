"""Which codes are nearest: from a list of vectors, or counted on a lattice of which no list fits into memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Largest piece of a distance matrix, in float64 numbers: 64 MiB.
MAX_NUMBERS = 1 << 23


def nearest_codes(codes: Tensor, count: int) -> Tensor:
    """For each code the ``count`` nearest codes, itself first.

    Args:
        codes: ``[K, c]``.
        count: 1..K.

    Returns:
        int32 ``[K, count]``, by rising distance. Distances are float64: expanding a square loses half the digits.
    """
    own = torch.arange(len(codes), device=codes.device)
    return nearest_to(codes, own, codes, count)


def nearest_to(points: Tensor, own: Tensor, codes: Tensor, count: int) -> Tensor:
    """For each point the ``count`` nearest codes.

    Args:
        points: ``[n, c]``.
        own: int64 ``[n]``, the code of each point; it always comes first, whatever rounding says.
        codes: ``[K, c]``.
        count: 1..K.

    Returns:
        int32 ``[n, count]``, by rising distance.
    """
    codes = codes.detach().double()
    squares = codes.square().sum(1)
    rows = max(1, MAX_NUMBERS // len(codes))
    tables = []
    for part, first in zip(points.detach().split(rows), own.split(rows), strict=True):
        # |p - e|^2 less |p|^2, which is the same for all codes.
        distances = torch.addmm(squares, part.double(), codes.T, alpha=-2)
        distances.scatter_(1, first[:, None], -math.inf)
        tables.append(distances.topk(count, dim=1, largest=False).indices.int())
    return torch.cat(tables) if tables else own.new_zeros(0, count, dtype=torch.int32)


def lattice_neighbours(indices: Tensor, ranks: Tensor, uniforms: Tensor, levels: tuple[int, ...]) -> Tensor:
    """Codes at given ranks of distance on a product of evenly spaced levels, without listing the codes.

    Many codes are equally far from a given one. Their order is drawn anew for every index: the code at rank r is
    uniform among the codes whose distance stands at place r of the sorted distances. A uniform rank below delta
    therefore gives a uniform draw from the delta nearest codes, with ties at the border broken at random.

    Args:
        indices: int64 ``[n]``, digits in mixed radix, first channel fastest.
        ranks: int64 ``[n]``, from 0 (the code itself) to the number of codes less 1.
        uniforms: float in [0, 1), ``[n, len(levels)]``; breaks ties.
        levels: Levels per channel; channel d has ``levels[d] // 2`` steps per unit of length.

    Returns:
        int64 ``[n]``.
    """
    halves = [count // 2 for count in levels]
    common = math.lcm(*halves)
    # Squared distances in units of 1 / common^2 are whole numbers, and add up over channels.
    units = [(common // half) ** 2 for half in halves]
    longest = sum(unit * (count - 1) ** 2 for unit, count in zip(units, levels, strict=True))
    codes, place = indices.unique(return_inverse=True)
    found = torch.empty_like(indices)
    rows = max(1, MAX_NUMBERS // ((longest + 1) * (len(levels) + 1)))
    for first in range(0, len(codes), rows):
        part = codes[first : first + rows]
        costs = _digit_costs(part, levels, units)
        ways = _ways(costs, longest)
        mine = ((place >= first) & (place < first + rows)).nonzero().squeeze(1)
        for some in mine.split(max(1, MAX_NUMBERS // (longest + 1))):
            found[some] = _draw(place[some] - first, ranks[some], uniforms[some], costs, ways)
    return found


def _ways(costs: list[Tensor], longest: int) -> list[Tensor]:
    """For each code, item d at t: choices of digits d, d+1, ... at squared distance t in all. Exact below 2^53."""
    ways = [torch.zeros(len(costs[0]), longest + 1, dtype=torch.float64, device=costs[0].device)]
    ways[0][:, 0] = 1
    places = torch.arange(longest + 1, device=costs[0].device)
    for cost in reversed(costs):
        total = torch.zeros_like(ways[0])
        for digit in range(cost.shape[1]):
            before = places - cost[:, digit, None]
            total += torch.where(before >= 0, ways[0].gather(1, before.clamp(min=0)), 0.0)
        ways.insert(0, total)
    return ways


def _draw(place: Tensor, ranks: Tensor, uniforms: Tensor, costs: list[Tensor], ways: list[Tensor]) -> Tensor:
    """Index of a code at each rank, digit by digit; ``place`` is the row of ``costs`` and ``ways``."""
    # The shell of rank r is the first whose cumulative count exceeds r.
    left = (ways[0].cumsum(1)[place] <= ranks[:, None]).sum(1)
    neighbour, radix = torch.zeros_like(place), 1
    for channel, cost in enumerate(costs):
        rest = left[:, None] - cost[place]
        weights = torch.where(rest >= 0, ways[channel + 1][place[:, None], rest.clamp(min=0)], 0.0).cumsum(1)
        digit = (weights <= uniforms[:, channel, None] * weights[:, -1:]).sum(1).clamp(max=cost.shape[1] - 1)
        left = rest.gather(1, digit[:, None]).squeeze(1)
        neighbour += digit * radix
        radix *= cost.shape[1]
    return neighbour


def _digit_costs(indices: Tensor, levels: tuple[int, ...], units: list[int]) -> list[Tensor]:
    """Per channel the squared distance of each possible digit from the digit of the index, ``[n, levels[d]]``."""
    costs, rest = [], indices
    for count, unit in zip(levels, units, strict=True):
        digits = torch.arange(count, device=indices.device)
        costs.append(unit * (digits[None] - (rest % count)[:, None]).square())
        rest = rest // count
    return costs
