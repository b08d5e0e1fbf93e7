"""What a careful user writes without armor, for every operator: the baselines that bench_*.py time.

The D^c dual (sections 1 and 2 of docs/math.md) by SciPy on the host or by a fixed number of Newton steps in torch, both
without transport costs and evaluated at the mu they find, so that autograd returns the worst-case weights; the losses
of section 4 as published; the steps of section 5 and PGD around them; whole training steps as the published scripts
have them, which counts.py counts. tests/test_benchmarks.py and tests/test_counts.py hold all to the float64 oracle: a
ratio to a baseline that is fast and wrong would say nothing.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy import optimize

LAM_MAX = 100.0  # the published scripts give up above this lambda
RHO_GAP = 1e-6  # and keep rho this far above the largest loss


def scipy_dc_loss(losses, *, radius, divergence, alpha=None, kappa=0.0):
    """D^c loss of `losses` [..., n] as the published scripts compute it: duals on the host, value in torch.

    KL bisects the derivative in lambda; Rényi minimises over (lambda, rho) with L-BFGS-B. No published script
    solves the alpha divergence exactly; it gets Brent's root search on its one-root form, for kappa = 0 only.
    """
    solve = {"kl": _bisect_kl, "alpha": _solve_alpha, "renyi": _solve_renyi}[divergence]
    mu, rho = _solve_rows(solve, losses, radius, alpha, kappa)
    return _dual(losses, mu, rho, radius, divergence, alpha, kappa)


def brent_dc_loss(losses, *, radius, kappa=0.0):
    """KL D^c loss of `losses` [..., n] by a tuned host solve: Brent's search, one exponential a step."""
    mu, rho = _solve_rows(_brent_kl, losses, radius, None, kappa)
    return _dual(losses, mu, rho, radius, "kl", None, kappa)


def eager_dc_loss(losses, *, radius, kappa=0.0, iterations=12):
    """KL D^c loss of `losses` [..., n] by a fixed number of Newton steps, without a device-to-host copy."""
    with torch.no_grad():
        mu = _newton_kl(losses, radius, iterations).clamp(min=kappa)
    return _dual(losses, mu, None, radius, "kl", None, kappa)


def _dual(losses, mu, rho, radius, divergence, alpha, kappa):
    """mu * (radius + Phi(losses / mu)) - kappa * radius at rho = mu * nu, in the units of a loss."""
    if divergence == "kl":
        inner = mu * (torch.logsumexp(losses / mu[..., None], -1) - math.log(losses.shape[-1]))
    elif divergence == "alpha":
        power = alpha / (alpha - 1)
        excess = torch.relu(losses - rho[..., None]) / mu[..., None]
        conjugate = (alpha - 1) ** power / alpha * excess**power + 1 / (alpha * (alpha - 1))
        inner = rho + mu * conjugate.mean(-1)
    else:
        mean = ((rho[..., None] - losses) ** ((alpha - 1) / alpha)).mean(-1)
        inner = rho - mu * ((math.log(alpha) + 1 - mu.log()) / alpha + mean.log() / (alpha - 1))
    return mu * radius + inner - kappa * radius


def _solve_rows(solve, losses, radius, alpha, kappa):
    rows = losses.detach().cpu().numpy().reshape(-1, losses.shape[-1])
    duals = np.array([solve(row, radius, alpha, kappa) for row in rows])
    return torch.from_numpy(duals).to(losses).reshape(*losses.shape[:-1], 2).unbind(-1)


def _bisect_kl(row, radius, alpha, kappa, costs=0.0):
    top = row.max()

    def slope(lam):
        # Every term evaluates its own exponentials, as published: the formula of section 1 written out once.
        mu = lam + kappa
        phi = np.log(np.average(np.exp((row - top) / mu - costs))) + top / mu
        mean = np.average(row * np.exp((row - top) / mu - costs)) / np.average(np.exp((row - top) / mu - costs))
        return radius + phi - mean / mu

    low = 0.0 if kappa > 0 else 1e-6 * (top - row.min())
    if slope(low) >= 0:
        return low + kappa, 0.0
    high = 10.0
    while slope(high) <= 0:
        high *= 2
        if high >= LAM_MAX:
            return LAM_MAX + kappa, 0.0
    return optimize.bisect(slope, low, high) + kappa, 0.0


