"""The plain GPT of hvp_methods in JAX: jit of jvp of grad on one thread of the CPU."""

import os

import numpy as np

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import jax
import jax.numpy as jnp


def product(case):
    """() -> H u of a hvp_methods.Case, compiled before it is returned."""
    params, u = (tuple(jnp.asarray(t.numpy()) for t in v) for v in (case.params, case.u))
    inputs, labels = (jnp.asarray(t.numpy().astype(np.int32)) for t in (case.inputs, case.labels))
    slope = jax.grad(loss_of(case.stack, case.heads, inputs, labels))
    compiled = jax.jit(lambda p, v: jax.jvp(slope, (p,), (v,))[1]).lower(params, u).compile()

    return lambda: jax.block_until_ready(compiled(params, u))


def loss_of(stack, heads, inputs, labels):
    """Mean cross-entropy as a function of the tuple of parameters."""
    b, s = inputs.shape
    mask = jnp.triu(jnp.ones((s, s), bool), 1)

    def norm(p, layer, x):
        x = x - x.mean(-1, keepdims=True)
        unit = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + layer.eps)
        return unit * p[layer.weight] + p[layer.bias]

    def linear(p, layer, x):
        return x @ p[layer.weight].T + p[layer.bias]

    def loss(p):
        x = p[stack.words][inputs] + p[stack.positions][:s]
        for block in stack.blocks:
            qkv = linear(p, block.qkv, norm(p, block.norm1, x)).reshape(b, s, heads, 3, -1)
            q, k, v = qkv.transpose(3, 0, 2, 1, 4)
            score = jnp.where(mask, -jnp.inf, q @ k.swapaxes(2, 3) * block.scale)
            o = (jax.nn.softmax(score, -1) @ v).transpose(0, 2, 1, 3).reshape(b, s, -1)
            x = x + linear(p, block.out, o)
            y = jax.nn.gelu(linear(p, block.up, norm(p, block.norm2, x)), approximate=True)
            x = x + linear(p, block.down, y)
        logits = norm(p, stack.norm, x) @ p[stack.output].T
        own = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
        return (jax.nn.logsumexp(logits, -1) - own).mean()

    return loss
