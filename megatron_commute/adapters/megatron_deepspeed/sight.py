"""What one rank sees of a step of Megatron-DeepSpeed: the sequences that its loader brings, the
losses that its model gives.

Loaders exist on tensor-parallel rank 0 of every pipeline stage, and only the first and the last
stage read them; losses exist on the last stage. So each number is told by one rank of a replica,
and the account sums over all ranks.
"""

import contextlib

import numpy as np
import torch


class harmless:
    """A part of ours that no other rank waits for: a fault in it is told, and training goes on
    without what it gives. A class, as it is entered many times a step.
    """

    def __init__(self, what):
        self.what = what

    def __enter__(self):
        return self

    def __exit__(self, kind, fault, trace):
        if not isinstance(fault, Exception):
            return False
        print(f"commute: {self.what}; training goes on: {type(fault).__name__}: {fault}", flush=True)
        return True


class Sight:
    """Follows micro-batches of one step at a time; training computes what it would without.

    first, last: whether this rank is the one of its replica that tells sequences, and the one that
    tells losses. What has failed once is not tried again: this rank then tells nothing of it.
    """

    def __init__(self, first, last):
        self.first, self.last = first, last
        self.batches, self.losses = [], []

    def begin(self):
        self.batches, self.losses = [], []

    def over(self, batches):
        """The iterator of a loader, followed; None stays None."""
        return None if batches is None else _Followed(batches, self.batches)

    def forward_step(self, forward_step):
        """Megatron's forward_step, losses per token [b, s] followed. Pipelines do not call it."""

        def followed(batches, model, *rest):
            output, loss_function = forward_step(batches, model, *rest)
            self._keep(output, lambda: _mask(loss_function))
            return output, loss_function

        return followed

    @contextlib.contextmanager
    def of_pipeline(self, engine):
        """Follow the losses per token inside the loss function of a pipeline's last stage."""
        module = getattr(engine, "module", None)
        reduced = getattr(module, "loss_fn", None)
        if not self.last or reduced is None or not hasattr(engine, "train_batch"):
            yield
            return
        from megatron.core import tensor_parallel

        cross_entropy = tensor_parallel.vocab_parallel_cross_entropy

        def followed(output, labels):
            found = []

            def kept(*args, **named):
                found.append(cross_entropy(*args, **named))
                return found[-1]

            tensor_parallel.vocab_parallel_cross_entropy = kept
            try:
                loss = reduced(output, labels)
            finally:
                tensor_parallel.vocab_parallel_cross_entropy = cross_entropy
            if len(found) == 1:  # [s, b]
                self._keep(
                    found[0].transpose(0, 1), lambda: labels[1] if isinstance(labels, tuple | list) else None
                )
            return loss

        module.loss_fn = followed
        try:
            yield
        finally:
            module.loss_fn = reduced

    def _keep(self, losses, mask):
        """Losses per token [b, s] and which of them count; mask: () -> tensor or None."""
        if not self.last or not torch.is_tensor(losses) or losses.dim() != 2:
            return
        tells, self.last = self.last, False
        with harmless("losses of domains are not seen by this rank from here on"):
            losses, mask = losses.detach(), mask()
            if not torch.is_tensor(mask) or mask.numel() != losses.numel():
                mask = torch.ones_like(losses)
            elif mask.shape != losses.shape:
                mask = mask.reshape(losses.shape)
            self.losses.append((losses, mask))
            self.last = tells

    @torch.no_grad()
    def sequence_losses(self, count):
        """f64[count] of this step in the order trained, the mean of every sequence over its tokens
        that count, a tensor on its device; None where another rank tells them or they could not be
        seen.
        """
        if not self.last or sum(len(losses) for losses, _ in self.losses) != count or not count:
            return None
        # once a step, however many micro-batches it has
        losses, mask = (
            parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*self.losses, strict=True)
        )
        total = (losses * mask).sum(dim=1, dtype=torch.float64)
        return total / mask.sum(dim=1, dtype=torch.float64).clamp_(min=1)

    def tokens(self, count):
        """i64[n, s + 1] of each micro-batch of this step, `count` in all and never copied; None
        where another rank tells them.
        """
        if not self.first or not self.batches:
            return None
        tokens, self.first = (), False
        with harmless("sequences are not seen by this rank from here on, the fingerprint lacks them"):
            tokens = [batch["text"].numpy() for batch in self.batches]
            self.first = True
        return tokens if sum(map(len, tokens)) == count else None

    def delivered(self):
        """(domain i64[n], position i64[n] or None) of what the loader of this rank brought; None
        without loader or blend.
        """
        for domain, position in (("domain", "position"), ("dataset_idx", None)):
            if self.batches and domain in self.batches[0]:
                found = [
                    None if key is None else np.concatenate([batch[key].numpy() for batch in self.batches])
                    for key in (domain, position)
                ]
                return found[0].astype(np.int64), found[1]
        return None


class _Followed:
    """An iterator whose batches are kept for the time of a step."""

    def __init__(self, batches, seen):
        self.batches, self.seen = batches, seen

    def __iter__(self):
        return self

    def __next__(self):
        batch = next(self.batches)
        self.seen.append(batch)
        return batch


def _mask(loss_function):
    """The loss mask that Megatron's forward_step binds to its loss function, or None."""
    bound = getattr(loss_function, "args", ())
    return bound[0] if bound and torch.is_tensor(bound[0]) else None