def _brent_kl(row, radius, alpha, kappa):
    shifted = row - row.max()
    count = len(row)

    def gap(inverse):
        weights = np.exp(inverse * shifted)
        total = weights.sum()
        return inverse * (weights @ shifted) / total - math.log(total / count) - radius

    # mu <= (max - min) / sqrt(8 radius): section 2.
    low, high = math.sqrt(8 * radius) / -shifted.min(), 1 / kappa if kappa > 0 else 1e6 / -shifted.min()
    if low >= high or gap(high) <= 0:
        return 1 / high, 0.0
    return 1 / optimize.brentq(gap, low, high, rtol=1e-6), 0.0


def _solve_alpha(row, radius, alpha, kappa):
    if kappa:
        raise ValueError(f"kappa must be 0 for the one-root form of the alpha divergence, got {kappa}")
    power = alpha / (alpha - 1)
    growth = 1 + alpha * (alpha - 1) * radius
    top, spread = row.max(), row.max() - row.min()

    def slope(rho):
        excess = np.maximum(row - rho, 0)
        tilt = np.mean(excess ** (power - 1)) * np.mean(excess**power) ** (1 / power - 1)
        return 1 - growth ** (1 / alpha) * tilt

    low, high = top - spread, top - 1e-6 * spread
    while slope(low) >= 0:
        low = top - 2 * (top - low)
    rho = optimize.brentq(slope, low, high) if slope(high) > 0 else high
    mu = (alpha - 1) * (np.mean(np.maximum(row - rho, 0) ** power) / growth) ** (1 / power)
    return mu, rho


def _solve_renyi(row, radius, alpha, kappa):
    power = (alpha - 1) / alpha

    def value(x):
        mu, rho = x
        mean = np.average((rho - row) ** power)
        return mu * radius + rho - mu * ((np.log(alpha) + 1 - np.log(mu)) / alpha + np.log(mean) / (alpha - 1))

    def gradient(x):
        mu, rho = x
        mean = np.average((rho - row) ** power)
        by_mu = radius - (np.log(alpha) - np.log(mu)) / alpha - np.log(mean) / (alpha - 1)
        return by_mu, 1 - mu / alpha * np.average((rho - row) ** (-1 / alpha)) / mean

    mu_min, rho_min = max(kappa, 1e-6), row.max() + RHO_GAP
    bounds = [(mu_min, None), (rho_min, None)]
    return optimize.minimize(value, (mu_min, rho_min + 1), jac=gradient, bounds=bounds, tol=1e-7).x


def _newton_kl(losses, radius, iterations):
    """mu of each row by Newton on sqrt(KL) in 1/mu, nearly straight there (docs/math.md, section 2)."""
    shifted = losses - losses.amax(-1, keepdim=True)
    tiny = torch.finfo(losses.dtype).tiny
    inverse = math.sqrt(2 * radius) / shifted.std(-1, keepdim=True, correction=0).clamp(min=tiny)
    for _ in range(iterations):
        log_weights = torch.log_softmax(inverse * shifted, -1)
        weights = log_weights.exp()
        kl = (weights * log_weights).sum(-1, keepdim=True) + math.log(losses.shape[-1])
        mean = (weights * shifted).sum(-1, keepdim=True)
        slope = inverse * (weights * (shifted - mean) ** 2).sum(-1, keepdim=True)
        step = 2 * ((radius * kl).sqrt() - kl) / slope.clamp(min=tiny)
        # The slope all but vanishes near the largest divergence that n samples allow, and Newton would leap.
        inverse = torch.clamp(inverse + step, inverse / 4, inverse * 4)
    return 1 / inverse.squeeze(-1)


# ---- losses: logits [n, K], one loss per sample --------------------------------------------------------------------


def cross_entropy(logits, target):
    return F.cross_entropy(logits, target, reduction="none")


