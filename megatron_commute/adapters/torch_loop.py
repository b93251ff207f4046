"""Any PyTorch training loop: what a probe needs of an nn.Module and its optimiser.

Nothing of the module is written to: losses are evaluated through torch.func.functional_call on tensors of the probe's own,
so a probe that fails half-way leaves no trace.
"""

import contextlib

import torch

from megatron_commute import reduce
from megatron_commute.probe import Model

# D = 1/(sqrt(v) + floor): rows that are hardly ever visited have tiny v and would dominate every inner product
# (a learning rate times preconditioned curvature of 246 was seen); a tenth of the mean sqrt(v) bounds D at 10x its usual size.
METRIC_FLOOR = 0.1


def probe_model(module, loss, micro_batch, second_moments=None, owned=None, decayed=None, groups=None, exact=None):
    """Build the probe.Model of an nn.Module.

    loss: (module, tokens i64[b, n]) -> mean loss, calling module(...) as training does. micro_batch: sequences a forward
    pass. second_moments: () -> bias-corrected second moments of Adam (list of tensors, one per trainable parameter) or None.
    owned, decayed: per trainable parameter, see probe.Model; default: all owned, decay on matrices only. groups:
    reduce.Groups. exact: () -> context manager that makes the module twice differentiable; default: nothing to do.
    Raises ValueError for a module without trainable parameters.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("the model has no trainable parameter: nothing to measure")
    names = [name for name, _ in named]

    def at(params, tokens):
        return torch.func.functional_call(_Loss(module, loss), {f"module.{n}": p for n, p in zip(names, params, strict=True)}, (tokens,))

    def parameters():
        return [p.detach() if p.dtype in (torch.float32, torch.float64) else p.detach().float() for _, p in named]

    owned = tuple(owned or [True] * len(named))

    def metric(name):
        return None if name == "identity" else adam_metric(second_moments, owned, groups or reduce.Groups())

    return Model(
        parameters,
        at,
        owned,
        tuple(decayed or [p.dim() > 1 for _, p in named]),
        metric,
        lambda method: quiet(module, exact if method == "exact" else None),
        micro_batch,
    )


class _Loss(torch.nn.Module):
    """A module and its loss as one callable, so that functional_call swaps parameters around both."""

    def __init__(self, module, loss):
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, tokens):
        return self.loss(self.module, tokens)


def adam_metric(second_moments, owned, groups):
    """D = 1 / (sqrt(v) + METRIC_FLOOR * mean sqrt(v)) per parameter; the mean runs over all parameters of the model.

    Raises ValueError where the optimiser has no second moments (yet).
    """
    moments = second_moments() if second_moments is not None else None
    if moments is None:
        raise ValueError("probe.metric adam needs an Adam optimiser that has taken a step; write `metric: identity`")
    roots = [v.float().sqrt() for v in moments]
    total = torch.tensor(
        [
            sum(float(r.sum(dtype=torch.float64)) for r, o in zip(roots, owned, strict=True) if o),
            float(sum(r.numel() for r, o in zip(roots, owned, strict=True) if o)),
        ],
        dtype=torch.float64,
    )
    total = reduce.sum_of_numbers(total.numpy(), groups.model)
    floor = METRIC_FLOOR * total[0] / total[1]
    if not floor > 0:
        raise ValueError("all second moments of the optimiser are zero: probe after its first step")
    return [1.0 / (r + floor) for r in roots]


@contextlib.contextmanager
def quiet(module, exact=None):
    """Dropout off and random state kept for the time of a probe; every module's own training flag is put back."""
    flags = [(m, m.training) for m in module.modules()]
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        for m, _ in flags:
            m.training = False
        with exact() if exact is not None else contextlib.nullcontext():
            yield
    finally:
        for m, training in flags:
            m.training = training
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def second_moments(optimizer, parameters):
    """Bias-corrected second moments of torch.optim.Adam or AdamW, one per parameter, or None before its first step."""
    betas = {id(p): group["betas"][1] for group in optimizer.param_groups for p in group["params"] if "betas" in group}
    moments = []
    for p in parameters:
        state = optimizer.state.get(p, {})
        if "exp_avg_sq" not in state or id(p) not in betas:
            return None
        moments.append(state["exp_avg_sq"] / (1 - betas[id(p)] ** float(state["step"])))
    return moments
