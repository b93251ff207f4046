"""Mutations of what stands in a file of torch, of safetensors or of JSON, beside those of its bytes."""

import argparse
import io
import json
import types
import warnings

import mutations
import torch


def structure(raw, rng):
    """One value somewhere in a file of torch, of safetensors or of JSON replaced, taken away or exchanged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _structure(raw, rng)
    except Exception:  # of a file that an earlier mutation has damaged, or a value that cannot be written
        return mutations.flip(raw, rng)


def _structure(raw, rng):
    if raw[:2] == b"PK":
        content, out = torch.load(io.BytesIO(raw), weights_only=False), io.BytesIO()
        change(content, rng)
        torch.save(content, out)
        return out.getvalue()
    if raw[:1] == b"{":
        content = json.loads(raw)
        change(content, rng)
        return json.dumps(content).encode()
    size = int.from_bytes(raw[:8], "little")
    content = json.loads(raw[8 : 8 + size])
    change(content, rng)
    head = json.dumps(content).encode()
    return len(head).to_bytes(8, "little") + head + raw[8 + size :]


def places(node, found):
    """(container, key) of everything within a nested structure."""
    node = vars(node) if isinstance(node, types.SimpleNamespace | argparse.Namespace) else node
    inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in inside:
        found.append((node, key))
        places(value, found)
    return found


def change(content, rng):
    every = places(content, [])
    node, key = rng.choice(every)
    way = rng.randrange(4)
    if way == 0:
        del node[key]
    elif way == 1:
        other, name = rng.choice(every)
        node[key] = other[name]
    elif torch.is_tensor(node[key]) and way == 2:
        p = node[key]
        ways = [
            p.half(),
            p.long(),
            p.reshape(-1),
            p[:1],
            p[:0],
            p * float("nan"),
            p.to(torch.complex64),
            -p,
            p.double() + 1,
        ]
        node[key] = rng.choice([*ways, torch.tensor(3.0), p.to_sparse()]).clone()
    elif isinstance(node[key], str) and way == 2 and node[key]:
        name = rng.choice(sorted(mutations.TEXT))
        node[key] = mutations.TEXT[name](node[key].encode(), rng).decode("utf-8", "replace")
    else:
        odd = [
            None,
            True,
            "",
            "many",
            [],
            {},
            [1, 2],
            {"a": 1},
            0.5,
            float("nan"),
            float("inf"),
            1e300,
            10**40,
        ]
        node[key] = rng.choice([*odd, *mutations.HUGE])