def trades_loss(natural_logits, adv_logits, target, *, beta):
    """The official TRADES loss before its mean over the batch."""
    kl = F.kl_div(F.log_softmax(adv_logits, 1), F.softmax(natural_logits, 1), reduction="none").sum(1)
    return cross_entropy(natural_logits, target) + beta * kl


def mart_loss(natural_logits, adv_logits, target, *, beta):
    """The official MART loss before its mean over the batch."""
    adv_probs, natural_probs = F.softmax(adv_logits, 1), F.softmax(natural_logits, 1)
    top = torch.argsort(adv_probs, dim=1)[:, -2:]
    wrong = torch.where(top[:, -1] == target, top[:, -2], top[:, -1])
    margin = F.nll_loss(torch.log(1.0001 - adv_probs + 1e-12), wrong, reduction="none")
    true_probs = natural_probs.gather(1, target[:, None]).squeeze(1)
    kl = F.kl_div(torch.log(adv_probs + 1e-12), natural_probs, reduction="none").sum(1)
    return cross_entropy(adv_logits, target) + margin + beta * kl * (1.0000001 - true_probs)


def dc_trades(natural_logits, adv_logits, target, *, beta, radius, kappa):
    return eager_dc_loss(trades_loss(natural_logits, adv_logits, target, beta=beta), radius=radius, kappa=kappa)


# ---- steps of an attack in the box [0, 1]: x_adv, grad, x [B, ...] ---------------------------------------------------


def linf_step(x_adv, grad, x, *, step_size, radius):
    d = (x_adv.add(grad.sign(), alpha=step_size) - x).clamp(-radius, radius)
    return (x + d).clamp(0, 1)


def l2_step(x_adv, grad, x, *, step_size, radius):
    d = x_adv + step_size * (grad / _length(grad)) - x
    return (x + d * (radius / _length(d)).clamp(max=1)).clamp(0, 1)


def l1_step(x_adv, grad, x, *, step_size, radius, top):
    """SLIDE's step (Tramer and Boneh, 2019), Duchi et al.'s projection by sorting, then the box.

    This is what attack libraries do. It ends in the ball and in the box but, unlike armor, not at the point of both
    that is closest: what the box cuts off is lost.
    """
    size = torch.where((grad > 0) & (x_adv < 1) | (grad < 0) & (x_adv > 0), grad.abs(), 0).flatten(1)
    least = size.topk(max(1, int(top * size.shape[1])), sorted=False).values.amin(1, keepdim=True)
    chosen = ((size >= least) & (size > 0)).view_as(grad)
    share = step_size / chosen.flatten(1).sum(1, dtype=x.dtype).clamp(min=1).view(-1, *(1,) * (grad.dim() - 1))
    d = x_adv + share * grad.sign() * chosen - x

    ranked = d.abs().flatten(1).sort(descending=True).values
    excess = ranked.cumsum(1) - radius
    count = (ranked * torch.arange(1, ranked.shape[1] + 1, device=d.device) > excess).sum(1, keepdim=True)
    theta = (excess.gather(1, count - 1) / count).clamp(min=0).view_as(share)
    return (x + d.sign() * (d.abs() - theta).clamp(min=0)).clamp(0, 1)


def norm_power_step(x_adv, grad, x, *, step_size, weight, power):
    """A sign step on loss - weight * ||d||_2 ** power."""
    d = x_adv - x
    v = grad - weight * power * _length(d) ** (power - 2) * d
    return x_adv.add(v.sign(), alpha=step_size).clamp(0, 1)


def soft_ball_step(x_adv, grad, x, *, step_size, radius, tau):
    """UDR's step (Bui et al., 2022): beyond the ball the displacement shrinks towards it."""
    d = x_adv.add(grad.sign(), alpha=step_size) - x
    return (x + d - step_size / tau * (d - d.clamp(-radius, radius))).clamp(0, 1)


def binary_step(x_adv, grad, x, *, step_size):
    return x_adv.add(grad.sign(), alpha=step_size).clamp(0, 1)


