"""The scales of a quantised matrix: found by search, and fitted again to the integers chosen."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from calr_kernels.forms import Form
from calr_kernels.native import rounding
from calr_kernels.records import level_cells, nearest, storable

FRACTIONS = 17  # scales tried of each sign, the one that is exactly 1 among them
LEAST, MOST = 0.75, 1.15  # of the scale under which the largest weight gets the outermost level
CACHED = 1 << 15  # weights searched at once on a CPU: they stay in its cache
SEARCHED_ON_GPU = 1 << 24  # the same on a GPU, where they take half a gigabyte
FIT_NUMBERS = 1 << 24  # float32 numbers of normal equations held at once
DAMPING = 1e-6  # of the normal equations, relative to their diagonal


def search(weight: Tensor, importance: Tensor, form: Form) -> Tensor:
    """Return scales [..., N, groups] float32, all of them storable, of weight [..., N, K].

    importance [..., K]: what an error of each column weighs (the diagonal of the inputs' moment).
    Both signs are tried, since the levels reach farther on one side. Of each scale tried, the
    integers nearest to it get the scale that fits them best; the best of these is taken.
    """
    tried = torch.linspace(LEAST, MOST, FRACTIONS, dtype=torch.float64).tolist()
    tried.append(abs(form.values[0] / form.values[-1]))  # the largest weight on the other side
    if form.levels == "table":  # or on any level that may be the outermost one used
        most = max(map(abs, form.values))
        tried += [abs(v) / most for v in form.values if LEAST < abs(v) / most < 1]
    tried = [sign * fraction for fraction in tried for sign in (1.0, -1.0)]
    if rounding.can_round(weight):
        return rounding.search(weight, importance.float(), tried, form)
    weighed = _grouped(importance.float()[..., None, :], form)  # [..., 1, G, g]
    cells = level_cells(form, weight.device)
    at_once = CACHED if weight.device.type == "cpu" else SEARCHED_ON_GPU
    rows = max(1, at_once // weight[..., 0, :].numel())
    parts = (_grouped(part.float(), form) for part in weight.split(rows, -2))
    return torch.cat([_best(groups, weighed, cells, tried, form) for groups in parts], -2)


def _best(groups: Tensor, weighed: Tensor, cells: Tensor, tried: list[float], form: Form) -> Tensor:
    """Search the scales [..., n, G] of groups [..., n, G, g]; weighed [..., 1, G, g].

    cells: levels by ratio. tried: scales, relative to that under which the largest weight gets the
    outermost level.
    """
    largest = groups.abs().amax(-1, keepdim=True) / float(cells.abs().max())
    inverse = torch.where(largest == 0, 0.0, 1 / largest)
    ratios, products = groups * inverse, groups * weighed
    best = torch.zeros_like(largest)[..., 0]
    gain = torch.zeros_like(best)  # of the error of scale 0
    for fraction in tried:
        levels = nearest(ratios / fraction, cells)
        along = (products * levels).sum(-1)
        energy = (levels.square_() * weighed).sum(-1).clamp_(min=1e-30)
        fitted = storable(along / energy, form).float()
        gained = fitted * (2 * along - fitted * energy)
        better = (gained > gain) & torch.isfinite(fitted)
        best, gain = torch.where(better, fitted, best), torch.where(better, gained, gain)
    return best


def refit(weight: Tensor, codes: Tensor, moment: Tensor, scales: Tensor, form: Form) -> Tensor:
    """Return the scales [..., N, groups] of a row that together err least with codes [..., N, K].

    Minimises (w - ŵ) G (w - ŵ)ᵀ row by row, G = moment [..., K, K]: small least-squares problems. A
    scale that is 0 stays 0, a sign stays as it is.
    """
    values = torch.tensor(form.values, dtype=torch.float32, device=weight.device)
    g, count = moment.float(), form.groups(weight.shape[-1])
    together = weight[..., 0, 0].numel()
    rows = max(1, FIT_NUMBERS // (together * (weight.shape[-1] + count**2)))
    parts = zip(weight.split(rows, -2), codes.split(rows, -2), strict=True)
    found = [_fitted(w.float(), values[c.int()], g, form) for w, c in parts]
    fitted = storable(torch.cat(found, -2), form).float()
    good = torch.isfinite(fitted) & (fitted * scales > 0)
    return torch.where(good, fitted, scales)


def _fitted(weight: Tensor, levels: Tensor, g: Tensor, form: Form) -> Tensor:
    """Solve for the scales [..., n, G], float64, of levels [..., n, K] that fit weight best."""
    right = _grouped((weight @ g).mul_(levels), form).sum(-1).double()
    normal = torch.empty(*right.shape, right.shape[-1], dtype=torch.float64, device=g.device)
    for group in range(right.shape[-1]):  # symmetric: each with those behind it
        start = group * form.scale_group
        own = slice(start, start + form.scale_group)
        products = (levels[..., own] @ g[..., own, start:]).mul_(levels[..., start:])
        found = _grouped(products, form).sum(-1)
        normal[..., group, group:] = found
        normal[..., group:, group] = found
    diagonal = normal.diagonal(dim1=-2, dim2=-1)
    diagonal += DAMPING * diagonal.mean(-1, keepdim=True) + 1e-30
    fitted: Tensor = torch.linalg.solve_ex(normal, right)[0]
    return fitted


def _grouped(weight: Tensor, form: Form) -> Tensor:
    """View [..., K], padded with zeros, as [..., groups, scale_group]."""
    padding = form.groups(weight.shape[-1]) * form.scale_group - weight.shape[-1]
    return pad(weight, (0, padding)).view(*weight.shape[:-1], -1, form.scale_group)