STEPS = {
    "linf": linf_step,
    "l2": l2_step,
    "l1": l1_step,
    "norm_power": norm_power_step,
    "soft_ball": soft_ball_step,
    "binary": binary_step,
}


def fed_step(step, x_adv, grad, x, mean, std, **settings):
    """`step` with the gradient of the feed, and the next feed: normalised and cast to the dtype of the gradient."""
    mean, std = mean[:, None, None], std[:, None, None]
    x_next = step(x_adv, grad / std, x, **settings)
    return x_next, ((x_next - mean) / std).to(grad.dtype)


def linf_start(x, *, radius):
    return (x + torch.empty_like(x).uniform_(-radius, radius)).clamp(0, 1)


def l2_start(x, *, radius):
    """Uniform in the ball: a random direction at the radius times u^(1/n)."""
    noise = torch.randn_like(x)
    u = torch.rand(len(x), *(1,) * (x.dim() - 1), device=x.device)
    return (x + noise * (radius * u ** (1 / x[0].numel()) / _length(noise))).clamp(0, 1)


def gaussian_start(x, *, sigma):
    return (x + sigma * torch.randn_like(x)).clamp(0, 1)


STARTS = {"linf": linf_start, "l2": l2_start, "gaussian": gaussian_start}


def _length(v):
    """l2 norm of every sample, at least 1e-12."""
    return v.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, *(1,) * (v.dim() - 1))


# ---- whole attacks -------------------------------------------------------------------------------------------------


def pgd(model, x, y, gradient, *, radius, step_size, steps):
    """Linf PGD on the model as it is, with `gradient(model, loss, x_adv)` of the mean cross-entropy."""
    x_adv = linf_start(x, radius=radius)
    for _ in range(steps):
        x_adv.requires_grad_()
        grad = gradient(model, F.cross_entropy(model(x_adv), y), x_adv)
        x_adv = linf_step(x_adv.detach(), grad, x, step_size=step_size, radius=radius)
    return x_adv


def by_backward(model, loss, x_adv):
    """As most training scripts have it: the gradients of all weights are computed, and thrown away."""
    model.zero_grad()
    loss.backward()
    return x_adv.grad


def by_autograd(model, loss, x_adv):
    return torch.autograd.grad(loss, x_adv)[0]


# ---- whole training steps, in float32 -----------------------------------------------------------------------------
#
# What the published scripts do in every step, from the attack to the optimizer; `weigh` makes one loss of the losses
# (and costs) of the samples: `mean`, `host_dc_loss` or a `LearnedKL`. The steps of the attacks are those above, which
# need fewer operators than the scripts'. What the scripts compute and never use is left out, but with unused=True.


def pgd_training_step(model, optimizer, x, y, weigh, *, radius, step_size, steps, unused=False):
    """PGD in the ball, as in the ARMOR_D script for MNIST and Rényi: the attack computes the gradients of the weights,
    and loss and errors are logged in every step.

    unused: the script predicts the natural samples once for nothing, and once for a loss that it multiplies by 0 and
    differentiates all the same.
    """
    if unused:
        model(x)
    x_adv = pgd(model, x, y, by_backward, radius=radius, step_size=step_size, steps=steps)
    logits = model(x_adv)
    loss = weigh(cross_entropy(logits, y))
    if unused:
        loss = 0.0 * cross_entropy(model(x), y).mean() + loss
    _update(model, optimizer, loss)
    return loss.item(), _errors(logits, y)


def trades_training_step(model, optimizer, x, y, weigh, *, beta, radius, step_size, steps, natural_mix=0.0, clip=None):
    """TRADES: every step of the attack predicts the natural samples again, the loss does so twice, and the natural part
    of the ARMOR_D scripts once more."""

    def objective(x_adv):
        return F.kl_div(F.log_softmax(model(x_adv), 1), F.softmax(model(x), 1), reduction="sum")

    x_adv = _ascend_from_noise(model, x, objective, radius=radius, step_size=step_size, steps=steps)
    losses = cross_entropy(model(x), y)
    kl = F.kl_div(F.log_softmax(model(x_adv), 1), F.softmax(model(x), 1), reduction="none").sum(1)
    loss = _mixed(model, x, y, weigh(losses + beta * kl), natural_mix)
    return _update(model, optimizer, loss, clip)


def mart_training_step(model, optimizer, x, y, weigh, *, beta, radius, step_size, steps, natural_mix=0.0, clip=None):
    """MART as in the ARMOR_D scripts, which attack its whole loss, predict the natural samples in every step and once
    more for the natural part."""

    def objective(x_adv):
        return mart_loss(model(x), model(x_adv), y, beta=beta).mean()

    x_adv = _ascend_from_noise(model, x, objective, radius=radius, step_size=step_size, steps=steps)
    loss = weigh(mart_loss(model(x), model(x_adv), y, beta=beta))
    return _update(model, optimizer, _mixed(model, x, y, loss, natural_mix), clip)


def udr_training_step(model, optimizer, x, y, weigh, *, mean, std, radius, tau, step_size, steps):
    """UDR: samples are normalised in front of the model, and of the attack's restarts, here one, each sample keeps the
    worst by a mask as an index."""
    mean, std = mean[:, None, None], std[:, None, None]
    x_adv = linf_start(x, radius=radius)
    for _ in range(steps):
        x_adv.requires_grad_()
        grad = by_autograd(model, F.cross_entropy(model((x_adv - mean) / std), y), x_adv)
        x_adv = soft_ball_step(x_adv.detach(), grad, x, step_size=step_size, radius=radius, tau=tau)
    found = cross_entropy(model((x_adv - mean) / std), y).detach()
    worst, largest = torch.zeros_like(x), torch.zeros_like(found)
    worst[found >= largest] = x_adv[found >= largest]

    logits = model((worst - mean) / std)
    costs = ((worst - x).abs() - radius).clamp(min=0).square().flatten(1).sum(1) / (2 * tau)
    loss = _update(model, optimizer, weigh(cross_entropy(logits, y), costs))
    return loss.item(), _errors(logits, y)


def penalised_ot_training_step(model, optimizer, x, y, weigh, *, weight, power, step_size, steps, unused=False):
    """Ascent on loss - cost from x, as in the ARMOR_D scripts for MNIST, which log loss and errors in every step.

    unused: in every step of the attack the scripts predict the samples twice and use one prediction, and they log the
    loss of the first sample; before the attack they predict the natural samples, and after it those found, for nothing.
    """
    if unused:
        cross_entropy(model(x), y)
    x_adv = x
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        if unused:
            model(x_adv)
        losses = cross_entropy(model(x_adv), y)
        if unused:
            losses[0].item()
        grad = by_autograd(model, losses.sum(), x_adv)
        x_adv = norm_power_step(x_adv.detach(), grad, x, step_size=step_size, weight=weight, power=power)
    if unused:
        cross_entropy(model(x_adv), y)
    logits = model(x_adv)
    costs = weight * (x_adv - x).flatten(1).norm(dim=1) ** power
    loss = _update(model, optimizer, weigh(cross_entropy(logits, y), costs))
    if isinstance(weigh, LearnedKL):
        weigh.update()
    return loss.item(), _errors(logits, y)


def careful_training_step(model, optimizer, x, y, weigh, method, *, natural_mix=0.0, clip=None, **settings):
    """The step of any of these methods written with care: gradients in the images alone, every prediction once, nothing
    logged. `method` and `settings` are those of `careful_attack`."""
    x_adv = careful_attack(model, x, y, method, **settings)
    natural = model(x) if method in ("trades", "mart") or natural_mix else None
    adversarial, costs = model(x_adv), ()
    if method in ("trades", "mart"):
        of_method = {"trades": trades_loss, "mart": mart_loss}[method]
        losses = of_method(natural, adversarial, y, beta=settings["beta"])
    else:
        losses = cross_entropy(adversarial, y)
    if method == "penalised-ot":
        costs = (settings["weight"] * (x_adv - x).flatten(1).norm(dim=1) ** settings["power"],)
    loss = weigh(losses, *costs)
    if natural_mix:
        loss = natural_mix * cross_entropy(natural, y).mean() + (1 - natural_mix) * loss
    _update(model, optimizer, loss, clip)
    if isinstance(weigh, LearnedKL):
        weigh.update()
    return loss.detach()


def careful_attack(model, x, y, method, *, steps, step_size, radius=None, beta=None, weight=None, power=None):
    """The attack of "trades", "mart", "pgd" or "penalised-ot" in eval mode, which predicts the natural samples once."""
    model.eval()
    if method in ("trades", "mart"):
        with torch.no_grad():
            natural = model(x)
        x_adv = gaussian_start(x, sigma=0.001)
    else:
        x_adv = x if method == "penalised-ot" else linf_start(x, radius=radius)
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        logits = model(x_adv)
        if method == "trades":
            objective = F.kl_div(F.log_softmax(logits, 1), F.softmax(natural, 1), reduction="sum")
        elif method == "mart":
            objective = mart_loss(natural, logits, y, beta=beta).sum()
        else:
            objective = F.cross_entropy(logits, y, reduction="sum")
        grad = by_autograd(model, objective, x_adv)
        if method == "penalised-ot":
            x_adv = norm_power_step(x_adv.detach(), grad, x, step_size=step_size, weight=weight, power=power)
        else:
            x_adv = linf_step(x_adv.detach(), grad, x, step_size=step_size, radius=radius)
    model.train()
    return x_adv


def mean(losses, costs=None):
    return losses.mean()


def host_dc_loss(losses, costs=None, *, radius, divergence, alpha=None, kappa=0.0):
    """D^c loss of a batch as the scripts have it: the dual variables are found on the host and stay there, numbers."""
    solve = {"kl": _bisect_kl, "renyi": _solve_renyi}[divergence]
    given = [t.detach().cpu().numpy() for t in (losses, costs) if t is not None]
    mu, rho = map(float, solve(given[0], radius, alpha, kappa, *given[1:]))
    if divergence == "kl":
        scaled = losses / mu if costs is None else losses / mu - costs
        top = scaled.max()
        return radius * (mu - kappa) + mu * (torch.log(torch.mean(torch.exp(scaled - top))) + top)
    fixed = radius * (mu - kappa) + rho - mu * (math.log(alpha) + 1 - math.log(mu)) / alpha
    return fixed - mu / (alpha - 1) * torch.log(torch.mean((rho - losses) ** ((alpha - 1) / alpha)))


class LearnedKL:
    """The KL dual at a lambda that Adam learns, as in the scripts for MNIST; `step_size` is Adam's.

    As there lambda is the parameter itself, not its logarithm, and the value is watched for NaN on the host.
    """

    def __init__(self, *, radius, step_size, device="cpu"):
        self.radius, self.lam = radius, torch.ones((), device=device, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.lam], lr=step_size)

    def __call__(self, losses, costs):
        scaled = losses / self.lam - costs
        top = scaled.max()
        value = self.radius * self.lam + self.lam * (torch.log(torch.mean(torch.exp(scaled - top))) + top)
        if scaled.mean().isnan() or value.isnan():
            raise FloatingPointError("the loss is NaN")
        return value

    def update(self):
        self.optimizer.step()
        self.optimizer.zero_grad()


def _ascend_from_noise(model, x, objective, *, radius, step_size, steps):
    """The attack of TRADES and MART, in eval mode; the noise it starts with is drawn on the host."""
    model.eval()
    x_adv = x + 0.001 * torch.randn(x.shape).to(x.device)
    for _ in range(steps):
        x_adv.requires_grad_()
        grad = by_autograd(model, objective(x_adv), x_adv)
        x_adv = linf_step(x_adv.detach(), grad, x, step_size=step_size, radius=radius)
    model.train()
    return x_adv


def _mixed(model, x, y, loss, natural_mix):
    if natural_mix == 0:
        return loss
    return natural_mix * cross_entropy(model(x), y).mean() + (1 - natural_mix) * loss


def _update(model, optimizer, loss, clip=None):
    optimizer.zero_grad()
    loss.backward()
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return loss


def _errors(logits, y):
    return (logits.argmax(1) != y).sum().item()
